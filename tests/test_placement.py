"""Models that accelerate has dispatched, and where the models of a pair are moved to."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from models import (
    assert_equal,
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    expected_warnings,
    make_draft,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import backend_registration
from transformers import PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig, registry
from hf_pearl.decoding.processors import copies_on
from hf_pearl.device_arguments import named_devices
from hf_pearl.fingerprint import fingerprint
from hf_pearl.model_devices import devices_of, input_device, is_offloaded, layer_devices
from hf_pearl.parallel import placement
from hf_pearl.parallel.placement import automatic_devices, layers_to_devices, why_fixed
from hf_pearl.planning.topology import Device

GIB = 2**30
CPU = torch.device("cpu")
# Whether waiting for a draft pays whose weights are loaded for every step is a matter of time: lengths are fixed.
IN_THREADS, IN_TURNS = (PearlConfig(draft_length=3, execution=execution) for execution in ("threads", "inline"))
PARTS = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def dispatched(model: PreTrainedModel, how: str, folder: Path) -> PreTrainedModel:
    """A copy of a model of 3 layers, of which some or all weights are loaded for their forward only."""
    model = copy.deepcopy(model)
    if how == "offloaded to memory":
        return cpu_offload(model, CPU)
    layers = {f"model.layers.{layer}": ("cpu", "disk")[layer % 2] for layer in range(3)}
    return dispatch_model(model, {**PARTS, **layers}, offload_dir=folder)


@pytest.mark.parametrize("who", ["target", "draft", "both"])
@pytest.mark.parametrize("how", ["CPU and disk", "offloaded to memory"])
@pytest.mark.parametrize("config", [IN_THREADS, IN_TURNS], ids=["threads", "inline"])
def test_a_dispatched_model_gives_the_same_tokens(
    who: str, how: str, config: PearlConfig, tmp_path: Path, seed: int
) -> None:
    target = tiny_model("llama", seed, num_hidden_layers=3)
    draft = noisy_copy(target, 0.05, seed + 1)
    inputs = random_prompts(random.Random(seed), 3, (3, 7, 30))
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=24)
    assert_varied(expected[:, inputs["input_ids"].shape[1] :])
    ours = dispatched(target, how, tmp_path / "target") if who != "draft" else target
    helper = dispatched(draft, how, tmp_path / "draft") if who != "target" else draft
    assert is_offloaded(ours) == (who != "draft") and is_offloaded(helper) == (who != "target")
    for _ in range(2):
        output = ours.generate(
            **inputs, do_sample=False, max_new_tokens=24, assistant_model=helper, pearl=config,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert output.sequences.tolist() == expected.tolist()
        assert 0 < output.pearl.accepted_tokens < output.pearl.verified_draft_tokens
    assert output.pearl.prefilled_tokens == 3, "the prompts' keys and values were not found again"
    assert_nothing_held(ours, helper)
    assert why_fixed(ours if who != "draft" else helper) == "is offloaded"
    hf_pearl.release(ours)
    assert is_offloaded(ours) == (who != "draft"), "it was left as it was"


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "mistral"])
def test_other_architectures_dispatched(architecture: str, seed: int) -> None:
    target = tiny_model(architecture, seed, tie_word_embeddings=architecture != "mistral")
    draft = make_draft(target, "noisy", seed + 1)
    inputs = random_prompts(random.Random(seed), 2, (5, 40))  # beyond mistral's window
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=20)
    cpu_offload(target, CPU)
    output = target.generate(
        **inputs, do_sample=False, max_new_tokens=20, assistant_model=draft, pearl=PearlConfig(execution="inline")
    )
    assert output.tolist() == expected.tolist()


def test_one_offloaded_model_as_target_and_draft_runs_in_one_thread(seed: int) -> None:
    model = tiny_model("llama", seed)
    prompt = random_prompts(random.Random(seed), 1, (6,))
    expected = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    cpu_offload(model, CPU)
    arguments: dict[str, Any] = {**prompt, "do_sample": False, "max_new_tokens": 16, "assistant_model": model}
    output = model.generate(**arguments, pearl=PearlConfig(draft_length=3), return_dict_in_generate=True)
    assert (output.sequences.tolist(), output.pearl.execution) == (expected.tolist(), "inline")
    with pytest.raises(ValueError, match=r'execution="threads".*shares modules.*Use `execution="inline"`'):
        model.generate(**arguments, pearl=PearlConfig(draft_length=3, execution="threads"))
    with pytest.raises(ValueError, match=r'execution="processes".*hook of accelerate'):
        model.generate(**arguments, pearl=PearlConfig(draft_length=3, execution="processes"))


def test_a_change_of_offloaded_weights_is_seen(seed: int) -> None:
    model = cpu_offload(tiny_model("llama", seed), CPU)
    before = fingerprint(model)
    model(torch.tensor([[1, 2, 3]]))
    assert fingerprint(model) == before, "a forward changes nothing"
    weights = model.lm_head._hf_hook.weights_map
    weights["weight"].mul_(2.0)
    assert fingerprint(model) != before


def test_a_model_may_be_offloaded_and_loaded_again_between_calls(seed: int) -> None:
    target = tiny_model("llama", seed)
    inputs = random_prompts(random.Random(seed), 1, (9,))
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=8)
    for change in (lambda: None, lambda: cpu_offload(target, CPU), lambda: remove_hook_from_submodules(target)):
        change()
        output = target.generate(**inputs, do_sample=False, max_new_tokens=8, pearl=True)
        assert output.tolist() == expected.tolist()


def test_nothing_is_moved_on_a_cpu(seed: int) -> None:
    target, draft = tiny_model("llama", seed), tiny_model("llama", seed + 1, num_hidden_layers=1)
    before = [parameter.data_ptr() for model in (target, draft) for parameter in model.parameters()]
    for config in (IN_TURNS, PearlConfig(execution="inline", target_devices="cpu", draft_devices=["cpu"])):
        assert placement.wanted_moves(target, draft, config) == []
        assert_equal(target, draft, random_prompts(random.Random(seed), 1, (5,)), config, max_new_tokens=8)
    assert [parameter.data_ptr() for model in (target, draft) for parameter in model.parameters()] == before
    assert target not in placement._placed and draft not in placement._placed


def test_processors_follow_the_draft_to_its_device(seed: int) -> None:
    from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor, SuppressTokensLogitsProcessor

    processors = LogitsProcessorList([NoBadWordsLogitsProcessor([[5], [6, 7]]), SuppressTokensLogitsProcessor([3])])
    processors(torch.tensor([[1, 2]]), torch.zeros(1, 8))  # It makes its tensors now.
    copies = copies_on(torch.device("meta"), processors)
    assert copies[1].suppress_tokens.device.type == "meta" and processors[1].suppress_tokens.device.type == "cpu"
    assert copies[0].length_1_bias.device.type == "meta" and processors[0].length_1_bias.device.type == "cpu"


# Two devices, and moving.


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong in every check of `pretend_devices.py`; nothing, if all is well."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this version of torch knows no devices that are written in Python")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run(
        [sys.executable, str(TESTS / "pretend_devices.py")],
        capture_output=True,
        text=True,
        timeout=540,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "check",
    [
        "same tokens, llama",
        "same tokens, gpt2",
        "sampled tokens",
        "copies to the host",
        "copies to the host of other calls",
        "a failed move",
        "moved by its user",
        "a plan",
        "a plan's load",
        "shared weights",
        "sums of ranks",
    ],
)
def test_on_two_pretended_devices(check: str, pretended: dict[str, str]) -> None:
    """What the checks promise is said in `pretend_devices.py`."""
    assert not pretended[check], pretended[check][-1500:]


def test_layers_are_spread_evenly_and_not_divided(seed: int) -> None:
    model = tiny_model("llama", seed, num_hidden_layers=8)
    devices = tuple(torch.device("cuda", index) for index in (3, 1))  # in the order that the user gave
    found = layers_to_devices(model, devices, [GIB, GIB])
    layers = [found[f"model.layers.{index}"] for index in range(8)]
    assert layers == sorted(layers, reverse=True) and 3 <= layers.count(3) <= 5 and set(layers) == {3, 1}
    assert found["model.embed_tokens"] == 3 and found["lm_head"] == 1


def test_a_model_that_its_devices_do_not_hold_is_refused(seed: int) -> None:
    model = tiny_model("llama", seed, num_hidden_layers=8)
    devices = tuple(torch.device("cuda", index) for index in range(2))
    with pytest.raises(ValueError, match=r"cuda:0 \(20 KiB free\), cuda:1 .* do not hold this LlamaForCausalLM"):
        layers_to_devices(model, devices, [20 * 2**10, 20 * 2**10])


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        pytest.param([2, 20, 40], "cuda:1", id="the first with room"),
        pytest.param([2, 0.001, 40], "cuda:2", id="not one without"),
        pytest.param([20, 0.001, 0.001], "cuda:0", id="beside its target where no other has room"),
        pytest.param([0.001, 0.001, 0.001], None, id="nowhere"),
    ],
)
def test_auto_moves_a_draft_to_a_gpu_of_its_own(free: list[float], expected: str | None, seed: int) -> None:
    target, draft = tiny_model("llama", seed), tiny_model("llama", seed + 1, num_hidden_layers=1)
    devices = tuple(Device(f"cuda:{index}", int(size * GIB)) for index, size in enumerate(free))
    found = automatic_devices(devices, target, draft, (torch.device("cuda", 0),))
    assert found == (None if expected is None else (torch.device(expected),))


def test_auto_moves_a_draft_beside_a_target_that_is_partly_offloaded(seed: int) -> None:
    target, draft = tiny_model("llama", seed), tiny_model("llama", seed + 1, num_hidden_layers=1)
    devices = tuple(Device(f"cuda:{index}", 20 * GIB) for index in range(2))
    assert automatic_devices(devices, target, draft, (torch.device("cuda", 0), CPU)) == (torch.device("cuda", 1),)


# Refusals.


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A mesh without a process group."""
    ranks = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return DeviceMesh("cpu", ranks, mesh_dim_names=names, _init_backend=False, _rank=0)


