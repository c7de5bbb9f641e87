"""How near PEARL's default comes to what its schedule could do: `efficiency` = ideal / measured.

Every prompt is continued by PEARL's default, one at a time, on an engine that is warm: the worker runs, the draft is at
work, times and chances have been learnt on the same prompts; prompts are not cached. From this call come its wall time,
its text, and the times of both models beside each other: a straight line for a target forward over its tokens, another
for a draft step over its guesses, and how long each took to read the prompt. `ideal` is what the same schedule takes on
this text, with these times, in virtual time, where nothing but the models takes any (`decoding.simulation`). So reading
the prompt is part of both, as it was measured.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..decoding.policy import ForwardTimes
from ..decoding.simulation import Costs, KeptBetweenRuns, SimulatedRun, simulate_run
from ..traces import Trace, trace_of
from .completion import Workload
from .measurement import sharing_copy, warm_up
from .methods import PEARL
from .profile import Parts, Profile, profile

Figures = dict[str, Any]

SETTING = PEARL.candidates[0]


class Compared(NamedTuple):
    """A call, the models' times in it, and the same call in virtual time."""

    measured: Profile
    target: ForwardTimes
    draft: ForwardTimes
    ideal: SimulatedRun


class Breakdown(NamedTuple):
    """Seconds of some calls, and where those go that are not ideal.

    Attributes
    ----------
    measured, ideal : float
        All of them.
    outside, judging, rest : float
        As in `Parts`; none of them is in `ideal`.
    waiting : float
        For the draft, beyond the waiting in `ideal`.
    forwards : float
        Of the target, beyond those in `ideal`: for what the draft handed over late, or not at all.
    prefill : float
        Reading the prompts; a part of `ideal`.
    """

    measured: float
    ideal: float
    outside: float
    judging: float
    rest: float
    waiting: float
    forwards: float
    prefill: float

    @property
    def efficiency(self) -> float:
        """Ideal over measured."""
        return self.ideal / self.measured

    @property
    def decode_efficiency(self) -> float:
        """The same without reading the prompts."""
        return (self.ideal - self.prefill) / (self.measured - self.prefill)


def fitted(steps: Iterable[tuple[int, float]]) -> ForwardTimes:
    """The line of least squares through steps' seconds over their sizes."""
    times = ForwardTimes(memory=math.inf)
    for size, seconds in steps:
        times.record(size, seconds)
    return times


def compare(measured: Profile, trace: Trace, learnt: KeptBetweenRuns) -> Compared:
    """Run a measured call's schedule on its own text, with its own times, in virtual time."""
    target, draft = fitted(measured.target_steps), fitted(measured.draft_steps)
    costs = Costs(
        draft.seconds, target.seconds, draft_prefill=measured.draft_prefill, target_prefill=measured.parts.prefill
    )
    ideal = simulate_run([trace.guesses], costs, prompts=[trace.prompt_ids], learnt=learnt)
    return Compared(measured, target, draft, ideal)


def break_down(calls: Sequence[tuple[Parts, SimulatedRun]]) -> Breakdown:
    """Sum up calls, and what of them is not ideal."""
    parts = Parts(*(sum(values) for values in zip(*(parts for parts, _ in calls), strict=True)))
    ideal, computing = sum(run.seconds for _, run in calls), sum(run.stats.target_seconds for _, run in calls)
    return Breakdown(
        measured=sum(parts),
        ideal=ideal,
        outside=parts.outside,
        judging=parts.judging,
        rest=parts.rest,
        waiting=parts.waiting - (ideal - computing),
        forwards=parts.prefill + parts.forwards - computing,
        prefill=parts.prefill,
    )


def num_profiles(workload: Workload, num_runs: int) -> int:
    """How often `measure_efficiency` calls `advance`."""
    return (1 + num_runs) * len(workload.prompts)


def measure_efficiency(workload: Workload, num_runs: int, advance: Callable[[], object]) -> Figures:
    """All prompts `num_runs` times; `advance` is called before each call, the untimed first round's too.

    Everything is simulated afterwards, so that calls follow each other as they do where nobody measures.
    """
    workload = replace(workload, draft=sharing_copy(workload.draft))  # and so an engine of its own
    warm_up(workload, SETTING)

    def call(prompt: torch.Tensor) -> Profile:
        advance()
        return profile(workload, SETTING, (prompt,))

    rounds = [[call(prompt) for prompt in workload.prompts] for _ in range(1 + num_runs)]
    traced = functools.cache(functools.partial(_traced, workload))
    learnt = KeptBetweenRuns()
    compared = [
        [
            compare(measured, traced(tuple(prompt[0].tolist()), measured.completion.rows[0]), learnt)
            for prompt, measured in zip(workload.prompts, calls, strict=True)
        ]
        for calls in rounds  # The untimed one, too: the schedule learns in it.
    ]
    return figures(compared[1:])


def _traced(workload: Workload, prompt_ids: tuple[int, ...], row: tuple[int, ...]) -> Trace:
    models = workload.target, workload.draft
    return trace_of(*models, [*prompt_ids, *row], len(prompt_ids), workload.temperature, workload.seed)


def figures(runs: Sequence[Sequence[Compared]]) -> Figures:
    """What runs say, for a JSON file; parts are those of the run with the median efficiency."""
    breakdowns = [break_down([(call.measured.parts, call.ideal) for call in run]) for run in runs]
    efficiencies = [each.efficiency for each in breakdowns]
    index = efficiencies.index(statistics.median_low(efficiencies))
    run, breakdown = runs[index], breakdowns[index]
    num_tokens = sum(call.measured.completion.num_tokens for call in run)
    return {
        "efficiency": breakdown.efficiency,
        "decode_efficiency": breakdown.decode_efficiency,
        "runs": efficiencies,
        "num_tokens": num_tokens,
        "tokens_per_second": num_tokens / breakdown.measured,
        "seconds": breakdown._asdict(),
        "target": _line([call.target for call in run]),
        "draft": _line([call.draft for call in run]),
        "measured": _counts([call.measured.completion.stats for call in run]),
        "ideal": _counts([call.ideal.stats for call in run]),
    }


def _line(fits: Sequence[ForwardTimes]) -> dict[str, float]:
    """Milliseconds of a step over one token or guess, and of each further one: medians over calls."""
    return {
        "first_ms": 1e3 * statistics.median(fit.seconds(1) for fit in fits),
        "further_ms": 1e3 * statistics.median(fit.per_token for fit in fits),
    }


def _counts(stats: Sequence[Any]) -> dict[str, int]:
    names = ("target_forwards", "undrafted_forwards", "verified_draft_tokens", "accepted_tokens")
    return {name: sum(getattr(each, name) for each in stats) for name in (*names, "accepted_looked_up_tokens")}
