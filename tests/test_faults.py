"""A draft lane that dies or stands still is survived, and Ctrl-C obeyed: the same tokens, and the next call works."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hanging import SLOW_SECONDS, make_hanging
from models import (
    assert_nothing_held,
    enabled_for_tiny_models,
    expected_warnings,
    left_padded,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from transformers import StoppingCriteria, StoppingCriteriaList

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.decoding.drafting import Drafter
from hf_pearl.engine import PearlEngine
from hf_pearl.interrupts import KeptInterrupts
from hf_pearl.parallel import heartbeat
from hf_pearl.parallel.inline import InlineDraft
from hf_pearl.parallel.processes import ProcessDraft
from hf_pearl.parallel.threads import ThreadDraft
from hf_pearl.parallel.workers.draft_workers import MAX_FAILURES, DraftWorker
from hf_pearl.registry import engine_for

TESTS = Path(__file__).resolve().parent
START_SECONDS = 120.0
OPTIONS = {"do_sample": False, "max_new_tokens": 60}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes need Linux")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


class Pair:
    """A target, its draft, which a file may bring to stand, a prompt, and the right answer to it."""

    def __init__(self, trigger: Path, seed: int = 1) -> None:
        self.target = tiny_model("llama", seed)
        self.draft = make_hanging(noisy_copy(self.target, 0.03, seed + 1), trigger)
        self.trigger = trigger
        self.inputs = left_padded([list(range(1, 41))])
        self.expected = self.target.generate(**self.inputs, **OPTIONS).tolist()

    def call(self, execution: str, draft_length: int | str = 4) -> tuple[Any, list[str]]:
        """The output of a call, which must be right, and the warnings."""
        config = PearlConfig(execution=execution, draft_length=draft_length)
        with expected_warnings() as warnings:
            output = self.target.generate(
                **self.inputs, **OPTIONS, assistant_model=self.draft, pearl=config, return_dict_in_generate=True
            )
        assert output.sequences.tolist() == self.expected
        assert_nothing_held(self.target)
        return output, list(warnings)

    def worker(self) -> DraftWorker:
        """The worker, started by a call if there is none."""
        workers = engine_for(self.target, self.draft).workers
        if workers.worker is None or not workers.worker.is_alive:
            self.call("processes", "auto")
        assert workers.worker is not None
        return workers.worker

    def served(self) -> DraftWorker:
        """A worker that has served a call."""
        assert self.worker().wait_until_ready(START_SECONDS)
        output, warnings = self.call("processes")
        assert output.pearl.draft_steps > 0 and not warnings
        return self.worker()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("trigger") / "what")
    yield pair
    hf_pearl.release(pair.target)


# -- lanes that stand still ---------------------------------------------------------------------------------------


class Clock:
    """Seconds, as a test has them."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_counter_that_moves_is_never_taken_for_one_that_stands() -> None:
    clock = Clock()
    watch = heartbeat.Watch(clock)
    for value in range(100):
        clock.now += 4.9
        assert not watch.stands_still(value, 5.0)
        clock.now += 4.9
        assert not watch.stands_still(value, 5.0)


def test_a_counter_that_stands_is_noticed_when_it_was_looked_at_twice() -> None:
    clock = Clock()
    watch = heartbeat.Watch(clock)
    assert not watch.stands_still(7, 5.0)
    clock.now = 1000.0  # The whole machine was asleep, or nobody looked.
    assert not watch.stands_still(7, 5.0)
    clock.now += heartbeat.CONFIRM_SECONDS / 2
    assert not watch.stands_still(7, 5.0)
    clock.now += heartbeat.CONFIRM_SECONDS / 2
    assert watch.stands_still(7, 5.0)
    assert not watch.stands_still(8, 5.0)


def test_of_a_rank_only_what_it_does_while_it_is_waited_for_counts() -> None:
    clock, control = Clock(), memoryview(array("q", [0] * heartbeat.NUM_WORDS))
    signs = heartbeat.Signs(clock)

    def missing(seconds: float, num_waits: int) -> str:
        clock.now += seconds
        control[heartbeat.BEATS] += 1
        return signs.missing(control, num_waits)

    assert not any(missing(0.9 * heartbeat.STUCK_SECONDS, num_waits) for num_waits in range(10))
    assert not missing(heartbeat.STUCK_SECONDS, 9)
    control[heartbeat.PROGRESS] += 1  # just in time
    assert not missing(heartbeat.CONFIRM_SECONDS, 9)
    assert not missing(heartbeat.STUCK_SECONDS, 9)
    assert "stands still" in missing(heartbeat.CONFIRM_SECONDS, 9)
    assert not missing(heartbeat.STUCK_SECONDS, 10)