@pytest.mark.parametrize("name", ["target_devices", "draft_devices"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        pytest.param(
            "gpu:0", ValueError, r"names no device that torch knows, got 'gpu:0'.*Give \"auto\"", id="unknown"
        ),
        pytest.param([], ValueError, r"at least one device, got \[\].*Give \"auto\"", id="empty"),
        pytest.param(["cuda:0", "cuda:0"], ValueError, r"cuda:0 more than once.*every device once", id="twice"),
        pytest.param(["cuda:0", "cpu"], ValueError, r"devices of one kind, got .*device_map=\"auto\"", id="two kinds"),
        pytest.param("meta", ValueError, r"devices that compute, got 'meta'", id="meta"),
        pytest.param(0, TypeError, r"must name devices, got 0", id="a number"),
        pytest.param(["cuda:0", None], TypeError, r"must name devices, got None", id="None"),
        pytest.param(mesh(2, 2), ValueError, r"one dimension, got one of 2 .*\(2, 2\).*one of its axes", id="a plane"),
        pytest.param(mesh(2, 2, names=("a", "tp")), ValueError, r'such as mesh\["tp"\]', id="a named plane"),
    ],
)
def test_what_names_no_devices_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"`{name}` .*{message}"):
        PearlConfig(**{name: value})


def test_devices_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match=r"share cuda:1, and the draft has others, too\. Give it those alone"):
        PearlConfig(target_devices=["cuda:0", "cuda:1"], draft_devices=["cuda:1", "cuda:2"])
    PearlConfig(target_devices=["cuda:0", "cuda:1"], draft_devices="cuda:1")
    PearlConfig(target_devices="cuda:0", draft_devices=["cuda:0"])


