"""Run the methods in turns, each at the setting that a short trial found best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .methods import METHODS, OURS, Completion, Setting, Workload, complete, settings, thread_counts
from .near_tie import first_difference, is_near_tie
from .results import MethodResult

NUM_TRIALS = 2
TRIAL_TOKENS = 48
START_SECONDS = 30.0
HOPELESS = 1.5  # times the best
WARM_UP = (
    f"every method once, untimed, until its draft works; then every number of threads, and at the best one every draft "
    f"length: {TRIAL_TOKENS} tokens of the first prompt each, the better of {NUM_TRIALS} times"
)

Advance = Callable[[str], object]


@dataclass(frozen=True)
class Measurement:
    """All methods on one workload; `results` is in the order of `METHODS`."""

    workload: Workload
    results: tuple[MethodResult, ...]

    def result(self, name: str) -> MethodResult:
        """Of the method `name`."""
        return next(result for result in self.results if result.name == name)

    def speedup_over(self, name: str) -> float | None:
        """PEARL's tokens per second over those of the method `name`; None where that could not run."""
        theirs, pearl = self.result(name).tokens_per_second, self.result("pearl").tokens_per_second
        return pearl / theirs if pearl and theirs else None

    @property
    def num_first_differences(self) -> int:
        """Completions of our methods that part from the reference's."""
        return sum(result.num_first_differences for result in self.results if result.name in OURS)

    @property
    def num_near_ties(self) -> int:
        """How many of them do so where the target finds both tokens equally good, as far as its rounding can tell."""
        return sum(result.num_near_ties for result in self.results if result.name in OURS)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return {
            "methods": [result.as_dict() for result in self.results],
            "speedup_over_generate": self.speedup_over("generate"),
            "speedup_over_assisted": self.speedup_over("assisted"),
            "mean_accepted_tokens": self.result("pearl").mean_accepted_tokens,
            "same_output": self.num_first_differences == 0,
            "first_differences": self.num_first_differences,
            "near_ties": self.num_near_ties,
            "num_runs": len(self.result("pearl").runs),
            "warm_up": WARM_UP,
            "workload": {
                "num_prompts": len(self.workload.prompts),
                "prompt_tokens": [prompt.shape[1] for prompt in self.workload.prompts],
                "max_new_tokens": self.workload.max_new_tokens,
                "temperature": self.workload.temperature,
                "seed": self.workload.seed,
                "dtype": str(self.workload.target.dtype).removeprefix("torch."),
                "device": str(self.workload.target.device),
            },
        }


def measure(workload: Workload, num_runs: int, advance: Advance = str) -> Measurement:
    """Measure every method `num_runs` times on every prompt, in turns.

    Parameters
    ----------
    advance : callable
        Called with a method's name before each of the `num_calls` calls.
    """
    chosen: dict[str, Setting] = {}
    errors: dict[str, MethodResult] = {}
    for method in METHODS:
        try:
            chosen[method] = choose(workload, method, advance)
        except (ValueError, IndexError) as error:
            if method != "assisted":
                raise
            errors[method] = MethodResult(Setting(method), error=str(error))  # What transformers does not support.
    runs: dict[str, list[list[Completion]]] = {method: [[] for _ in range(num_runs)] for method in chosen}
    turns = list(chosen)
    for run in range(num_runs):
        for prompt in workload.prompts:
            for method in turns:
                advance(method)
                runs[method][run].append(complete(workload, chosen[method], prompt))
            turns = [*turns[1:], turns[0]]  # Nobody always runs behind the same one.
    results = [MethodResult(chosen[method], tuple(map(tuple, runs[method]))) for method in chosen]
    by_name = {result.name: _compared(workload, result, results) for result in results} | errors
    return Measurement(workload, tuple(by_name[method] for method in METHODS))


def num_calls(workload: Workload, num_runs: int) -> int:
    """How often `measure` calls `generate`, warm-up included, if every method runs."""
    num_counts = len(thread_counts(workload.target.device))
    trials = 0
    for method in METHODS:
        trials += 1 + sum(NUM_TRIALS * n for n in (num_counts, len(settings(method))) if n > 1)
    return trials + num_runs * len(METHODS) * len(workload.prompts)


def choose(workload: Workload, method: str, advance: Advance = str) -> Setting:
    """The fastest setting of a method: the best number of threads for its default, then the best of its variants."""
    candidates = settings(method)
    workload = replace(workload, max_new_tokens=min(TRIAL_TOKENS, workload.max_new_tokens))
    advance(method)
    warm_up(workload, candidates[0])
    counts = thread_counts(workload.target.device)
    best = _fastest(workload, [replace(candidates[0], num_threads=count) for count in counts], advance)
    others = [replace(each, num_threads=best.num_threads) for each in candidates[1:]]
    return _fastest(workload, [best, *others], advance)


def warm_up(workload: Workload, setting: Setting) -> None:
    """Call `generate` untimed; where the draft runs beside it, until it takes part: it may need seconds to start."""
    workload, prompt = replace(workload, max_new_tokens=TRIAL_TOKENS), workload.prompts[0][:, :16]
    deadline = time.monotonic() + START_SECONDS
    while True:
        stats = complete(workload, setting, prompt).stats
        if stats is None or not setting.uses_draft or stats.draft_steps or time.monotonic() > deadline:
            return


def _fastest(workload: Workload, candidates: Sequence[Setting], advance: Advance) -> Setting:
    """Try every setting; one that is far behind after the first time is not tried again."""
    if len(candidates) == 1:
        return candidates[0]
    times = [0.0] * len(candidates)
    for _ in range(NUM_TRIALS):
        limit = HOPELESS * min(times) if min(times) else float("inf")
        for index, setting in enumerate(candidates):
            advance(setting.method)
            if times[index] <= limit:
                completion = complete(workload, setting, workload.prompts[0])
                seconds = completion.seconds / len(completion.token_ids)
                times[index] = min(times[index] or seconds, seconds)
    return candidates[times.index(min(times))]


def _compared(workload: Workload, result: MethodResult, results: Sequence[MethodResult]) -> MethodResult:
    """Count where a method parts from the reference: `generate` if greedy, else our engine without a draft."""
    reference_name = "engine" if workload.temperature else "generate"
    if workload.temperature and result.name not in OURS:
        return result  # They draw their own noise.
    reference = next(each for each in results if each.name == reference_name).runs[0]
    parted = [
        is_near_tie(workload.target, prompt, right.token_ids, each.token_ids, workload.temperature, workload.seed)
        for run in result.runs
        for prompt, right, each in zip(workload.prompts, reference, run, strict=True)
        if first_difference(right.token_ids, each.token_ids) is not None
    ]
    return replace(result, num_first_differences=len(parted), num_near_ties=sum(parted))