HANGS = {"stopped": "no sign of life", "hold": "no sign of life", "loop": "stands still", "sleep": "stands still"}


def wait_for_threads() -> None:
    """Until no draft lane's thread is left: one that was left behind ends when it can."""
    deadline = time.monotonic() + START_SECONDS
    while any(each.name == "hf_pearl draft lane" for each in threading.enumerate()):
        assert time.monotonic() < deadline, "a thread has not ended"
        time.sleep(0.01)


def hang(pair: Pair, how: str, execution: str, draft_length: int | str) -> None:
    """Bring the lane to stand before a call or in its midst; the call must be right, and say so."""
    if execution == "processes":
        worker = pair.served()
    if how == "stopped":
        os.kill(worker.process_id, signal.SIGSTOP)
    else:
        pair.trigger.write_text(how)
    try:
        output, warnings = pair.call(execution, draft_length)
    finally:
        pair.trigger.unlink(missing_ok=True)
    assert output.pearl.execution == execution
    assert len(warnings) == 1 and "The draft lane failed" in warnings[0] and HANGS[how] in warnings[0], warnings
    if execution == "processes":
        assert pair.worker() is not worker
    again, warnings = pair.call(execution)
    assert not warnings
    if execution == "threads":
        assert again.pearl.draft_steps > 0
        wait_for_threads()  # before the file says something else, which would hold it again


@pytest.fixture
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.8)
    monkeypatch.setattr(heartbeat, "STUCK_SECONDS", 1.5)
    monkeypatch.setattr(heartbeat, "CONFIRM_SECONDS", 0.25)


@pytest.mark.usefixtures("short_deadlines")
@pytest.mark.parametrize("draft_length", ["auto", 4])
@pytest.mark.parametrize(("how", "execution"), [("stopped", "processes"), ("loop", "threads")])
def test_a_lane_that_stands_still_is_left_behind_and_replaced(
    how: str, execution: str, draft_length: int | str, pair: Pair
) -> None:
    hang(pair, how, execution, draft_length)


@pytest.mark.usefixtures("short_deadlines")
def test_a_worker_that_stands_still_in_a_forward_is_replaced(pair: Pair) -> None:
    hang(pair, "loop", "processes", 4)