def test_a_mesh_names_the_devices_of_its_ranks() -> None:
    assert named_devices("target_devices", mesh(4)) == (CPU,)
    assert named_devices("target_devices", "auto") is None
    assert named_devices("target_devices", torch.device("cuda:1")) == (torch.device("cuda:1"),)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
@pytest.mark.parametrize("name", ["target_devices", "draft_devices"])
def test_a_device_that_is_not_there_is_refused(name: str, seed: int) -> None:
    target, draft = tiny_model("llama", seed), tiny_model("llama", seed + 1)
    with pytest.raises(
        ValueError, match=rf"`{name}` asks for cuda:1, and this machine has no device of the kind 'cuda'"
    ):
        target.generate(torch.tensor([[1]]), assistant_model=draft, pearl=PearlConfig(**{name: ["cuda:1"]}))
    assert_equal(target, draft, random_prompts(random.Random(seed), 1, (5,)), max_new_tokens=4)


def test_a_model_that_must_not_be_moved_is_left_and_an_order_to_is_refused(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "present", lambda name, devices: devices)
    target = cpu_offload(tiny_model("llama", seed), CPU)
    quantised = tiny_model("llama", seed + 1)
    quantised.config.quantization_config = {"quant_method": "fp8"}
    assert (why_fixed(target), why_fixed(quantised)) == ("is offloaded", "is quantised")
    for name in ("target_devices", "draft_devices"):
        pair = (target, quantised) if name == "target_devices" else (quantised, target)
        with pytest.raises(
            ValueError, match=rf"`{name}` asks for cuda:0, but .* is offloaded and stays on cpu\. Load it"
        ):
            placement.wanted_moves(*pair, PearlConfig(**{name: "cuda:0"}))


