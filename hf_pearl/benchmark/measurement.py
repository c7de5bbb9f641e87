"""Run the methods in turns, each at the setting that a short trial found best."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import described_error
from ..parallel.cores import available_cores
from ..registry import engines_of, release
from .completion import Batch, Completion, Workload, complete
from .methods import Method, Setting
from .near_tie import first_difference, is_near_tie
from .results import MethodResult
from .warming import warm_graphs

NUM_TRIALS = 2
TRIAL_CALLS = 2
TRIAL_TOKENS = 32
START_SECONDS = 30.0
MAX_IDLE_CALLS = 16  # a call of two tokens is one decode step, and the first steps are made without the draft
HOPELESS = 1.5  # times the best
WARM_UP = (
    f"every method once, untimed, until its draft works; then every number of threads, and at the best one every draft "
    f"length: {TRIAL_TOKENS} tokens of each prompt of {TRIAL_CALLS} calls, the better of {NUM_TRIALS} times"
)

Advance = Callable[[str], object]


@dataclass(frozen=True)
class Measurement:
    """All methods on one workload; `results` is in the order in which they were given."""

    workload: Workload
    results: tuple[MethodResult, ...]

    def result(self, name: str) -> MethodResult:
        """Of the method `name`."""
        return next(result for result in self.results if result.name == name)

    @property
    def compared(self) -> list[MethodResult]:
        """The methods whose output must be the reference's: ours, and when greedy transformers' too."""
        reference = reference_name(self.workload)
        return [
            result
            for result in self.results
            if result.runs and result.name != reference and (result.method.is_ours or not self.workload.temperature)
        ]

    @property
    def num_first_differences(self) -> int:
        """Texts that part from the reference's."""
        return sum(result.num_first_differences for result in self.compared)

    @property
    def num_near_ties(self) -> int:
        """How many of them do so where the target finds both tokens equally good, as far as its rounding can tell."""
        return sum(result.num_near_ties for result in self.compared)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return {
            "methods": [result.as_dict() for result in self.results],
            "same_output": self.num_first_differences == 0,
            "first_differences": self.num_first_differences,
            "near_ties": self.num_near_ties,
            "num_runs": max(len(result.runs) for result in self.results),
            "warm_up": WARM_UP,
            "workload": self.workload.as_dict(),
        }


def reference_name(workload: Workload) -> str:
    """The method whose output is right: transformers' when greedy; when sampling, ours without a draft."""
    return "engine" if workload.temperature else "generate"


def measure(
    workload: Workload, methods: Sequence[Method], num_runs: int, advance: Advance = str, unattended: bool = False
) -> Measurement:
    """Measure every method `num_runs` times on every prompt, in turns.

    Every method has a draft of its own, with the same weights, and so an engine and a worker of its own: what one
    learns about its times says nothing about those of another. They end with the measurement.

    Parameters
    ----------
    advance : callable
        Called with a method's name before it is warmed up, before each of its trials and before each of its calls.
    unattended : bool
        As on a GPU that is there but once: our methods are called before their trials until they capture no more CUDA
        graphs; and any method but `generate` may fail, which is noted as its error.
    """
    drafts = {each.name: workload.draft if each.runs_on_pair else sharing_copy(workload.draft) for each in methods}
    own = {name: replace(workload, draft=draft) for name, draft in drafts.items()}
    try:
        results = _run_in_turns(own, methods, num_runs, advance, unattended)
    finally:
        for draft in drafts.values():
            if draft is not workload.draft:
                release(draft)
    reference = results[reference_name(workload)].runs[0]
    return Measurement(workload, tuple(_compared(workload, results[method.name], reference) for method in methods))


def _run_in_turns(
    own: Mapping[str, Workload], methods: Sequence[Method], num_runs: int, advance: Advance, unattended: bool
) -> dict[str, MethodResult]:
    """What every method did, by name, on the workload with its own draft."""
    chosen: dict[str, Setting] = {}
    results: dict[str, MethodResult] = {}
    for method in methods:
        try:
            chosen[method.name] = choose(own[method.name], method, advance, unattended and method.is_ours)
        except Exception as error:
            is_unsupported = not method.is_ours and isinstance(error, ValueError | IndexError)
            if method.name == "generate" or not (unattended or is_unsupported):
                raise
            results[method.name] = MethodResult(method, error=str(error))
    runs: dict[str, list[list[Completion]]] = {name: [[] for _ in range(num_runs)] for name in chosen}
    turns = list(chosen)
    for run in range(num_runs):
        for batch in next(iter(own.values())).batches:
            for name in [each for each in turns if each not in results]:
                advance(name)
                try:
                    runs[name][run].append(complete(own[name], chosen[name], batch))
                except Exception as error:
                    if name == "generate" or not unattended:
                        raise
                    method = next(each for each in methods if each.name == name)
                    results[name] = MethodResult(method, error=described_error(error))
            turns = [*turns[1:], turns[0]]  # Nobody always runs behind the same one.
    for method in methods:
        if method.name not in results:
            results[method.name] = MethodResult(method, chosen[method.name], tuple(map(tuple, runs[method.name])))
    return results


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Another model with the same weights in the same memory."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def num_calls(workload: Workload, methods: Sequence[Method], num_runs: int) -> int:
    """How often `measure` calls `advance` at most."""
    trials = 0
    for method in methods:
        num_counts = len(thread_counts(workload.target.device)) if method.tries_threads else 1
        trials += 1 + sum(NUM_TRIALS * n for n in (num_counts, len(method.candidates)) if n > 1)
    return trials + num_runs * len(methods) * len(workload.batches)