@pytest.mark.usefixtures("short_deadlines")
@pytest.mark.parametrize("draft_length", ["auto", 4])
def test_a_thread_that_was_left_behind_ends_with_its_step(
    draft_length: int | str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it was asked for: nobody waits for it, and it would take time and memory of those who go on."""
    num_steps, step = 0, Drafter.step

    def counted(drafter: Drafter, most: int = 1) -> Any:
        nonlocal num_steps
        num_steps += 1
        return step(drafter, most)

    monkeypatch.setattr(Drafter, "step", counted)
    pair.trigger.write_text("sleep")
    try:
        pair.call("threads", draft_length)
        before = num_steps
    finally:
        pair.trigger.unlink()
    wait_for_threads()
    assert num_steps == before > 0


@pytest.mark.slow
@pytest.mark.usefixtures("short_deadlines")
@pytest.mark.parametrize("part", range(10))
def test_two_hundred_lanes_that_stand_still(part: int, pair: Pair, seed: int) -> None:
    chance = random.Random(seed)
    for index in range(20):
        execution = ("processes", "threads")[index % 2]
        how = chance.choice([how for how in HANGS if execution == "processes" or how in ("loop", "sleep")])
        hang(pair, how, execution, chance.choice(("auto", 1, 4)))


@pytest.mark.usefixtures("short_deadlines")
@pytest.mark.parametrize("execution", ["threads", "processes"])
def test_slow_work_is_not_taken_for_a_lane_that_stands_still(execution: str, tmp_path: Path) -> None:
    """A step takes longer than the deadline; a layer does not."""
    target = tiny_model("llama", 1)
    draft = make_hanging(tiny_model("llama", 2, num_hidden_layers=8), tmp_path / "what")
    assert 7 * SLOW_SECONDS > heartbeat.STUCK_SECONDS + heartbeat.CONFIRM_SECONDS > 2 * SLOW_SECONDS
    inputs = left_padded([[1, 2, 3]])
    options = {**inputs, "do_sample": False, "max_new_tokens": 2}
    expected = target.generate(**options)
    options["assistant_model"] = draft
    pearl = PearlConfig(execution=execution, draft_length=1)
    target.generate(**options, pearl=pearl)
    if execution == "processes":
        worker = engine_for(target, draft).workers.worker
        assert worker is not None and worker.wait_until_ready(START_SECONDS)
    (tmp_path / "what").write_text("slow")
    output = target.generate(**options, pearl=pearl, return_dict_in_generate=True)
    assert output.sequences.tolist() == expected.tolist()
    assert output.pearl.draft_seconds > 8 * SLOW_SECONDS
    hf_pearl.release(target)


@pytest.mark.slow
def test_a_loaded_machine_raises_no_alarm(pair: Pair) -> None:
    """Beside eight busy processes per core."""
    worker = pair.served()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8 * (os.cpu_count() or 1))]
    try:
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            for draft_length in (4, "auto"):
                assert not pair.call("processes", draft_length)[1]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert pair.worker() is worker


# -- lanes that die -----------------------------------------------------------------------------------------------


def kill_workers(pair: Pair, num_kills: int, chance: random.Random) -> None:
    """Every other while it starts, or soon after, the others in the midst of a call that they draft for."""
    for index in range(num_kills):
        worker = pair.served() if index % 2 else pair.worker()
        delay = chance.uniform(0.0, 0.2)
        killer = threading.Timer(delay, os.kill, (worker.process_id, signal.SIGKILL))
        killer.start()
        output, warnings = pair.call("processes", chance.choice((1, 4, "auto")))
        killer.join()
        assert output.pearl.execution == "processes", f"kill {index}: {output.pearl.execution}"
        assert all("exit code -9" in warning for warning in warnings), warnings
        worker._process._process.wait(START_SECONDS)
        assert not worker.is_alive
    pair.served()


def test_a_worker_killed_at_a_random_moment_is_survived(pair: Pair, seed: int) -> None:
    kill_workers(pair, 20, random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_five_hundred_killed_workers_are_survived(part: int, pair: Pair, seed: int) -> None:
    kill_workers(pair, 50, random.Random(seed))


def test_a_worker_that_always_dies_is_not_started_for_ever(pair: Pair) -> None:
    pair.served()
    for index in range(MAX_FAILURES):
        worker = pair.worker()
        os.kill(worker.process_id, signal.SIGKILL)
        worker._process._process.wait(START_SECONDS)
        output, warnings = pair.call("processes", "auto")
        assert output.pearl.execution == ("processes" if index < MAX_FAILURES - 1 else "threads")
    assert len(warnings) == 1 and "A thread serves" in warnings[0] and "exit code -9" in warnings[0]
    hf_pearl.release(pair.draft)
    assert pair.call("processes")[0].pearl.execution == "processes"


def test_a_worker_that_is_stopped_while_it_starts_is_replaced(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would start: who had stopped this one was not the model."""
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.8)
    hf_pearl.release(pair.draft)
    pair.call("processes", "auto")
    stopped = pair.worker()
    assert not stopped.is_ready
    os.kill(stopped.process_id, signal.SIGSTOP)
    deadline = time.monotonic() + START_SECONDS
    while stopped.is_alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "has been stopped" in stopped.why_it_ended()
    monkeypatch.undo()
    output, warnings = pair.call("processes", "auto")
    assert output.pearl.execution == "processes" and not warnings
    assert pair.served() is not stopped


