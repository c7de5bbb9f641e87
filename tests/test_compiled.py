"""Captured forwards that are compiled: the same tokens, few pieces, and nothing lost where a compiler fails.

On a CPU the capture is replaced by a stand-in, and the code generator, but for one slow test, by torch's own
operations: what is traced, and where it breaks off, is the same.
"""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import interpreter  # noqa: F401  (skips where there is no Triton)
import pytest
import torch
from models import (
    ARCHITECTURES,
    assert_equal,
    assert_nothing_held,
    enabled_for_tiny_models,
    expected_warnings,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from strict_capture import use_twins
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import shutdown_compile_workers

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.cache import attention
from hf_pearl.cache.kernel_step import KernelStep
from hf_pearl.cache.static_step import StaticStep
from hf_pearl.parallel.graphs import compiled, cuda_graphs
from hf_pearl.parallel.graphs.capture import RerunCapture
from hf_pearl.parallel.graphs.compiled import num_compilations
from hf_pearl.registry import engines_of

COMPILED = PearlConfig(draft_length=4, execution="inline", attention="triton", compile=True)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    """`pearl=` for tiny models; torch keeps processes that compile for later, on a GPU as well: they end with us."""
    with enabled_for_tiny_models():
        yield
    shutdown_compile_workers()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    use_twins(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: RerunCapture())


class Pieces:
    """Counts what was compiled; in place of a code generator, torch's own operations run."""

    def __init__(self) -> None:
        self.operations: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.operations.append(sum(node.op.startswith("call_") for node in graph.graph.nodes))
        compiled_graph: Callable[..., Any] = aot_eager(graph, inputs)
        return compiled_graph


@pytest.fixture
def pieces(captures: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pieces]:
    pieces = Pieces()
    yield from compiled_by(pieces, monkeypatch)


def compiled_by(backend: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Have what is compiled meanwhile compiled by `backend`, and nothing of it kept."""
    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    yield backend
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


FAST = ("llama", "gemma2")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_tokens_are_those_of_generate(architecture: str, seed: int, pieces: Pieces) -> None:
    target = tiny_model(architecture, seed)
    draft = noisy_copy(target, 0.02, seed)
    for batch_size in (1, 3):
        prompts = random_prompts(random.Random(seed), batch_size, [5, 9, 13])
        _, output = assert_equal(target, draft, prompts, COMPILED, max_new_tokens=24)
        assert output.pearl.accepted_tokens > 0
    assert sum(pieces.operations) > 10 or architecture not in FAST, "nothing was compiled"
    assert_nothing_held(target, draft)
    hf_pearl.release(target)


def test_all_layers_of_a_model_share_their_code(pieces: Pieces) -> None:
    """Or a model of many layers would be compiled for minutes."""
    num_pieces = []
    for num_layers in (2, 5):
        torch._dynamo.reset()
        compiled._compiled.cache_clear()
        pieces.operations.clear()
        target = tiny_model("qwen3", 0, num_hidden_layers=num_layers)
        assert_equal(target, None, random_prompts(random.Random(0), 1, [6]), COMPILED, max_new_tokens=6)
        num_pieces.append(len(pieces.operations))
        hf_pearl.release(target)
    assert num_pieces[0] == num_pieces[1] < 20


def test_no_code_of_ours_is_compiled_whatever_sizes_come(pieces: Pieces, caplog: pytest.LogCaptureFixture) -> None:
    """Calls, sizes and models follow each other; lanes register the attention function anew in each of them."""
    with caplog.at_level(logging.WARNING, logger="torch._dynamo"):
        for seed, hidden_size in ((0, 32), (1, 64)):
            target = tiny_model("llama", seed, hidden_size=hidden_size)
            for batch_size in (1, 3):
                prompts = random_prompts(random.Random(batch_size), batch_size, [5, 9, 13])
                assert_equal(target, noisy_copy(target, 0.02, seed), prompts, COMPILED, max_new_tokens=16)
            hf_pearl.release(target)
    assert "recompile_limit" not in caplog.text
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list
    for function in (StaticStep.attend, KernelStep.attend, attention._paged_attention_forward):
        assert not entries(function.__code__), function
    assert pieces.operations


def test_what_users_compile_is_compiled_as_before(pieces: Pieces) -> None:
    """torch keeps a count per function, and gives up where many variants of one have been compiled."""
    target = tiny_model("llama", 6)
    for batch_size in (1, 3):
        prompts = random_prompts(random.Random(6), batch_size, [6, 11])
        assert_equal(target, noisy_copy(target, 0.02, 6), prompts, COMPILED, max_new_tokens=12)
    expected, theirs = target(**prompts).logits, Pieces()
    for dynamic in (False, True):
        found = torch.compile(target, backend=theirs, dynamic=dynamic)(**prompts).logits
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(theirs.operations) >= 2 and theirs.operations[0] > sum(pieces.operations[:3])
    hf_pearl.release(target)


def test_what_only_compiled_code_cannot_do_in_a_capture_is_captured_without(
    pieces: Pieces, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Picky(RerunCapture):
        """Refuses what is compiled."""

        def capture(self, run: Callable[[], None]) -> Any:
            if len(refused) < 1:
                refused.append(run)
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().capture(run)

    refused: list[Callable[[], None]] = []
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: Picky())
    target = tiny_model("llama", 7)
    prompts = random_prompts(random.Random(7), 1, [6])
    with caplog.at_level(logging.INFO, logger="hf_pearl"):
        for _ in range(2):
            assert_equal(target, None, prompts, COMPILED, max_new_tokens=8)
    said = [each.getMessage() for each in caplog.records]
    assert sum("is not compiled" in each for each in said) == 1
    assert not any("are not captured" in each for each in said)
    runner = engines_of(target)[0].graphs.runner("target", target, engines_of(target)[0].caches["target"], True)
    assert runner is not None and runner.num_replays > 0 and not runner.body.is_compiled
    hf_pearl.release(target)


def test_compiling_is_a_sign_of_life(pieces: Pieces) -> None:
    before = num_compilations()
    target = tiny_model("llama", 8)
    assert_equal(target, None, random_prompts(random.Random(8), 1, [6]), COMPILED, max_new_tokens=6)
    assert num_compilations() > before and pieces.operations
    hf_pearl.release(target)


def test_a_compiler_that_fails_costs_no_token_and_is_said_once(
    captures: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("no C compiler")

    for _ in compiled_by(fail, monkeypatch):
        target = tiny_model("llama", 3)
        prompts = random_prompts(random.Random(3), 2, [6, 9])
        with caplog.at_level(logging.INFO, logger="hf_pearl"):
            for _ in range(2):
                _, output = assert_equal(target, None, prompts, COMPILED, max_new_tokens=12)
        said = [each.getMessage() for each in caplog.records if "is not compiled" in each.getMessage()]
        assert len(said) == 1 and "LlamaForCausalLM" in said[0] and "no C compiler" in said[0]
        assert output.pearl.warm_up_steps == 0, "it is captured as without"
        hf_pearl.release(target)


def test_what_is_compiled_keeps_no_model(pieces: Pieces) -> None:
    target = tiny_model("llama", 4)
    prompts = random_prompts(random.Random(4), 1, [6])
    assert_equal(target, None, prompts, COMPILED, max_new_tokens=8)
    assert pieces.operations
    hf_pearl.release(target)
    reference = weakref.ref(target)
    del target
    gc.collect()
    assert reference() is None


def test_a_call_that_is_not_compiled_follows_one_that_is(pieces: Pieces) -> None:
    target = tiny_model("llama", 5)
    prompts = random_prompts(random.Random(5), 1, [6])
    assert_equal(target, None, prompts, COMPILED, max_new_tokens=8)
    num_pieces = len(pieces.operations)
    plain = PearlConfig(execution="inline", attention="triton")
    for config in (plain, COMPILED, plain):
        assert_equal(target, None, prompts, config, max_new_tokens=8)
    assert num_pieces == len(pieces.operations) > 0
    hf_pearl.release(target)


def test_where_nothing_is_captured_it_is_said() -> None:
    target = tiny_model("llama", 7)
    prompts = random_prompts(random.Random(7), 1, [6])
    with expected_warnings() as warnings:
        assert_equal(target, None, prompts, PearlConfig(execution="inline", compile=True), max_new_tokens=4)
    assert any("`compile` is without effect: on cpu" in each for each in warnings)
    hf_pearl.release(target)


@pytest.mark.slow
@pytest.mark.usefixtures("captures")
def test_the_code_generator_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it needs a C++ compiler; where there is none, what is said is that."""
    monkeypatch.setattr(inductor_config, "compile_threads", 1)  # Its pool of threads would stay for good.
    for _ in compiled_by("inductor", monkeypatch):
        target = tiny_model("qwen3", 8)
        prompts = random_prompts(random.Random(8), 2, [6, 9])
        assert_equal(target, noisy_copy(target, 0.02, 8), prompts, COMPILED, max_new_tokens=12)
        hf_pearl.release(target)


@pytest.mark.cuda
def test_on_a_gpu_tokens_are_those_of_generate_but_for_near_ties() -> None:
    """In float32, whose rounding differs between compiled and not."""
    target = tiny_model("qwen3", 9, dtype=torch.float32).to("cuda")
    prompts = {name: each.to("cuda") for name, each in random_prompts(random.Random(9), 2, [6, 9]).items()}
    config = PearlConfig(attention="triton", compile=True, execution="inline")
    draft = noisy_copy(target, 0.02, 9)
    for _ in range(3):  # What comes for the second time is captured.
        _, output = assert_equal(target, draft, prompts, config, max_new_tokens=16)
    assert output.pearl.accepted_tokens > 0
    (engine,) = engines_of(draft)
    runner = engine.graphs.runner("target", target, engine.caches["target"], True)
    assert runner is not None and runner.num_replays > 0 and runner.body.is_compiled
    hf_pearl.release(target)
