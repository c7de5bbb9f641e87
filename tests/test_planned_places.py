"""What `hf_pearl.plan` prints is what its `load()` does, and what `generate` takes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import check_device_map, get_balanced_memory
from models import tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

import hf_pearl
import hf_pearl.__main__
from hf_pearl import PearlConfig, load_demo_pair, models
from hf_pearl.compat import modules_not_to_split
from hf_pearl.pair import demo_pair_folder
from hf_pearl.parallel import placement
from hf_pearl.parallel.placement import layers_to_devices
from hf_pearl.parallel.workers.shipping import can_ship
from hf_pearl.planning import report
from hf_pearl.planning.footprint import Footprint
from hf_pearl.planning.plan import PlannedModel, plan
from hf_pearl.planning.tensor_parallel_split import tensor_parallel_split
from hf_pearl.planning.topology import parse_topology
from hf_pearl.planning.unloaded import unloaded

GIB = 2**30
DEMO = demo_pair_folder()
NAMES_OF_PRESENT_DEVICES = ("hf_pearl.planning.here.present_devices", "hf_pearl.parallel.placement.present_devices")
_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
}  # fmt: skip
SHAPES: dict[str, PreTrainedConfig] = {
    "llama 70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA
    ),
    "llama 1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True, **_LLAMA,
    ),
    "qwen 32B": Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, **_QWEN
    ),
    "qwen 14B": Qwen3Config(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40, **_QWEN
    ),
    "qwen 0.6B": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        tie_word_embeddings=True, **_QWEN,
    ),
    "gemma 27B": Gemma2Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, vocab_size=256000, max_position_embeddings=8192,
    ),
    "gemma 2B": Gemma2Config(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
        num_key_value_heads=4, head_dim=256, vocab_size=256000, max_position_embeddings=8192,
    ),
}  # fmt: skip


def saved(name: str, folder: Path) -> Path:
    """The folder of a model of that shape that has no weights."""
    config = SHAPES[name]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder / name)
    return folder / name


def pretend(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this machine for another."""
    for name in NAMES_OF_PRESENT_DEVICES:
        monkeypatch.setattr(name, lambda measured=False: parse_topology(machine))