def test_of_two_first_calls_of_a_pair_one_moves_its_draft(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other waits, and finds it moved."""
    target, draft = tiny_model("llama", seed), tiny_model("llama", seed + 1)
    start, moved = threading.Barrier(2, timeout=60.0), []

    def wanted_moves(*args: Any) -> list[placement.Move]:
        start.wait()
        return [placement.Move(draft, (CPU,), "a test asks for it")]

    def move(model: PreTrainedModel, devices: Any) -> None:
        time.sleep(0.2)
        moved.append(model)

    monkeypatch.setattr(registry, "wanted_moves", wanted_moves)
    monkeypatch.setattr(registry, "lies_on", lambda model, devices: bool(moved))
    monkeypatch.setattr(registry, "move", move)
    threads = [threading.Thread(target=registry.place, args=(target, draft, PearlConfig())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert moved == [draft]


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_device_without_room_ends_a_call_only_if_it_was_asked_for(
    is_asked: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was free when "auto" looked may be taken when it moves."""
    target, draft = tiny_model("llama", seed), tiny_model("llama", seed + 1)

    def move(model: PreTrainedModel, devices: Any) -> None:
        raise torch.OutOfMemoryError("out of memory on cuda:1\nmore of it")

    moves = [placement.Move(draft, (CPU,), "a test asks for it", is_asked)]
    monkeypatch.setattr(registry, "wanted_moves", lambda *args: moves)
    monkeypatch.setattr(registry, "lies_on", lambda model, devices: False)
    monkeypatch.setattr(registry, "move", move)
    with pytest.raises(torch.OutOfMemoryError) if is_asked else expected_warnings() as said:
        registry.place(target, draft, PearlConfig())
    assert is_asked or said == ["LlamaForCausalLM stays where it is: out of memory on cuda:1"]


@pytest.mark.parametrize("which", ["target", "assistant_model"])
def test_a_model_without_weights_is_refused_by_name(which: str, seed: int) -> None:
    target = tiny_model("llama", seed)
    empty = copy.deepcopy(target).to("meta")
    pair = (empty, target) if which == "target" else (target, empty)
    with pytest.raises(ValueError, match=f"{which}.* has no weights: they lie on the meta device.*from_pretrained"):
        pair[0].generate(torch.tensor([[5, 6]]), assistant_model=pair[1], pearl=True, max_new_tokens=3)


def test_where_a_dispatched_model_computes(tmp_path: Path, seed: int) -> None:
    model = tiny_model("llama", seed, num_hidden_layers=3)
    assert (input_device(model), layer_devices(model), devices_of(model)) == (CPU, [CPU] * 3, [CPU])
    there = dispatched(model, "CPU and disk", tmp_path)
    assert there.device.type == "meta"
    assert (input_device(there), layer_devices(there), devices_of(there)) == (CPU, [CPU] * 3, [CPU])
