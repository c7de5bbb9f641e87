"""The draft lane in a child process: the same tokens, nothing left behind, and no failure that a call notices."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ARCHITECTURES,
    assert_varied,
    enabled_for_tiny_models,
    expected_warnings,
    left_padded,
    make_draft,
    noisy_copy,
    random_prompts,
    tiny_model,
    tiny_tokenizer,
)
from nbclient import NotebookClient
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process

import hf_pearl
from hf_pearl import PearlConfig, enabling
from hf_pearl.cache.backends import BACKENDS
from hf_pearl.decoding.drafting import MAX_WIDTH
from hf_pearl.decoding.messages import Admission, Grant, Removal, TokenTree, Verdict
from hf_pearl.parallel.cores import available_cores
from hf_pearl.parallel.workers import records, shared_memory
from hf_pearl.parallel.workers.child_process import start_module
from hf_pearl.parallel.workers.descriptors import anonymous_memory
from hf_pearl.parallel.workers.draft_workers import DraftWorker
from hf_pearl.parallel.workers.processor_specs import decode_processors, encode_processors
from hf_pearl.parallel.workers.records import MalformedRecordError
from hf_pearl.parallel.workers.shared_memory import Channel, RingReader, RingWriter, SequencedRecord
from hf_pearl.parallel.workers.shipping import build, can_ship, copy_weights, pack

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
GONE_SECONDS = 20.0
PROCESSES = PearlConfig(execution="processes")
LOCKSTEP = PearlConfig(execution="processes", draft_length=4)  # waits for the draft, however busy the machine

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes need Linux")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def target() -> Iterator[PreTrainedModel]:
    model = tiny_model("llama", 1)
    yield model
    hf_pearl.release(model)


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel) -> PreTrainedModel:
    """Right about three times in four; its worker serves most of this module."""
    draft = noisy_copy(target, 0.03, 2)
    warm(target, draft)
    return draft


@pytest.fixture(scope="module")
def prompt() -> dict[str, torch.Tensor]:
    return left_padded([list(range(1, 41))])


def decode(
    target: PreTrainedModel, draft: PreTrainedModel | None, inputs: dict[str, torch.Tensor], pearl: Any, **options: Any
) -> Any:
    options = {"do_sample": False, "max_new_tokens": 40, **options}
    return target.generate(**inputs, assistant_model=draft, pearl=pearl, return_dict_in_generate=True, **options)


def worker_of(target: PreTrainedModel, draft: PreTrainedModel) -> DraftWorker:
    engine = hf_pearl.registry.engine_for(target, draft)
    assert engine.workers.worker is not None
    return engine.workers.worker


def warm(target: PreTrainedModel, draft: PreTrainedModel) -> DraftWorker:
    """Start the worker of a pair, as its first call does, and wait for it."""
    decode(target, draft, left_padded([[1, 2, 3]]), PROCESSES, max_new_tokens=2)
    worker = worker_of(target, draft)
    assert worker.wait_until_ready(START_SECONDS), worker._process.why_it_ended()
    return worker


def wait_for(condition: Callable[[], bool], what: str, seconds: float = GONE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def is_gone(process_id: int) -> bool:
    """Whether a process has ended; one that only waits to be reaped, by whoever its parent is now, has."""
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class AtLength(StoppingCriteria):
    """Never stops; does something once when a row has reached a length."""

    def __init__(self, length: int, do: Callable[[], Any]) -> None:
        self.length, self.do = length, do

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.do is not None and input_ids.shape[1] >= self.length:
            do, self.do = self.do, None
            do()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


# -- the same tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("do_sample", [False, True])
def test_the_tokens_are_those_of_inline(
    do_sample: bool, batch_size: int, target: PreTrainedModel, draft: PreTrainedModel, seed: int
) -> None:
    inputs = random_prompts(random.Random(seed), batch_size, [5, 17, 33])
    options = {"do_sample": do_sample, "top_k": 20, "repetition_penalty": 1.1} if do_sample else {}
    expected = decode(target, draft, inputs, PearlConfig(execution="inline", seed=5), **options)
    assert_varied(expected.sequences[:, inputs["input_ids"].shape[1] :])
    for draft_length, overlap in ((1, True), (3, True), (8, True), (4, False), ("auto", True)):
        config = PearlConfig(draft_length=draft_length, execution="processes", overlap=overlap, seed=5)
        output = decode(target, draft, inputs, config, **options)
        assert output.sequences.tolist() == expected.sequences.tolist(), config
        assert output.pearl.execution == "processes"
        if draft_length in (3, 4, 8):  # With 1, the one guess is about the token that the forward beside it yields.
            assert output.pearl.accepted_tokens > 0, config


@pytest.mark.parametrize("pad_token_id", [-1, 2**40])
def test_a_pad_token_that_no_vocabulary_has_is_none_of_the_drafts_business(
    pad_token_id: int, target: PreTrainedModel, draft: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    """Some configurations say -1; `generate` warns, and pads nothing in a batch of one."""
    expected = target.generate(**prompt, do_sample=False, max_new_tokens=12, pad_token_id=pad_token_id)
    output = decode(target, draft, prompt, LOCKSTEP, max_new_tokens=12, pad_token_id=pad_token_id)
    assert output.sequences.tolist() == expected.tolist()
    assert output.pearl.draft_steps > 0


def test_an_unrelated_draft_changes_nothing(target: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    draft = make_draft(target, "unrelated", 9)
    expected = decode(target, draft, prompt, PearlConfig(execution="inline"))
    worker = warm(target, draft)
    output = decode(target, draft, prompt, LOCKSTEP)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.pearl.draft_steps > 0
    worker.close()


def test_lockstep_drafts_the_same_as_inline(target: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    counts = []
    for execution in ("inline", "processes"):
        draft = noisy_copy(target, 0.03, 12)
        if execution == "processes":
            warm(target, draft)
        stats = decode(target, draft, prompt, PearlConfig(draft_length=4, execution=execution)).pearl
        counts.append((stats.target_forwards, stats.draft_steps, stats.drafted_tokens, stats.judged_at, stats.stood_at))
        hf_pearl.release(draft)
    assert counts[0] == counts[1]
    assert stats.draft_seconds > 0.0


def test_a_second_call_finds_its_prefix(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = left_padded([[3 + index % 50 for index in range(200)]])
    config = PearlConfig(draft_length=4, execution="processes")
    first = decode(target, draft, inputs, config)
    second = decode(target, draft, inputs, config)
    assert first.sequences.tolist() == second.sequences.tolist()
    assert first.pearl.draft_prefilled_tokens == 200
    assert second.pearl.draft_prefilled_tokens < 33
    hf_pearl.clear_cache(draft)
    assert decode(target, draft, inputs, config).pearl.draft_prefilled_tokens == 200


def test_the_callers_threads_are_given_back(
    target: PreTrainedModel, draft: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    affinity = os.sched_getaffinity(0)
    before = torch.get_num_threads()
    torch.set_num_threads(len(affinity) + 2)
    try:
        seen: list[int] = []
        criteria = StoppingCriteriaList([AtLength(45, lambda: seen.append(torch.get_num_threads()))])
        decode(target, draft, prompt, PROCESSES, stopping_criteria=criteria)
        assert seen == [max(1, len(affinity) - 1)]
        assert torch.get_num_threads() == len(affinity) + 2
        assert os.sched_getaffinity(0) == affinity
    finally:
        torch.set_num_threads(before)


# -- what "auto" takes, and what is refused -----------------------------------------------------------------------


def test_auto_takes_a_process_on_a_cpu_with_several_cores(
    target: PreTrainedModel, draft: PreTrainedModel, prompt: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(available_cores()) == 1 or decode(target, draft, prompt, True).pearl.execution == "processes"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert decode(target, draft, prompt, True).pearl.execution == "inline"


def _with_forward_hook(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: output)


def _with_replaced_forward(model: PreTrainedModel) -> None:
    model.lm_head.forward = model.lm_head.forward


def _with_local_class(model: PreTrainedModel) -> None:
    class Local(type(model)):  # type: ignore[misc]
        """A user's own."""

    model.__class__ = Local