@pytest.mark.parametrize(
    ("machine", "target", "draft", "num_devices"),
    [
        pytest.param("2x40GiB,1x8GiB", "qwen 32B", "qwen 0.6B", 2, id="32B on 2x40GiB"),
        pytest.param("2x80GiB,1x8GiB", "llama 70B", "llama 1B", 2, id="70B on 2x80GiB"),
        pytest.param("8x24GiB", "llama 70B", "llama 1B", 6, id="70B on six"),
        pytest.param("2x16GiB,1x8GiB", "qwen 14B", "qwen 0.6B", 2, id="14B on 2x16GiB"),
        pytest.param("2x20GiB", "qwen 14B", "qwen 0.6B", 2, id="14B on 2x20GiB beside its draft"),
        pytest.param("2x32GiB,1x12GiB", "gemma 27B", "gemma 2B", 2, id="27B with large embeddings, tied"),
        pytest.param("1x24GiB@2TB/s,1x48GiB@1TB/s,1x8GiB", "qwen 32B", "qwen 0.6B", 2, id="32B on unequal ones"),
    ],
)
def test_a_plan_loads_every_weight_where_it_says(
    machine: str, target: str, draft: str, num_devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(machine, monkeypatch)
    found = plan(saved(target, tmp_path), saved(draft, tmp_path))
    assert len(found.target.lane.devices) == num_devices
    memory = {device.name: device.memory for device in found.devices}
    for device in found.devices:
        shares = [each for part in (found.target, found.draft) for each in part.lane.shares if each[0] == device.name]
        assert sum(share.total for share in shares) <= memory[device.name]
    asked: dict[str, Any] = {}

    def from_pretrained(source: str, **options: Any) -> torch.nn.Module:
        asked[source] = options["device_map"]
        return torch.nn.Module()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    found.load()
    for part in (found.target, found.draft):
        assert_lies_as_printed(part, asked[str(part.source)])


def assert_lies_as_printed(part: PlannedModel, device_map: dict[str, Any]) -> None:
    """Fail unless a device map puts all of a model where its plan prints it, and as many bytes."""
    assert isinstance(device_map, dict), "accelerate would divide it as it likes"
    model = unloaded("model", str(part.source), None).model
    check_device_map(model, device_map)
    on: dict[str, int] = {}
    seen: set[int] = set()
    for name, device in device_map.items():
        for parameter in model.get_submodule(name).parameters():
            key = f"cuda:{device}" if isinstance(device, int) else device
            on[key] = on.get(key, 0) + (parameter.nbytes if id(parameter) not in seen else 0)
            seen.add(id(parameter))
    assert on == {share.device: share.weights for share in part.lane.shares}


@pytest.mark.parametrize("name", ["qwen 32B", "llama 70B", "qwen 14B"])
def test_what_fits_is_moved_though_accelerate_would_offload_a_part(name: str, tmp_path: Path) -> None:
    """It keeps room on the first device for the largest part, the head."""
    model = unloaded("model", saved(name, tmp_path), None).model
    lane = Footprint.of(model)
    devices = torch.device("cuda", 0), torch.device("cuda", 1)
    free = [lane.weights // 2 + lane.parts[-1].weights // 2] * 2
    not_split = modules_not_to_split(model)
    balanced = get_balanced_memory(model, dict(enumerate(free)), no_split_module_classes=not_split)
    offloaded = infer_auto_device_map(model, balanced, no_split_module_classes=not_split)
    assert "disk" in offloaded.values(), "the case is not one"
    where = layers_to_devices(model, devices, free)
    check_device_map(model, where)
    for device, most in enumerate(free):
        modules = [model.get_submodule(each) for each, place in where.items() if place == device]
        assert 0 < sum(each.nbytes for module in modules for each in module.parameters()) <= most
    assert set(where.values()) == {0, 1}


def test_tied_modules_and_layers_stay_together(tmp_path: Path) -> None:
    found = plan(saved("gemma 27B", tmp_path), saved("gemma 2B", tmp_path), devices="2x32GiB,1x12GiB")
    where = found.target.device_map
    assert where["lm_head"] == where["model.embed_tokens"] == 0 and where["model.norm"] == 1
    layers = [where[f"model.layers.{layer}"] for layer in range(46)]
    assert layers == sorted(layers) and len(where) == 46 + 4


def test_a_quantised_checkpoint_is_divided_by_what_its_files_hold(tmp_path: Path) -> None:
    model = unloaded("model", saved("qwen 32B", tmp_path), None).model
    whole = Footprint.of(model)
    found = Footprint.of(model, 18 * GIB)
    kept = [part for part in whole.parts if not part.num_layers]
    assert [part for part in found.parts if not part.num_layers] == kept, "embeddings are not quantised"
    assert found.weights == sum(part.weights for part in found.parts) == 18 * GIB
    layers = {part.weights for part in found.parts if part.num_layers}
    assert max(layers) - min(layers) <= 1


@pytest.mark.parametrize("machine", ["cpu 8GiB", "1x8GiB"])
def test_tokens_that_a_plan_gives_can_be_asked_for_and_no_more(machine: str) -> None:
    given: tuple[Any, ...] = (DEMO / "target", DEMO / "draft", machine)
    most = plan(*given).num_tokens
    assert plan(*given, num_tokens=most).num_tokens == most
    with pytest.raises(ValueError, match=f"do not hold the pair: .* caches of {most + 1} tokens"):
        plan(*given, num_tokens=most + 1)


def test_why_a_cpu_does_not_hold_what_its_memory_would() -> None:
    with pytest.raises(ValueError, match=r"cpu with 8\.0 GiB, of which caches take at most 25%\. Take"):
        plan(DEMO / "target", DEMO / "draft", devices="cpu 8GiB", num_tokens=600_000)


@pytest.mark.parametrize("is_same", [True, False], ids=["one model", "one model's embeddings"])
def test_shared_weights_are_planned_once_and_in_one_place(is_same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft, _ = load_demo_pair("cpu", torch.bfloat16)
    draft.set_input_embeddings(target.get_input_embeddings())
    draft.set_output_embeddings(target.get_output_embeddings())
    draft = target if is_same else draft
    found = plan(target, draft, devices="2x8GiB")
    monkeypatch.setattr(placement, "present", lambda name, devices: devices)
    there = (torch.device("cuda:0"),)
    moves = placement.wanted_moves(target, draft, found.config)
    assert [(move.model, move.devices) for move in moves] == [(target, there), (draft, there)][: 1 if is_same else 2]
    unique = {id(each): each.nbytes for model in (target, draft) for each in model.parameters()}
    assert sum(found.target.lane.shares[0][1:2] + found.draft.lane.shares[0][1:2]) == sum(unique.values())
    assert found.draft.footprint.weights == sum(each.nbytes for each in draft.parameters()), "its own size is said"
    pretend("2x8GiB", monkeypatch)
    here = plan(target, draft)
    assert here.target.lane.devices == here.draft.lane.devices == ("cpu",), "nothing moves what lies together"
    assert placement.wanted_moves(target, draft, here.config) == []


def test_a_loaded_draft_goes_where_auto_moves_it_beside_a_target_to_be_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, draft, _ = load_demo_pair("cpu", torch.bfloat16)
    pretend("2x8GiB", monkeypatch)
    found = plan(DEMO / "target", draft)
    assert (found.target.lane.devices, found.draft.lane.devices) == (("cuda:0",), ("cuda:1",))
    moved = placement.automatic_devices(parse_topology("2x8GiB"), target, draft, (torch.device("cuda:0"),))
    assert moved == (torch.device("cuda:1"),) and [device.name for device in found.devices] == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(placement, "why_fixed", lambda model: "is offloaded")
    fixed = plan(DEMO / "target", draft)
    assert (fixed.target.lane.devices, fixed.draft.lane.devices) == (("cuda:0",), ("cpu",))
    assert "The draft goes to cpu: where it lies" in str(fixed)


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose linear layers torch has quantised to 8 bits."""
    changed: PreTrainedModel = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8
    )
    return changed


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_a_model_that_torch_has_quantised_is_taken_for_one(seed: int) -> None:
    model = tiny_model("llama", seed, dtype=torch.float32)
    changed = quantised(model)
    assert models.is_quantised(changed) and not models.is_quantised(model)
    assert placement.why_fixed(changed) == can_ship(changed).removeprefix("it ") == "is quantised"  # type: ignore[union-attr]
    found, before = Footprint.of(changed), Footprint.of(model)
    linear = sum(each.weight.nbytes for each in model.modules() if isinstance(each, torch.nn.Linear))
    assert found.weights == pytest.approx(before.weights - linear * 3 // 4, rel=0.01), "scales come on top"
    assert [part.names for part in found.parts] == [part.names for part in before.parts]
    assert before.read > found.read == found.weights - model.get_input_embeddings().weight.nbytes
    model.register_buffer("packed", torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8))
    assert models.is_quantised(model)


def test_one_core_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "available_cores", lambda: [3])
    monkeypatch.setattr(report, "cores_for_worker", lambda num_threads: [])
    pretend("cpu 8GiB", monkeypatch)
    text = str(plan(DEMO / "target", DEMO / "draft"))
    assert "The draft goes to cpu: the only device: it has one core, on which target and draft take turns." in text
    assert "of its own" not in text and "Cores of" not in text
    assert "a core of its own" in str(plan(DEMO / "target", DEMO / "draft", devices="cpu 8GiB"))


@pytest.mark.parametrize(
    ("machine", "is_better"),
    [
        pytest.param("3x80GiB@3TB/s", True, id="three equal ones"),
        pytest.param("2x80GiB@3TB/s,1x80GiB@0.5TB/s", False, id="the slowest rank holds up the others"),
    ],
)
def test_ranks_are_only_planned_where_layers_are_slower(machine: str, is_better: bool, tmp_path: Path) -> None:
    found = plan(saved("qwen 14B", tmp_path), saved("qwen 0.6B", tmp_path), devices=machine)
    assert (found.tensor_parallel is not None) == is_better and ("launch" in str(found)) == is_better


def test_a_rank_more_brings_more_than_a_hundredth(tmp_path: Path) -> None:
    folders = [saved(name, tmp_path) for name in ("qwen 14B", "qwen 0.6B")]
    prints = [Footprint.of(unloaded("model", folder, None).model) for folder in folders]
    devices = parse_topology("40x80GiB@3.35TB/s")
    found = tensor_parallel_split(devices, prints[0], prints[1], 8192)
    assert found is not None
    fewer = tensor_parallel_split(devices[: found.target_tp + found.draft_tp - 1], prints[0], prints[1], 8192)
    assert fewer is not None and 1.01 * fewer.tokens_per_second < found.tokens_per_second


def test_a_model_without_weights_is_only_planned_for_a_machine_that_is_named(seed: int) -> None:
    model = tiny_model("llama", seed)
    empty = copy.deepcopy(model).to("meta")
    for name, pair in (("target", (empty, model)), ("draft", (model, empty))):
        with pytest.raises(ValueError, match=rf"`{name}` \(LlamaForCausalLM\) has no weights: .*`devices`"):
            plan(*pair)
        assert plan(*pair, devices="2x8GiB").config == PearlConfig(target_devices=["cuda:0"], draft_devices=["cuda:1"])


def test_few_bytes_are_said_in_bytes(seed: int) -> None:
    model = tiny_model("llama", seed, dtype=torch.bfloat16)
    assert ", 128 bytes of cache a token" in str(plan(model, model, devices="cpu 8GiB"))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-m", "hf_pearl", "plan"], id="plan"),
        pytest.param(["-u", "-m", "hf_pearl", "plan"], id="plan, unbuffered"),
        pytest.param(["-m", "hf_pearl", "--help"], id="help"),
    ],
)
def test_a_command_ends_quietly_where_nobody_reads_its_output(arguments: list[str]) -> None:
    command = [sys.executable, *arguments]
    environment = {"PYTHONPATH": str(Path(hf_pearl.__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert (process.wait(300), errors) == (141, "")


def test_the_error_of_another_pipe_is_not_taken_for_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(hf_pearl.__main__, "main", fail)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        hf_pearl.__main__.main_of_process()
