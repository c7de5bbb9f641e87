"""`hf_pearl.plan`: which devices a pair gets, on machines that are described."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import command_in_process, enabled_for_tiny_models, tiny_model
from transformers import GPT2Config, GPTBigCodeConfig, GPTBigCodeForCausalLM, LlamaConfig, MixtralConfig, T5Config

import hf_pearl
from hf_pearl import PearlConfig, load_demo_pair
from hf_pearl.__main__ import main
from hf_pearl.pair import demo_pair_folder
from hf_pearl.parallel.cores import available_cores
from hf_pearl.planning.footprint import Footprint
from hf_pearl.planning.parts import Part
from hf_pearl.planning.plan import Plan, plan
from hf_pearl.planning.planner import split
from hf_pearl.planning.tensor_parallel_split import tensor_parallel_split
from hf_pearl.planning.topology import Device, parse_topology, present_devices
from hf_pearl.planning.unloaded import unloaded

GIB = 2**30
DEMO = demo_pair_folder()


def footprint(billions: float, num_layers: int = 32) -> Footprint:
    """Roughly that of a model of so many parameters in bfloat16, with 8 heads of keys and values."""
    parts = tuple(Part((f"layers.{layer}",), int(billions * 2e9) // num_layers, 1) for layer in range(num_layers))
    weights = sum(part.weights for part in parts)
    return Footprint(weights, weights, num_layers * 4096, GIB // 2, GIB // 16, num_layers, 8, parts)


BIG, MEDIUM, SMALL, TINY = footprint(70, 80), footprint(8), footprint(0.6, 28), footprint(0.3, 14)


@pytest.mark.parametrize(
    ("machine", "pair", "target_on", "draft_on"),
    [
        pytest.param("2x80GiB", (MEDIUM, SMALL), [0], [1], id="two GPUs: one each"),
        pytest.param("1x80GiB", (MEDIUM, SMALL), [0], [0], id="one GPU: both on it"),
        pytest.param("8x80GiB", (MEDIUM, SMALL), [0], [1], id="eight: no more than they need"),
        pytest.param("8x80GiB", (BIG, MEDIUM), [0, 1], [2], id="eight: two hold the target"),
        pytest.param("8x24GiB", (BIG, MEDIUM), [0, 1, 2, 3, 4, 5], [6], id="eight: six and one"),
        pytest.param("8x19GiB", (BIG, TINY), [0, 1, 2, 3, 4, 5, 6, 7], [0], id="eight: the target needs all"),
        pytest.param("8x24GiB", (footprint(30), footprint(20)), [0, 1, 2], [3, 4], id="eight: three and two"),
        pytest.param("7x24GiB@1TB/s,1x80GiB@3TB/s", (MEDIUM, SMALL), [7], [0], id="the target takes the fastest"),
        pytest.param("1x24GiB,1x80GiB", (footprint(30), SMALL), [1], [0], id="the target takes the one that holds it"),
        pytest.param("1x16GiB,1x80GiB", (footprint(30), MEDIUM), [1], [1], id="the other has no room for the draft"),
    ],
)
def test_the_devices_of_both_lanes(
    machine: str, pair: tuple[Footprint, Footprint], target_on: list[int], draft_on: list[int]
) -> None:
    devices = parse_topology(machine)
    found = split(devices, *pair, min_tokens=8192)
    assert found.target.devices == tuple(f"cuda:{index}" for index in target_on)
    assert found.draft.devices == tuple(f"cuda:{index}" for index in draft_on)
    for device in devices:
        taken = [
            each.total for lane in (found.target, found.draft) for each in lane.shares if each.device == device.name
        ]
        assert sum(taken) <= device.memory
    assert found.num_tokens >= 8192
    assert sum(share.weights for share in found.target.shares) == pytest.approx(pair[0].weights, abs=8)


def test_on_a_cpu_both_share_the_memory() -> None:
    found = split(parse_topology("cpu 64GiB"), MEDIUM, SMALL, 8192)
    assert found.target.devices == found.draft.devices == ("cpu",)
    cache = sum(lane.shares[0].cache for lane in (found.target, found.draft))
    assert 0.9 * 16 * GIB < cache <= 16 * GIB, "a quarter of the memory, as the engine takes it"
    assert found.target.shares[0].graphs == 0


def test_lanes_that_are_placed_already_stay() -> None:
    devices = parse_topology("4x80GiB")
    found = split(devices, MEDIUM, SMALL, 8192, target_on=["cuda:2"])
    assert (found.target.devices, found.draft.devices) == (("cuda:2",), ("cuda:0",))
    found = split(devices, MEDIUM, SMALL, 8192, target_on=["cuda:2"], draft_on=["cuda:2"])
    assert found.draft.devices == ("cuda:2",)


def test_models_that_share_weights_get_the_same_devices() -> None:
    for machine, pair, on in (
        ("2x80GiB", (MEDIUM, SMALL), [0]),
        ("2x16GiB,1x24GiB", (footprint(6), footprint(3)), [2]),
        ("3x24GiB", (footprint(20), footprint(3)), [0, 1]),
    ):
        found = split(parse_topology(machine), *pair, 8192, shares_weights=True)
        assert found.target.devices == found.draft.devices == tuple(f"cuda:{index}" for index in on)
        assert "whose weights it shares" in found.draft.why


def test_a_target_is_planned_beside_a_draft_that_stays() -> None:
    devices = parse_topology("2x80GiB")
    assert split(devices, MEDIUM, SMALL, 8192, draft_on=["cuda:0"]).target.devices == ("cuda:1",)
    with pytest.raises(ValueError, match="do not hold the pair"):
        split(parse_topology("1x16GiB"), footprint(6), footprint(3), 8192, draft_on=["cuda:0"])


def test_devices_that_do_not_hold_the_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"do not hold the pair: weights of 130\.4 GiB .*cuda:1 with 24\.0 GiB\. Take"):
        split(parse_topology("2x24GiB"), BIG, MEDIUM, 8192)
    with pytest.raises(ValueError, match="caches of 4000000 tokens"):
        split(parse_topology("2x80GiB"), MEDIUM, SMALL, 4_000_000)


@pytest.mark.parametrize(
    ("machine", "pair", "sizes"),
    [
        pytest.param("8x80GiB@3.35TB/s", (BIG, MEDIUM), (5, 3), id="70B and 8B"),
        pytest.param("8x80GiB@3.35TB/s", (BIG, SMALL), (7, 1), id="70B and 0.6B"),
        pytest.param("8x22GiB@1TB/s", (BIG, MEDIUM), (7, 1), id="where six do not hold the target"),
        pytest.param("2x80GiB", (MEDIUM, SMALL), (1, 1), id="two devices"),
    ],
)
def test_the_tensor_parallel_split_balances(
    machine: str, pair: tuple[Footprint, Footprint], sizes: tuple[int, int]
) -> None:
    found = tensor_parallel_split(parse_topology(machine), *pair, 8192)
    assert found is not None and (found.target_tp, found.draft_tp) == sizes
    assert found.num_tokens >= 8192


def test_a_faster_draft_needs_fewer_devices_and_a_better_one_is_worth_more() -> None:
    devices = parse_topology("8x80GiB@3.35TB/s")
    sizes = [
        tensor_parallel_split(devices, BIG, MEDIUM, 8192, acceptance, seconds).draft_tp  # type: ignore[union-attr]
        for acceptance, seconds in ((0.5, None), (0.8, None), (0.95, None), (0.8, (42e-3, 0.5e-3)))
    ]
    assert sizes == [*sorted(sizes[:3]), 1] and sizes[0] < sizes[2]


def test_nothing_holds_what_is_too_large() -> None:
    assert tensor_parallel_split(parse_topology("4x24GiB"), BIG, MEDIUM, 8192) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x80GiB", [(f"cuda:{index}", 80 * GIB, None) for index in range(8)]),
        (
            "2 x 24 GiB, 80GB@3.35TB/s",
            [("cuda:0", 24 * GIB, None), ("cuda:1", 24 * GIB, None), ("cuda:2", 80 * 10**9, 3.35e12)],
        ),
        ("CPU 64GiB", [("cpu", 64 * GIB, None)]),
    ],
)
def test_machines_are_described_in_words(text: str, expected: list[tuple[str, int, float | None]]) -> None:
    assert parse_topology(text) == tuple(Device(*each) for each in expected)


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "0x80GiB", "8x80", "x80GiB", "8x80GiB,", "cpu 2x8GiB", "8x80GiB@3", "eight", f"{9**999}GB"]
)
def test_what_describes_no_machine_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'`devices` must be described as in "8x80GiB".*got'):
        parse_topology(text)


def test_a_footprint_is_that_of_the_model(seed: int) -> None:
    model = tiny_model("llama", seed, dtype=torch.bfloat16)
    found = Footprint.of(model)
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert found.read == found.weights - model.get_input_embeddings().weight.nbytes
    assert found.cache_per_token == 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, their size, bytes
    tied = tiny_model("llama", seed, dtype=torch.bfloat16, tie_word_embeddings=True)
    tied.tie_weights()
    assert Footprint.of(tied).weights == Footprint.of(tied).read < found.weights


def test_heads_that_share_one_key_are_counted_as_one() -> None:
    config = GPTBigCodeConfig(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    found = Footprint.of(GPTBigCodeForCausalLM(config))
    assert found.num_kv_heads == 1
    assert found.cache_per_token == 2 * 2 * 8 * 4  # keys and values, layers, the head's size, bytes


def test_a_forward_reads_the_experts_that_it_is_sent_to(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    found = plan(tmp_path, tmp_path, devices="2x1GiB", dtype=torch.float32).target.footprint
    assert 0.25 < found.read / found.weights < 0.35


def test_sizes_are_known_before_anything_is_loaded() -> None:
    target, draft, _ = load_demo_pair("cpu", torch.bfloat16)
    named = plan(DEMO / "target", DEMO / "draft", devices="8x80GiB")
    loaded = plan(target, draft, devices="8x80GiB")
    assert named.target.footprint == loaded.target.footprint and named.draft.footprint == loaded.draft.footprint
    assert (named.target.lane, named.draft.lane) == (loaded.target.lane, loaded.draft.lane)
    assert named.config == PearlConfig(target_devices=["cuda:0"], draft_devices=["cuda:1"])


def test_models_of_real_sizes(tmp_path: Path) -> None:
    shapes = {"70B": (8192, 28672, 80, 64), "8B": (4096, 14336, 32, 32)}
    for name, (hidden, inner, layers, heads) in shapes.items():
        LlamaConfig(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16",
        ).save_pretrained(tmp_path / name)  # fmt: skip
    found = plan(tmp_path / "70B", tmp_path / "8B", devices="8x80GiB@3.35TB/s")
    assert found.target.footprint.weights == 2 * 70_553_706_496
    assert found.draft.footprint.weights == 2 * 8_030_261_248
    assert found.target.footprint.cache_per_token == 2 * 80 * 8 * 128 * 2
    assert (found.target.lane.devices, found.draft.lane.devices) == (("cuda:0", "cuda:1"), ("cuda:2",))
    assert found.tensor_parallel is not None
    text = str(found)
    for part in (
        "131.4 GiB",
        "cuda:1",
        "fewest devices that hold it",
        "Without anything: cuda:3",
        "target_tp=",
        ".load()",
    ):
        assert part in text, text


def printed_code(found: Plan) -> list[str]:
    """The lines of code in a plan's report."""
    return re.findall(r"^    (\S.*)$", str(found), re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA devices")
def test_the_code_that_is_printed_makes_the_same_plan(seed: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "num_tokens": 9000}
    (line,) = printed_code(plan(DEMO / "target", DEMO / "draft", **options))
    again = eval(line.removeprefix("target, draft = ").removesuffix(".load()"))
    assert (again.target.source, again.draft.source) == (str(DEMO / "target"), str(DEMO / "draft"))
    assert again.target.dtype == again.draft.dtype == torch.float64 and again.min_tokens == 9000
    (line,) = printed_code(plan(DEMO / "target", DEMO / "draft"))
    assert "dtype" not in line and "num_tokens" not in line
    with enabled_for_tiny_models():
        target = tiny_model("llama", seed)
        tiny_model("llama", seed + 1, dtype=torch.float32).save_pretrained(tmp_path)
        names: dict[str, Any] = {"hf_pearl": hf_pearl, "torch": torch, "target": target}
        names["inputs"] = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 4}
        exec("\n".join(printed_code(plan(target, tmp_path, **options))), names)
        assert names["draft"].dtype == torch.float64
        hf_pearl.release(target)