def _with_main_class(model: PreTrainedModel) -> None:
    model.__class__ = type("Notebook", (type(model),), {"__module__": "__main__"})


def _with_meta_tensor(model: PreTrainedModel) -> None:
    model.lm_head.to("meta")


def _with_adapter(model: PreTrainedModel) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def _with_offloading(model: PreTrainedModel) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.lm_head, AlignDevicesHook())


def _with_quantisation(model: PreTrainedModel) -> None:
    model.config.quantization_config = {"quant_method": "bitsandbytes"}


def _with_packed_weights(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.up_proj = torch.ao.nn.quantized.dynamic.Linear(32, 48)


def _with_compiled_module(model: PreTrainedModel) -> None:
    model.model.layers[0].compile()


def _with_parametrisation(model: PreTrainedModel) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


class _OwnTensor(torch.Tensor):
    pass


def _with_tensor_subclass(model: PreTrainedModel) -> None:
    model.model.register_buffer("own", torch.zeros(2).as_subclass(_OwnTensor))


REFUSED = [
    pytest.param(_with_forward_hook, "forward hooks", id="forward hook"),
    pytest.param(_with_replaced_forward, "replaced `forward`", id="replaced forward"),
    pytest.param(_with_local_class, "cannot be imported", id="local class"),
    pytest.param(_with_main_class, "cannot be imported", id="class from __main__"),
    pytest.param(_with_meta_tensor, "meta device", id="meta device"),
    pytest.param(_with_adapter, "PEFT", id="PEFT"),
    pytest.param(_with_offloading, "accelerate", id="accelerate"),
    pytest.param(_with_quantisation, "quantised", id="quantised"),
    pytest.param(_with_packed_weights, "quantised", id="packed weights"),
    pytest.param(_with_compiled_module, "compiled", id="compiled"),
    pytest.param(_with_parametrisation, "parametrisations", id="parametrised"),
    pytest.param(_with_tensor_subclass, "_OwnTensor", id="tensor subclass"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_what_a_process_cannot_load_is_refused_by_name(change: Callable[[Any], None], reason: str) -> None:
    model = tiny_model("llama", 3)
    assert can_ship(model) is None
    change(model)
    assert reason in str(can_ship(model))
    with pytest.raises(ValueError, match=r'execution="processes".*threads') as raised:
        DraftWorker(model, 8)
    assert reason in str(raised.value)


def test_no_process_is_started_from_a_frozen_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its executable is the app, which would be run again, once for every call."""
    model = tiny_model("llama", 3)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert "frozen app" in str(can_ship(model))
    with pytest.raises(ValueError, match="frozen app"):
        DraftWorker(model, 8)


@pytest.mark.skipif(len(available_cores()) == 1, reason="on one core the lanes take turns")
def test_auto_uses_a_thread_for_it_and_says_so_once(
    target: PreTrainedModel, prompt: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    draft = noisy_copy(target, 0.03, 4)
    _with_forward_hook(draft)
    with caplog.at_level(logging.INFO, "hf_pearl"):
        for _ in range(2):
            assert decode(target, draft, prompt, True).pearl.execution == "threads"
    assert len([record for record in caplog.records if "forward hooks" in record.message]) == 1
    with pytest.raises(ValueError, match="forward hooks"):
        decode(target, draft, prompt, PROCESSES)


def test_transformers_own_hooks_are_no_hindrance(target: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    draft = noisy_copy(target, 0.03, 4)
    draft(**prompt, output_hidden_states=True, output_attentions=True)
    assert can_ship(draft) is None


# -- how a model travels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shipped_model_computes_the_same(architecture: str, tie_word_embeddings: bool) -> None:
    model = tiny_model(architecture, 5, tie_word_embeddings=tie_word_embeddings)
    model.train()
    model.set_attn_implementation("eager")
    shipment, tensors = pack(model)
    descriptor = anonymous_memory("test", shipment.num_bytes)
    try:
        copy_weights(shipment, tensors, descriptor, lambda: False)
        shipped = build(shipment, descriptor)
    finally:
        os.close(descriptor)
    assert not shipped.training and not any(parameter.requires_grad for parameter in shipped.parameters())
    ids = torch.arange(1, 30)[None]
    model.eval()
    with torch.no_grad():
        assert torch.equal(shipped(ids).logits, model(ids).logits)
    assert len(list(shipped.parameters())) == len(list(model.parameters()))
    is_tied = shipped.get_input_embeddings().weight is shipped.get_output_embeddings().weight
    assert is_tied == tie_word_embeddings


def test_a_transposed_and_an_empty_tensor_survive() -> None:
    model = tiny_model("llama", 6)
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(weight.t().contiguous().t())
    model.model.register_buffer("nothing", torch.zeros(0, 3))
    model.lm_head.plain = torch.arange(3)  # neither parameter nor buffer
    shipment, tensors = pack(model)
    descriptor = anonymous_memory("test", shipment.num_bytes)
    copy_weights(shipment, tensors, descriptor, lambda: False)
    shipped = build(shipment, descriptor)
    os.close(descriptor)
    assert torch.equal(shipped.lm_head.weight, weight) and shipped.lm_head.weight.is_contiguous()
    assert shipped.model.nothing.shape == (0, 3)
    assert shipped.lm_head.plain.tolist() == [0, 1, 2]


# -- weights that change ------------------------------------------------------------------------------------------


def test_new_weights_reach_the_warm_worker(target: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    draft = noisy_copy(target, 3.0, 3)
    process_id = warm(target, draft).process_id
    before = decode(target, draft, prompt, LOCKSTEP).pearl
    assert before.acceptance_rate < 0.5
    draft.load_state_dict(target.state_dict())
    after = decode(target, draft, prompt, LOCKSTEP).pearl
    assert worker_of(target, draft).process_id == process_id
    assert after.draft_prefilled_tokens == before.draft_prefilled_tokens  # Nothing stale was found.
    assert after.acceptance_rate == 1.0 and after.accepted_tokens > 0

    draft.model.layers[0].mlp.act_fn = torch.nn.Identity()  # Another structure: another process, which cannot build it.
    draft.lm_head.weight.data = draft.lm_head.weight.data.clone()
    with expected_warnings() as warnings:
        decode(target, draft, prompt, LOCKSTEP)
    assert len(warnings) == 1 and "builds other modules" in warnings[0]
    assert worker_of(target, draft).process_id != process_id
    assert is_gone(process_id)


# -- failures -----------------------------------------------------------------------------------------------------


def test_a_worker_that_fails_to_start_says_why_and_is_replaced_by_a_thread(
    target: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    draft = noisy_copy(target, 0.03, 5)
    draft.model.layers.append(draft.model.layers[1])  # A config of two layers builds no third.
    draft.config.num_hidden_layers = 3
    draft.model.layers[1].mlp.act_fn = torch.nn.Identity()
    expected = decode(target, None, prompt, PearlConfig(execution="inline")).sequences.tolist()
    first = decode(target, draft, prompt, PROCESSES)
    worker = worker_of(target, draft)
    wait_for(lambda: not worker.is_alive, "the worker's end", START_SECONDS)
    assert "builds other modules" in worker._process.why_it_ended()
    call = worker.call(64, LogitsProcessorList(), 0, True)
    assert "builds other modules" in str(call.error)
    assert not call.wait(1, START_SECONDS)
    assert call.finish().num_steps == 0
    with expected_warnings() as warnings:
        second = decode(target, draft, prompt, PROCESSES)
    assert len(warnings) == 1 and "A thread serves" in warnings[0] and "builds other modules" in warnings[0]
    assert first.sequences.tolist() == second.sequences.tolist() == expected
    assert second.pearl.execution == "threads"


def test_an_error_inside_a_call_leaves_the_worker_usable(
    target: PreTrainedModel, draft: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    worker = worker_of(target, draft)
    process_id = worker.process_id
    call = worker.call(64, LogitsProcessorList(), 0, True)
    call.send(Admission(0, (1, 2, 3), 100, 0, None))
    assert call.wait(1, START_SECONDS)
    worker._process.put(Verdict(999, 1, (5,)))  # of a request that was never admitted
    wait_for(lambda: call.error is not None, "the error")
    assert "KeyError" in str(call.error)
    assert not call.wait(10**6, START_SECONDS)
    assert call.step_seconds == 0.0
    call.finish()
    output = decode(target, draft, prompt, LOCKSTEP)
    assert output.pearl.draft_steps > 0
    assert worker_of(target, draft).process_id == process_id


def test_junk_in_the_ring_ends_the_worker_and_not_the_call(
    target: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    draft = noisy_copy(target, 0.03, 7)
    worker = warm(target, draft)
    expected = decode(target, None, prompt, PearlConfig(execution="inline"))

    def scribble() -> None:
        process = worker._process
        process._writer.put(array("q", [77, 1, 2, 3]))
        process.flush()

    criteria = StoppingCriteriaList([AtLength(60, scribble)])
    with expected_warnings() as warnings:
        output = decode(target, draft, prompt, PROCESSES, stopping_criteria=criteria)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert all("unknown kind 77" in warning for warning in warnings)
    wait_for(lambda: not worker.is_alive, "the worker's end")
    assert "unknown kind 77" in worker._process.why_it_ended()
    assert decode(target, draft, prompt, PROCESSES).sequences.tolist() == expected.sequences.tolist()
    hf_pearl.release(draft)


def test_interrupts_do_not_reach_the_worker(
    target: PreTrainedModel, draft: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    worker = worker_of(target, draft)
    assert os.getsid(worker.process_id) != os.getsid(0)
    os.kill(worker.process_id, signal.SIGINT)
    assert decode(target, draft, prompt, LOCKSTEP).pearl.draft_steps > 0
    assert worker.is_alive and worker_of(target, draft) is worker


def test_an_exception_in_a_call_leaves_the_next_one_right(
    target: PreTrainedModel, draft: PreTrainedModel, prompt: dict[str, torch.Tensor]
) -> None:
    expected = decode(target, draft, prompt, PearlConfig(execution="inline"))

    def fail() -> None:
        raise KeyboardInterrupt

    worker = worker_of(target, draft)
    with pytest.raises(KeyboardInterrupt):
        decode(target, draft, prompt, PROCESSES, stopping_criteria=StoppingCriteriaList([AtLength(50, fail)]))
    output = decode(target, draft, prompt, LOCKSTEP)
    assert output.sequences.tolist() == expected.sequences.tolist()
    assert output.pearl.draft_steps > 0
    assert worker_of(target, draft) is worker


# -- beginning and end --------------------------------------------------------------------------------------------


def test_a_call_begins_while_the_worker_starts() -> None:
    worker = DraftWorker(tiny_model("llama", 8), 512)
    try:
        call = worker.call(64, LogitsProcessorList(), 0, True)
        for request_id in range(shared_memory.NUM_SLOTS + 5):  # more than can be drafted
            call.send(Admission(request_id, (1, 2, 3), 100, 0, None))
        assert (call.num_steps, call.step_seconds, call.tree(0)) == (0, 0.0, None)
        started = time.monotonic()
        assert not call.wait(1, 0.01)
        assert time.monotonic() - started < 1.0 or worker.is_ready
        call.send(Verdict(shared_memory.NUM_SLOTS + 4, 1, (3,)))
        assert call.tree(shared_memory.NUM_SLOTS + 4) is None
        report = call.finish()
        assert (report.num_steps, report.timeline) == (0, ())
        assert call.finish() == report
        assert worker.wait_until_ready(START_SECONDS)
        late = worker.call(64, LogitsProcessorList(), 0, True)
        late.send(Admission(0, tuple(range(1, 60)) * 80, 30_000, 0, None))  # longer than a frame
        late.send(Verdict(0, 1, (7, 8)))
        wait_for(lambda: late.tree(0) is not None, "a line")
        line = late.tree(0)
        assert line is not None and (line.request_id, line.verdict, line.root) == (0, 1, 59 * 80 + 2)
        late.send(Removal(0))
        assert late.tree(0) is None
        report = late.finish()
        assert report.num_prefilled == 59 * 80
        assert [step.num_guesses for step in report.timeline][:5] == [1] * 5, "a long prompt is read in five parts"
        assert all(1 <= step.num_guesses <= MAX_WIDTH for step in report.timeline)
        assert all(step.started < step.ended for step in report.timeline)
    finally:
        worker.close()


@pytest.mark.parametrize("state", ["starting", "stopped", "killed"])
def test_close_ends_the_worker_and_returns_everything(state: str) -> None:
    def held() -> tuple[set[str], int]:
        maps = Path("/proc/self/maps").read_text()
        links = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)}
        return {link for link in links if "hf_pearl" in link}, maps.count("hf_pearl_")

    gc.collect()
    before = held()
    worker = DraftWorker(tiny_model("llama", 8), 64)
    process_id = worker.process_id
    if state != "starting":
        assert worker.wait_until_ready(START_SECONDS)
    if state == "stopped":
        os.kill(process_id, signal.SIGSTOP)
    if state == "killed":
        os.kill(process_id, signal.SIGKILL)
        wait_for(lambda: not worker.is_alive, "the worker's end")
    worker.close()
    assert not psutil.pid_exists(process_id)
    assert not worker.is_alive
    worker.close()
    assert held() == before


def _is_open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def test_a_worker_ends_with_its_engine(prompt: dict[str, torch.Tensor]) -> None:
    target = tiny_model("llama", 10)
    draft = noisy_copy(target, 0.03, 11)
    process_id = warm(target, draft).process_id
    del draft
    gc.collect()
    assert not psutil.pid_exists(process_id)


def test_a_forked_copy_of_the_process_leaves_the_worker_alone(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    worker = worker_of(target, draft)
    child = os.fork()
    if child == 0:
        is_alive = worker.is_alive
        worker._process.end()
        os._exit(int(is_alive))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker.is_alive


def check_in_child(check: Callable[[], None], folder: Path) -> None:
    """Have a forked child check something; one that hangs is killed."""
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            torch.set_num_threads(1)  # OpenMP's other threads are not here.
            check()
            os._exit(0)
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, (folder / "error").read_text() if code == 1 else f"signal {-code}"


@contextlib.contextmanager
def call_of_another_thread(begin: Callable[[StoppingCriteria], Any]) -> Iterator[None]:
    """A scope in which another thread is in a call."""
    is_inside, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_inside.set()
        assert goes_on.wait(120)

    thread = threading.Thread(target=begin, args=(AtLength(0, hold),))
    thread.start()
    try:
        assert is_inside.wait(60)
        yield
    finally:
        goes_on.set()
        thread.join()


@pytest.mark.parametrize(
    ("parents", "childs"),
    [("inline", "inline"), ("processes", "inline"), pytest.param("processes", "processes", marks=pytest.mark.slow)],
)
def test_a_child_that_is_forked_during_a_call_of_another_thread_decodes(
    parents: Any,
    childs: Any,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of that thread it has no more than what it held: locks, and switches that it would have put back."""
    worker, tokenizer = worker_of(target, draft), tiny_tokenizer(0)
    monkeypatch.setattr(target.generation_config, "stop_strings", ["fedcbafedcba"])
    attention = target.config._attn_implementation

    def tokens(execution: Any, *criteria: StoppingCriteria) -> list[list[int]]:
        config = PearlConfig(execution=execution, draft_length=4)
        options = {"tokenizer": tokenizer, "stopping_criteria": StoppingCriteriaList(criteria)}
        return decode(target, draft, prompt, config, **options).sequences.tolist()

    expected = tokens("inline")

    def check() -> None:
        assert target.config._attn_implementation == attention
        assert target.generation_config.stop_strings == ["fedcbafedcba"]
        hf_pearl.clear_cache(target)
        for _ in range(2):
            assert tokens(childs) == expected
        hf_pearl.release(target)

    with call_of_another_thread(lambda criterion: tokens(parents, criterion)):
        check_in_child(check, tmp_path)
    assert tokens(parents) == expected
    assert worker.is_alive and worker_of(target, draft) is worker, "the child has ended its parent's worker"


def test_a_child_that_is_forked_while_models_are_enabled_can_enable_them(tmp_path: Path) -> None:
    with enabling._lock:
        check_in_child(hf_pearl.enable, tmp_path)


def test_a_worker_starts_where_the_standard_streams_are_closed(draft: PreTrainedModel, tmp_path: Path) -> None:
    """What is opened then has the numbers that the child's own streams were written over."""

    def check() -> None:
        os.closerange(0, 3)
        worker = DraftWorker(draft, 8)
        is_ready = worker.wait_until_ready(START_SECONDS)
        assert is_ready, worker.why_it_ended()
        worker.close()

    check_in_child(check, tmp_path)


def test_a_module_starts_where_the_working_directory_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deleted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    log = anonymous_memory("test", 0)
    assert start_module("platform", [], [], log, 1).wait(GONE_SECONDS) == 0
    os.close(log)


PARENT = '''
import os, subprocess, sys, threading, time
from transformers import LlamaConfig, LlamaForCausalLM
from hf_pearl.parallel.workers.child_process import Parent
from hf_pearl.parallel.workers.draft_workers import DraftWorker

HELD = """
print("bound", flush=True)
ctypes.PyDLL(None).usleep(600_000_000)  # holds the interpreter
"""

model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4))
workers = [DraftWorker(model, 8)]
forked = os.fork()  # holds every descriptor open that the first worker shares with its parent, and lives on
if not forked:
    time.sleep(600)
    os._exit(0)
workers.append(DraftWorker(model, 8))
thread = threading.Thread(target=lambda: workers.append(DraftWorker(model, 8)))  # which does not outlive its start
thread.start()
held = subprocess.Popen([sys.executable, "-c", Parent.here().binding + HELD], stdout=subprocess.PIPE)
thread.join()
held.stdout.readline()
are_ready = all(worker.wait_until_ready(120) for worker in workers)
print(are_ready, forked, held.pid, *(worker.process_id for worker in workers), flush=True)
time.sleep(600)
'''


@pytest.mark.parametrize("are_stopped", [False, True])
def test_workers_end_when_their_parent_is_killed(are_stopped: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=_environment()
    ) as parent:
        assert parent.stdout is not None
        are_ready, forked, *workers = parent.stdout.readline().split()
        if are_stopped:
            for worker in workers:
                os.kill(int(worker), signal.SIGSTOP)
        parent.kill()
        parent.wait(GONE_SECONDS)
        try:
            assert are_ready == "True" and len(workers) == 4
            for worker in workers:
                wait_for(lambda worker=worker: is_gone(int(worker)), "the worker's end", 5.0)
        finally:
            for process in (forked, *workers):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)


STARTING = """
import os, signal, sys, time
from hf_pearl.parallel.workers.child_process import start_module
sys.path.insert(0, {folder!r})  # The child finds a torch there whose import has no end.
child = start_module({module!r}, [], [], os.open(os.devnull, os.O_WRONLY), 1)
while not os.path.exists({folder!r} + "/is_importing"):
    time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("module", ["hf_pearl.parallel.workers.worker", "hf_pearl.parallel.ranks.process"])
def test_a_child_that_is_still_starting_ends_when_its_parent_is_killed(module: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    text = f"import time\nopen({str(tmp_path / 'is_importing')!r}, 'w').close()\ntime.sleep(600)\n"
    (tmp_path / "torch" / "__init__.py").write_text(text)
    script = STARTING.format(folder=str(tmp_path), module=module)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait(GONE_SECONDS)
    try:
        wait_for(lambda: is_gone(child), "the child's end", 5.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


SCRIPT = """
import json, torch, hf_pearl
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     eos_token_id=None, bos_token_id=None, pad_token_id=0, dtype="float64")
target = LlamaForCausalLM(config).double().eval()
for parameter in target.parameters():
    parameter.data *= 20 if parameter.ndim > 1 else 1
hf_pearl.enable()
ids = torch.arange(1, 20)[None]
options = dict(assistant_model=target, do_sample=False, max_new_tokens=30, return_dict_in_generate=True)
outputs = [target.generate(ids, pearl=hf_pearl.PearlConfig(execution="processes", draft_length=4), **options)
           for _ in range(2)]
expected = target.generate(ids, do_sample=False, max_new_tokens=30)
print(json.dumps([outputs[0].sequences.tolist() == outputs[1].sequences.tolist() == expected.tolist(),
                  outputs[1].pearl.execution, outputs[1].pearl.accepted_tokens]))
"""


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def check_script(printed: str) -> None:
    same, execution, accepted = json.loads(printed)
    assert same and execution == "processes" and accepted > 0


def test_it_works_in_a_notebook(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(part) for part in SCRIPT.split("\nhf_pearl.enable()", maxsplit=1)]
    cells[1].source = "hf_pearl.enable()" + cells[1].source
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=_environment())
    check_script(
        "".join(each["text"] for cell in notebook.cells for each in cell.outputs if each.get("name") == "stdout")
    )


def test_it_works_under_pytest(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "a_script"}
    exec(SCRIPT, names)
    check_script(capsys.readouterr().out)
    hf_pearl.release(names["target"])


@pytest.mark.parametrize("way", ["-c", "stdin", "script"])
def test_it_works_without_a_main_guard(way: str, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(SCRIPT)
    command = {"-c": ["-c", SCRIPT], "stdin": ["-"], "script": [str(script)]}[way]
    cwd = ROOT if way == "script" else tmp_path
    result = subprocess.run(
        [sys.executable, *command],
        input=SCRIPT if way == "stdin" else "",
        capture_output=True,
        text=True,
        cwd=cwd,
        env=_environment(),
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    check_script(result.stdout)


# -- what goes through the shared memory --------------------------------------------------------------------------

TOKENS = st.lists(st.integers(0, records.MAX_TOKEN_ID), max_size=40).map(tuple)
IDS = st.integers(0, records.MAX_COUNT)
OPTIONS = st.builds(
    records.CallOptions,
    vocab_size=st.integers(1, 2**20),
    pad_token_id=st.integers(0, 2**20),
    free_running=st.booleans(),
    prefix_cache=st.booleans(),
    max_line=st.integers(1, 64),
    max_width=st.integers(1, 64),
    num_blocks=st.integers(1, 2**20),
    attention=st.sampled_from(BACKENDS),
    processors=st.just([]),
)
MESSAGES = st.one_of(
    st.builds(
        Admission,
        IDS,
        TOKENS.filter(bool),
        IDS,
        st.integers(0, 1000),
        st.none() | st.integers(0, 2**64 - 1),
    ),
    st.builds(Verdict, IDS, st.integers(1, 2**40), TOKENS),
    st.builds(Removal, IDS),
    st.builds(Grant, IDS),
    st.builds(records.BeginCall, st.integers(1, 2**40), OPTIONS),
    st.builds(records.EndCall, IDS),
    st.just(records.Clear()),
    st.just(records.Quit()),
)
WORDS = st.integers(-(2**63), 2**63 - 1)
SOME_WORDS = st.lists(st.integers(-1, 9) | WORDS, max_size=30)


@given(MESSAGES)
def test_a_message_arrives_as_it_was(message: records.Message) -> None:
    assert records.decode_message(records.encode_message(message)) == message


@settings(max_examples=500)
@given(SOME_WORDS)
def test_words_that_are_no_message_are_refused(words: list[int]) -> None:
    try:
        message = records.decode_message(array("q", words))
    except MalformedRecordError:
        return
    assert list(records.encode_message(message)) == words


@settings(max_examples=500)
@given(MESSAGES, st.data())
def test_a_damaged_message_is_refused_or_another_valid_one(message: records.Message, data: st.DataObject) -> None:
    words = records.encode_message(message)
    index = data.draw(st.integers(0, len(words) - 1))
    match data.draw(st.sampled_from(["change", "cut", "extend"])):
        case "change":
            words[index] = data.draw(WORDS)
        case "cut":
            words = words[:index]
        case _:
            words.extend(data.draw(SOME_WORDS))
    try:
        records.decode_message(words)
    except MalformedRecordError:
        return


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(Verdict(0, 1, (-1,)), id="negative token"),
        pytest.param(Verdict(0, 1, (2**31,)), id="large token"),
        pytest.param(Verdict(0, 0, (1,)), id="verdict 0"),
        pytest.param(Removal(-1), id="negative request"),
        pytest.param(Grant(2**70), id="more than 64 bits"),
        pytest.param(Admission(0, (), 10, 0, None), id="empty prompt"),
        pytest.param(Admission(0, (1,), 10, 0, 2**64), id="large seed"),
    ],
)
def test_a_message_out_of_range_is_not_sent(message: records.Message) -> None:
    with pytest.raises(MalformedRecordError):
        records.encode_message(message)


CHANCES = st.floats(0.0, 1.0)
TREES = st.integers(0, 64).flatmap(
    lambda count: st.builds(
        TokenTree,
        IDS,
        IDS,
        IDS,
        IDS,
        st.lists(st.integers(0, 63), min_size=count, max_size=count).map(tuple),
        st.tuples(*(st.integers(-1, place - 1) for place in range(count))),
        st.lists(CHANCES, min_size=count, max_size=count).map(tuple),
    )
)


@given(IDS, TREES)
def test_a_tree_arrives_as_it_was(call: int, tree: TokenTree) -> None:
    assert records.decode_tree(records.encode_tree(call, tree), 64) == (call, tree)


@settings(max_examples=500)
@given(TREES, st.data())
def test_a_damaged_tree_is_refused_or_another_valid_one(tree: TokenTree, data: st.DataObject) -> None:
    content = bytearray(records.encode_tree(1, tree))
    index = data.draw(st.integers(0, len(content) - 1))
    content[index] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(index, len(content)))]
    try:
        _, decoded = records.decode_tree(bytes(content), 64)
    except MalformedRecordError:
        return
    assert all(0 <= token < 64 for token in decoded.token_ids) and all(0 <= c <= 1 for c in decoded.chances)
    assert all(-1 <= parent < place for place, parent in enumerate(decoded.parents))
    assert len(decoded.token_ids) == len(decoded.parents) == len(decoded.chances) <= 64


@settings(max_examples=500)
@given(st.binary(max_size=80))
def test_bytes_that_are_no_tree_and_no_status_are_refused(content: bytes) -> None:
    for decoder in (lambda: records.decode_tree(content, 64), lambda: records.decode_status(content)):
        try:
            decoder()
        except MalformedRecordError:
            continue


def _ring(num_words: int) -> tuple[RingWriter, RingReader, memoryview, memoryview]:
    control, ring = memoryview(array("q", bytes(256))), memoryview(array("q", bytes(8 * num_words)))
    return RingWriter(control, ring), RingReader(control, ring), control, ring


@given(st.lists(st.integers(1, 90), max_size=30), st.data())
def test_a_ring_delivers_messages_of_any_length_in_order(sizes: list[int], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "MAX_FRAME_WORDS", 20)
        writer, reader, _, _ = _ring(50)
        sent = [array("q", range(index, index + size)) for index, size in enumerate(sizes)]
        received = []
        for message in sent:
            writer.put(message)
            while data.draw(st.booleans()):
                writer.flush()
                received.append(reader.get())
        while writer.flush() or not writer.is_empty:
            received.append(reader.get())
        received.append(reader.get())
        assert [message for message in received if message is not None] == sent


def test_messages_that_were_not_sent_can_be_withdrawn() -> None:
    writer, reader, _, _ = _ring(50)
    first = writer.put(array("q", range(40)))
    writer.flush()
    second = writer.put(array("q", range(20)))
    assert writer.withdraw(second) and not writer.withdraw(first)
    assert writer.put(array("q", [5])) == second
    assert reader.get() == array("q", range(40))
    writer.flush()
    assert reader.get() == array("q", [5])
    assert reader.get() is None


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_ring_is_refused(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "_FRAME_PATIENCE", 0.0)
        writer, reader, control, ring = _ring(64)
        message = array("q", range(30))
        writer.put(message)
        writer.flush()
        place = data.draw(st.integers(0, 32) | st.just(-1))
        value = data.draw(WORDS)
        if place < 0:
            control[16] = value
        else:
            ring[place] = value
        try:
            received = reader.get()
        except MalformedRecordError:
            return
        assert received in (message, None)


def test_a_torn_record_is_never_used() -> None:
    words = memoryview(array("q", bytes(8 * 20)))
    writer, reader = SequencedRecord(words), SequencedRecord(words)
    assert reader.read() is None
    writer.write(b"first")
    assert reader.read() == b"first"
    content = reader.read()
    assert reader.read() is content
    writer.write(b"second")
    words[4] ^= 1  # what a reader sees that is overtaken in the middle
    words[3] ^= 1
    assert reader.read() == b"first"
    words[4] ^= 1
    words[3] ^= 1
    assert reader.read() == b"second"
    words[0] += 1  # being written
    assert reader.read() == b"second"
    with pytest.raises(ValueError, match="room"):
        writer.write(bytes(200))


def test_a_record_that_another_process_hammers_reads_whole() -> None:
    descriptor = anonymous_memory("test", Channel.NUM_BYTES)
    channel = Channel(descriptor)
    child = os.fork()
    if child == 0:
        end, number = time.monotonic() + 1.0, 0
        while time.monotonic() < end:
            number += 1
            channel.tree(3).write(bytes([number % 251]) * (1 + number % 900))
        os._exit(0)
    seen: set[bytes] = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        content = channel.tree(3).read()
        if content is not None:
            assert len(set(content)) == 1
            seen.add(content)
    assert len(seen) > 10
    channel.close()
    os.close(descriptor)


# -- logits processors --------------------------------------------------------------------------------------------


def _processors() -> list[Any]:
    eos = torch.tensor([3])
    return [
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopPLogitsWarper(0.9),
        logits_process.TopKLogitsWarper(5),
        logits_process.MinPLogitsWarper(0.1),
        logits_process.TypicalLogitsWarper(0.9),
        logits_process.EpsilonLogitsWarper(0.1),
        logits_process.EtaLogitsWarper(0.1),
        logits_process.SuppressTokensLogitsProcessor([1, 2]),
        logits_process.InfNanRemoveLogitsProcessor(),
        logits_process.LogitNormalization(),
        logits_process.MinLengthLogitsProcessor(5, eos),
        logits_process.MinNewTokensLengthLogitsProcessor(3, 5, eos),
        logits_process.RepetitionPenaltyLogitsProcessor(1.2),
        logits_process.NoRepeatNGramLogitsProcessor(2),
        logits_process.NoBadWordsLogitsProcessor([[1, 2], [5]], eos),
        logits_process.SequenceBiasLogitsProcessor([[[1, 2], 1.0], [[3], -2.0]]),
        logits_process.ForcedBOSTokenLogitsProcessor(1),
        logits_process.ForcedEOSTokenLogitsProcessor(10, eos),
        logits_process.ExponentialDecayLengthPenalty((2, 1.1), eos, 3),
        logits_process.SuppressTokensAtBeginLogitsProcessor([1], 9),
    ]


@pytest.mark.parametrize("processor", _processors(), ids=lambda processor: type(processor).__name__)
def test_a_processor_that_has_travelled_does_the_same(processor: Any) -> None:
    specs = json.loads(json.dumps(encode_processors([processor])))
    (copied,) = decode_processors(specs)
    assert type(copied) is type(processor)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 7, 1, 5]])
    scores = torch.linspace(-3, 3, 16)[None]
    assert torch.equal(copied(ids, scores.clone()), processor(ids, scores.clone()))


def test_what_cannot_travel_is_left_out() -> None:
    class Own(logits_process.TemperatureLogitsWarper):
        """A user's own may do anything."""

    huge = logits_process.SuppressTokensLogitsProcessor(list(range(records.MAX_OPTIONS_BYTES)))
    holds_more = logits_process.TopKLogitsWarper(5)
    holds_more.device = torch.device("cpu")  # type: ignore[attr-defined]
    kept = logits_process.TopPLogitsWarper(0.5)
    specs = encode_processors([Own(0.5), huge, holds_more, kept])
    assert [spec["class"] for spec in specs] == ["TopPLogitsWarper"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["class", "values", "tensor", "shape", "dtype", "list", "tuple", "dict", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=500)
@given(
    st.sampled_from(["TopKLogitsWarper", "Popen", ""]), st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3)
)
def test_a_specification_that_is_none_is_refused(name: str, values: dict[str, Any]) -> None:
    for spec in ({"class": name, "values": values}, values, {"class": name, "values": {"top_k": values}}):
        try:
            processors = decode_processors([spec])
        except MalformedRecordError:
            continue
        assert [type(processor).__name__ for processor in processors] == ["TopKLogitsWarper"]


def test_the_worker_uses_the_processors(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    worker = worker_of(target, draft)
    suppressed = list(range(0, 64, 2))
    call = worker.call(64, [logits_process.SuppressTokensLogitsProcessor(suppressed)], 0, False)
    call.send(Admission(0, (1, 2, 3), 100, 0, None))
    call.grant(30)
    assert call.wait(30, START_SECONDS), call.error
    tree = call.tree(0)
    assert tree is not None and tree.token_ids
    assert not set(tree.token_ids) & set(suppressed)
    call.abort()
    call.abort()