def thread_counts(device: torch.device, execution: str = "none") -> list[int]:
    """Numbers of intra-op threads worth a trial: powers of two up to torch's own choice (cores, OMP_NUM_THREADS).

    Where the draft runs in a process of its own, the engine leaves it a core while it works, and takes it back else:
    counts from there on are tried as one.
    """
    most = torch.get_num_threads()
    if device.type != "cpu":
        return [most]
    beside_draft = len(available_cores()) - 1 if execution == "processes" else most
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i < min(beside_draft, most))})


def choose(workload: Workload, method: Method, advance: Advance = str, warms_graphs: bool = False) -> Setting:
    """The fastest setting of a method: the best number of threads for its default, then the best of its variants."""
    default, *variants = method.candidates
    advance(method.name)
    stats = warm_up(workload, default).stats
    if warms_graphs:
        warm_graphs(workload, method.candidates)
    workload = replace(workload, max_new_tokens=min(TRIAL_TOKENS, workload.max_new_tokens))

    def seconds_per_token(setting: Setting) -> float:
        advance(method.name)
        done = [complete(workload, setting, batch) for batch in trial_batches(workload)]
        return sum(each.seconds for each in done) / sum(each.num_tokens for each in done)

    if not method.tries_threads:
        return _fastest(method.candidates, seconds_per_token)
    counts = thread_counts(workload.target.device, "none" if stats is None else stats.execution)
    best = _fastest([replace(default, num_threads=count) for count in counts], seconds_per_token)
    return _fastest([best, *(replace(each, num_threads=best.num_threads) for each in variants)], seconds_per_token)


def trial_batches(workload: Workload) -> tuple[Batch, ...]:
    """The calls that a trial makes, evenly spread."""
    return workload.batches[:: -(-len(workload.batches) // TRIAL_CALLS)]


def warm_up(workload: Workload, setting: Setting) -> Completion:
    """Call `generate`; where the draft runs beside it, until it takes part: it may need seconds to start.

    Once it has started, `MAX_IDLE_CALLS` are enough: it never takes part where texts end with their first token, and
    seldom where it is known not to pay.
    """
    workload = replace(workload, max_new_tokens=min(TRIAL_TOKENS, workload.max_new_tokens))
    batch: Batch = tuple(prompt[:, :16] for prompt in workload.batches[0])
    deadline, num_idle = time.monotonic() + START_SECONDS, 0
    while True:
        num_idle += not _is_starting(workload.draft)
        done = complete(workload, setting, batch)
        stats = done.stats
        if stats is None or not setting.uses_draft or stats.draft_steps:
            return done
        if num_idle >= MAX_IDLE_CALLS or time.monotonic() > deadline:
            return done


def _is_starting(draft: PreTrainedModel) -> bool:
    """Whether a process that is to run a draft is not ready yet."""
    workers = [engine.workers.worker for engine in engines_of(draft)]
    return any(worker is not None and worker.is_alive and not worker.is_ready for worker in workers)


def _fastest(candidates: Sequence[Setting], seconds_per_token: Callable[[Setting], float]) -> Setting:
    """Try every setting; one that is far behind after the first time is not tried again."""
    if len(candidates) == 1:
        return candidates[0]
    times = [0.0] * len(candidates)
    for _ in range(NUM_TRIALS):
        limit = HOPELESS * min(times) if min(times) else float("inf")
        for index, setting in enumerate(candidates):
            if times[index] <= limit:
                seconds = seconds_per_token(setting)
                times[index] = min(times[index] or seconds, seconds)
    return candidates[times.index(min(times))]


def _compared(workload: Workload, result: MethodResult, reference: Sequence[Completion]) -> MethodResult:
    """Count where a method's texts part from the reference's."""
    if workload.temperature and not result.method.is_ours:
        return result  # transformers draws its own noise.
    parted = [
        is_near_tie(workload.target, prompt, right, text, workload.temperature, workload.seed, row)
        for run in result.runs
        for batch, expected, got in zip(workload.batches, reference, run, strict=True)
        for row, (prompt, right, text) in enumerate(zip(batch, expected.rows, got.rows, strict=True))
        if first_difference(right, text) is not None
    ]
    num_wrong = len(parted) - sum(parted)
    error = f"wrong: {num_wrong} texts differ from those of {reference_name(workload)}" if num_wrong else result.error
    return replace(result, num_first_differences=len(parted), num_near_ties=sum(parted), error=error)