def test_a_worker_that_runs_out_of_memory_is_survived(pair: Pair) -> None:
    """Its address space may not grow any more; memory may be missing anywhere, in the books of its cache too."""
    worker = pair.served()
    pages = int(Path(f"/proc/{worker.process_id}/statm").read_text().split()[0])
    size = pages * resource.getpagesize()
    resource.prlimit(worker.process_id, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    engine = engine_for(pair.target, pair.draft)
    prompts = random_prompts(random.Random(3), 40, (400,))
    options = {"do_sample": False, "max_new_tokens": 4}
    expected = pair.target.generate(**prompts, **options).tolist()
    with expected_warnings() as warnings:
        config = PearlConfig(execution="processes", draft_length=3, prefix_cache=False)
        output = pair.target.generate(**prompts, **options, assistant_model=pair.draft, pearl=config)
    assert output.tolist() == expected
    assert len(warnings) == 1 and ("MemoryError" in warnings[0] or "allocate" in warnings[0]), warnings
    assert engine.workers.worker is worker
    if worker.is_alive:
        resource.prlimit(worker.process_id, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pair.served()


# -- interrupts ---------------------------------------------------------------------------------------------------


def test_an_interrupt_is_kept_to_the_end_of_its_scope_and_let_through_inside() -> None:
    handler, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), KeptInterrupts() as interrupts:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        done.append(interrupts.has_come)
    with pytest.raises(KeyboardInterrupt), KeptInterrupts() as interrupts, interrupts.let_through():
        signal.raise_signal(signal.SIGINT)
        done.append("not reached")
    with pytest.raises(KeyboardInterrupt), KeptInterrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        with interrupts.let_through():
            done.append("not reached")
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("is_early", [True, False], ids=["before the scope inside", "inside"])
def test_a_second_interrupt_does_not_cut_the_clean_up_behind_the_first_one_short(is_early: bool) -> None:
    """Not even where the first one had come before it was let through: it is raised as that scope begins."""
    is_whole = False
    with pytest.raises(KeyboardInterrupt), KeptInterrupts() as interrupts:
        try:
            if is_early:
                signal.raise_signal(signal.SIGINT)
            with interrupts.let_through():
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            is_whole = True
    assert is_whole


@pytest.mark.parametrize("execution", ["inline", "threads", "processes"])
@pytest.mark.parametrize("where", ["_admit", "abort"])
def test_set_up_and_clear_up_are_whole_whenever_an_interrupt_comes(
    where: str, execution: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    if execution == "processes":
        worker = pair.served()
    kinds = {"inline": InlineDraft, "threads": ThreadDraft, "processes": ProcessDraft}
    owner = PearlEngine if where == "_admit" else kinds[execution]
    original, num_whole = getattr(owner, where), 0

    def interrupted(*args: Any) -> None:
        nonlocal num_whole
        signal.raise_signal(signal.SIGINT)
        original(*args)
        signal.raise_signal(signal.SIGINT)
        num_whole += 1

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, staticmethod(interrupted) if where == "_admit" else interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.call(execution)
    assert num_whole > 0
    output, warnings = pair.call(execution)
    assert not warnings and output.pearl.draft_steps > 0
    if execution == "processes":
        assert pair.worker() is worker


class ThreadWatch(StoppingCriteria):
    """Notes who would get an interrupt while the weak references of a draft lane's thread are told of its end."""

    def __init__(self) -> None:
        self.handlers: list[Any] = []
        self._references: dict[int, weakref.ref[threading.Thread]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for each in threading.enumerate():
            if each.name == "hf_pearl draft lane" and id(each) not in self._references:
                self._references[id(each)] = weakref.ref(each, self._note)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def _note(self, reference: weakref.ref[threading.Thread]) -> None:
        self.handlers.append(signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("draft_length", ["auto", 4])
def test_a_thread_goes_where_interrupts_are_kept(draft_length: int | str, pair: Pair) -> None:
    """Python itself has a weak reference to every thread, and drops an interrupt that is raised while that is told."""
    watch = ThreadWatch()
    config = PearlConfig(execution="threads", draft_length=draft_length)
    options = {**pair.inputs, **OPTIONS, "assistant_model": pair.draft, "pearl": config}
    pair.target.generate(**options, stopping_criteria=StoppingCriteriaList([watch]))
    (handler,) = watch.handlers
    assert isinstance(getattr(handler, "__self__", None), KeptInterrupts), handler


def interrupt(number: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(TESTS / "interrupted.py"), str(number), str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30.0 * number + 120.0)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_interrupts(number: int, seed: int, record_property: Any) -> None:
    found = interrupt(number, seed)
    record_property("longest seconds from interrupt to control", max(found["latencies"]))
    assert len(found["latencies"]) == number
    assert found["drafted"] > number / 2
    assert found["left"] == ""
    assert not Path(f"/proc/{found['worker']}").exists()


def test_an_interrupt_at_a_random_moment_is_obeyed(seed: int, record_property: Any) -> None:
    check_interrupts(30, seed, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_three_hundred_interrupts_are_obeyed(part: int, seed: int, record_property: Any) -> None:
    check_interrupts(100, seed, record_property)