@pytest.mark.parametrize("is_named", [True, False])
def test_the_ranks_that_are_printed_are_those_that_torchrun_is_to_start(is_named: bool, tmp_path: Path) -> None:
    for name, layers in (("target", 80), ("draft", 16)):
        LlamaConfig(
            hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
            num_key_value_heads=8, vocab_size=128256, dtype="bfloat16",
        ).save_pretrained(tmp_path / name)  # fmt: skip
    given: list[Any] = [tmp_path / "target", tmp_path / "draft"]
    if not is_named:
        given = [unloaded("target", each, None).model for each in given]
    found = plan(*given, devices="8x80GiB@3.35TB/s")
    assert found.tensor_parallel is not None
    sizes = found.tensor_parallel.target_tp, found.tensor_parallel.draft_tp
    assert f"`torchrun --nproc-per-node {sum(sizes)} script.py`" in str(found)
    calls: list[Any] = []

    def launch(*args: Any, **kwargs: Any) -> None:
        calls.append(inspect.signature(hf_pearl.launch).bind(*args, **kwargs).arguments)

    stand_in = SimpleNamespace(launch=launch)
    exec(printed_code(found)[-1], {"hf_pearl": stand_in, "torch": torch, "target_folder": "t", "draft_folder": "d"})
    names = tuple(map(str, given)) if is_named else ("t", "d")
    expected = dict(zip(("target", "draft", "target_tp", "draft_tp"), (*names, *sizes), strict=True))
    assert calls == [{**expected, "dtype": torch.bfloat16}]


def test_ranks_are_not_planned_for_models_that_cannot_be_cut(tmp_path: Path) -> None:
    GPT2Config(n_embd=8192, n_layer=40, n_head=64, dtype="bfloat16").save_pretrained(tmp_path / "target")
    GPT2Config(n_embd=4096, n_layer=8, n_head=32, dtype="bfloat16").save_pretrained(tmp_path / "draft")
    found = plan(tmp_path / "target", tmp_path / "draft", devices="8x80GiB@3.35TB/s")
    assert tensor_parallel_split(found.devices, found.target.footprint, found.draft.footprint, 8192) is not None
    assert found.tensor_parallel is None and "launch" not in str(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA devices")
def test_a_plan_for_this_machine_loads_what_it_says(seed: int) -> None:
    found = plan(DEMO / "target", DEMO / "draft", dtype=torch.float32)
    assert [device.name for device in found.devices] == ["cpu"]
    assert ("Cores of the target" in str(found)) == (len(available_cores()) > 1)
    target, draft = found.load()
    expected, _, tokenizer = load_demo_pair("cpu", torch.float32)
    prompt = tokenizer("def main(", return_tensors="pt")
    assert target.dtype == draft.dtype == torch.float32 and not target.training
    assert (
        target.generate(**prompt, max_new_tokens=8).tolist() == expected.generate(**prompt, max_new_tokens=8).tolist()
    )
    with pytest.raises(ValueError, match="loaded already"):
        plan(target, draft).load()
    with pytest.raises(ValueError, match="assumed"):
        plan(DEMO / "target", DEMO / "draft", devices="2x8GiB").load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA devices")
def test_loaded_models_stay_where_they_are(seed: int) -> None:
    target, draft = tiny_model("llama", seed), tiny_model("llama", seed + 1)
    found = plan(target, draft)
    assert (found.target.lane.devices, found.draft.lane.devices) == (("cpu",), ("cpu",))
    assert "where it lies" in str(found) and "pearl=hf_pearl.PearlConfig(target_devices=['cpu']" in str(found)
    (device,) = present_devices(measured=True)
    assert device.bandwidth is not None and device.bandwidth > 1e6


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"target": "no/such-model"},
            ValueError,
            r"`target` must be .* that can be reached, got 'no/such-model': We couldn",
        ),
        ({"draft": 3}, TypeError, "`draft` must be a model of transformers, a folder or a name, got 3"),
        ({"devices": "many"}, ValueError, "`devices` must be described as"),
        ({"devices": [1]}, TypeError, r"`devices` must be a description .*got \[1\]"),
        ({"num_tokens": 0}, ValueError, "`num_tokens` must be between 1 and"),
        ({"num_tokens": 1.5}, TypeError, r"`num_tokens` must be an int, got 1\.5"),
        ({"dtype": "bfloat16"}, TypeError, "`dtype` must be a floating-point dtype"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, r"`dtype` must be .*16 bits or more.*got torch\.float8_e4m3fn"),
        (
            {"devices": "2x80GiB", "measured": "x"},
            TypeError,
            "`measured` must be what `tune` returned, or None, got 'x'",
        ),
        ({"devices": "1x80GiB", "measured": 3}, TypeError, "`measured` must be what `tune` returned, or None, got 3"),
        ({"devices": "9999x1TB"}, ValueError, "`devices` must be 128 at most, got 9999"),
        ({"devices": "100x1TB,29x1TB"}, ValueError, "`devices` must be 128 at most, got 129"),
        ({"devices": "9" * 400 + "x1TB"}, ValueError, "`devices` must be described as"),
        ({"devices": [Device(f"cuda:{index}", 2**40) for index in range(129)]}, ValueError, "128 at most, got 129"),
        ({"devices": "2x0GiB"}, ValueError, r"`devices\[0\]\.memory` must be .*got 0"),
        ({"devices": "2x80GiB@0TB/s"}, ValueError, r"`devices\[0\]\.bandwidth` must be .*got 0\.0"),
        ({"devices": [Device(3, 2**30)]}, TypeError, r"`devices\[0\]\.name` must name devices, got 3"),  # type: ignore[arg-type]
        ({"devices": [Device("gpu0", 2**30)]}, ValueError, r"`devices\[0\]\.name` names no device .*got 'gpu0'"),
        ({"devices": [Device("cuda:0", 2**30), Device("cuda:0", 2**30)]}, ValueError, "names cuda:0 more than once"),
        ({"devices": [Device("cuda:300", 2**30)]}, ValueError, r"`devices\[0\]\.name` must .*got 'cuda:300'.* 127 "),
        (
            {"devices": [Device("cuda", 2**30), Device("cuda:0", 2**30)]},
            ValueError,
            r"`devices\[0\]\.name` must .*got 'cuda'.*Give",
        ),
        ({"devices": [Device("cuda:0", "1GiB")]}, TypeError, r"`devices\[0\]\.memory` must be .*got '1GiB'"),  # type: ignore[arg-type]
        ({"devices": [Device("cuda:0", True)]}, TypeError, r"`devices\[0\]\.memory` must be .*got True"),
        ({"devices": [Device("cuda:0", 8e10)]}, TypeError, r"`devices\[0\]\.memory` must be .*got 80000000000\.0"),  # type: ignore[arg-type]
        ({"devices": [Device("cuda:0", 10**400)]}, ValueError, r"`devices\[0\]\.memory` must be .*got 1000"),
        ({"devices": [Device("cpu", 1, "x")]}, TypeError, r"`devices\[0\]\.bandwidth` must be .*got 'x'"),  # type: ignore[arg-type]
        ({"devices": [Device("cpu", 1, float("nan"))]}, ValueError, r"`devices\[0\]\.bandwidth` must be .*got nan"),
        ({"devices": [Device("cpu", 1, -1)]}, ValueError, r"`devices\[0\]\.bandwidth` must be .*got -1"),
        ({"devices": "1x1MiB"}, ValueError, "do not hold the pair"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(**{"target": DEMO / "target", "draft": DEMO / "draft", **arguments})


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ("null", "TypeError"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": "x"}, "hidden_size.*expected int"),
        ({"vocab_size": -5}, "AssertionError"),
        ({"hidden_act": "none such"}, "KeyError: 'none such'"),
        ({"dtype": "float8"}, "AttributeError"),
        ({"quantization_config": 3}, "AttributeError"),
    ],
)
@pytest.mark.parametrize("act", [plan, hf_pearl.launch], ids=["plan", "launch"])
def test_a_configuration_that_makes_no_model_is_refused_by_name(
    act: Callable[..., Any], odd: Any, message: str, tmp_path: Path
) -> None:
    """Whatever transformers stumbles over."""
    shutil.copytree(DEMO / "target", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(odd if isinstance(odd, str) else json.dumps({**config, **odd}))
    with pytest.raises(ValueError, match=rf"`draft` must be .*odd.*{message}"):
        act(DEMO / "target", tmp_path / "odd")


def test_a_folder_where_weights_belong_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copy(DEMO / "draft" / "config.json", tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"`draft`: .*model\.safetensors is no file of safetensors: .*Put the file"):
        plan(DEMO / "target", tmp_path)


def test_a_file_is_refused_by_name() -> None:
    for source in (DEMO / "draft" / "config.json", str(DEMO / "draft" / "model.safetensors")):
        with pytest.raises(ValueError, match=r"`draft` must be a folder .*got the file '.*'\. Name its folder"):
            plan(DEMO / "target", source)


def test_a_draft_with_another_vocabulary_is_refused(seed: int, tmp_path: Path) -> None:
    target, padded, other = (tiny_model("llama", seed, vocab_size=size) for size in (64, 64 + 1024, 65 + 1024))
    other.save_pretrained(tmp_path)
    assert plan(target, padded).draft.name == "LlamaForCausalLM"
    for draft in (other, tmp_path):
        with pytest.raises(ValueError, match=r"`draft` must have the vocabulary of `target`.*64 .*got .* 1089\. "):
            plan(target, draft)


def test_models_that_pearl_cannot_run_are_refused(tmp_path: Path) -> None:
    T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`draft` must be a causal language model of transformers, got"):
        plan(DEMO / "target", tmp_path, devices="2x8GiB")


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    with command_in_process():
        assert main(["plan", "--devices", "8x80GiB", "--dtype", "float32"]) == 0
        printed = capsys.readouterr().out
        assert printed == f"{plan(DEMO / 'target', DEMO / 'draft', devices='8x80GiB', dtype=torch.float32)}\n"
        assert "cuda:1" in printed and "float32" in printed
        for wrong in (["--devices", "8x80"], ["--target", "no/such-model"], ["--devices", "1x1MiB"]):
            with pytest.raises(SystemExit) as ended:
                main(["plan", *wrong])
            assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_command_takes_no_target_without_a_draft(capsys: pytest.CaptureFixture[str]) -> None:
    with command_in_process(), pytest.raises(SystemExit) as ended:
        main(["plan", "--target", str(DEMO / "target")])
    assert ended.value.code == 2 and "--target needs --draft" in capsys.readouterr().err


# The Hub, as far as a plan asks it.


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A Hub with one repository, `some/model`, that notes what is fetched of it."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def respond(self, sends_body: bool) -> None:
            name = self.path.rpartition("/")[2]
            path = folder / name
            if "/resolve/" not in self.path or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            wanted = self.headers.get("Range", "")
            if wanted:
                start, _, end = wanted.removeprefix("bytes=").partition("-")
                content = content[int(start) : int(end) + 1]
            if sends_body:
                fetched.append(f"{name} {len(content)}")
            self.send_response(206 if wanted else 200)
            for key, value in {
                "Content-Length": str(len(content)), "ETag": f'"{name}"', "X-Repo-Commit": "0" * 40,
                "X-Linked-Size": str(path.stat().st_size), "X-Linked-Etag": f'"{name}"',
            }.items():  # fmt: skip
                self.send_header(key, value)
            self.end_headers()
            if sends_body:
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.respond(False)

        def do_GET(self) -> None:
            self.respond(True)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


ASK_HUB = """
import json, sys, torch, hf_pearl
found = hf_pearl.plan("some/model", "some/model", devices="2x8GiB")
print(json.dumps([found.target.footprint.weights, str(found.target.dtype)]))
"""


def test_of_a_model_on_the_hub_only_headers_are_fetched(tmp_path: Path, seed: int) -> None:
    model = tiny_model("llama", seed, dtype=torch.float16, vocab_size=20_000)
    model.save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert size > 1_000_000
    with hub(tmp_path / "model") as (address, fetched):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment |= {"PYTHONPATH": str(Path(hf_pearl.__file__).parents[1]), "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = subprocess.run(
            [sys.executable, "-c", ASK_HUB], capture_output=True, text=True, timeout=300, env=environment
        )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert json.loads(done.stdout.splitlines()[-1]) == [weights, "torch.float16"]
    bytes_of_weights = [int(each.split()[1]) for each in fetched if each.startswith("model.safetensors ")]
    assert bytes_of_weights and max(bytes_of_weights) <= 100_001


def test_a_plan_is_a_value() -> None:
    first, second = (plan(DEMO / "target", DEMO / "draft", devices="2x8GiB") for _ in range(2))
    assert isinstance(first, Plan) and first == second and hf_pearl.plan is plan
