"""How long schedules would take on a recorded text, exactly, if nothing but the two models took time.

traces = hf_pearl.record_traces(target, draft, [tokenizer(text).input_ids for text in texts])
times = hf_pearl.simulate(traces, draft_step=lambda guesses: 0.9e-3, target_forward=lambda tokens: 7e-3)
print(times, times.efficiency(measured_seconds))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .decoding.simulation import Costs, KeptBetweenRuns, simulate_run
from .traces import Trace, checked_traces

DRAFT_LENGTHS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32)  # as far as `PearlConfig` goes


class SimulatedTimes(NamedTuple):
    """Seconds that all traces take, one after the other.

    Attributes
    ----------
    plain : float
        The target alone.
    sequential : float
        Ordinary speculative decoding with its best fixed draft length (Leviathan et al. 2023, arXiv 2211.17192), of
        `DRAFT_LENGTHS`.
    sequential_length : int
        That length.
    lockstep : float
        PEARL with its best fixed draft length (arXiv 2408.11850), likewise.
    lockstep_length : int
        That length.
    pearl : float
        The default of this package: free-running, with a tree.
    bound : float
        The draft is never waited for: the target always verifies just as many of its likeliest guesses as stand, and
        nobody else takes time. No schedule of a single line is faster if a target forward over more tokens takes no
        less time, and one over tokens together no more than several over parts of them. Where one takes more, short
        windows, or none, may be faster. The draft's second guesses, and text that is looked up, may carry `pearl`
        beyond it, too.
    """

    plain: float
    sequential: float
    sequential_length: int
    lockstep: float
    lockstep_length: int
    pearl: float
    bound: float

    def efficiency(self, measured_seconds: float) -> float:
        """Which share of a measured time PEARL would take if nothing but the models took time.

        Raises
        ------
        TypeError, ValueError
            What is no number, or not positive and finite.
        """
        seconds = _number(measured_seconds)
        if seconds is None:
            raise TypeError(f"`measured_seconds` must be a number of seconds, got {measured_seconds!r}.")
        if not 0.0 < seconds < math.inf:
            raise ValueError(f"`measured_seconds` must be positive and finite, got {seconds}.")
        return self.pearl / seconds


def simulate(
    traces: Sequence[Trace], draft_step: Callable[[int], float], target_forward: Callable[[int], float]
) -> SimulatedTimes:
    """How long every schedule would take on recorded traces, one after the other.

    PEARL's schedules are not modelled but run, under a virtual clock. What they learn of a trace they know in the next,
    as an engine does. Prompts are taken to be cached: they take no time.

    Parameters
    ----------
    traces : sequence of trace
        As `record_traces` makes them.
    draft_step : callable
        Seconds of a draft step over so many guesses.
    target_forward : callable
        Seconds of a target forward over so many tokens.

    Returns
    -------
    SimulatedTimes
        Seconds of every schedule, all traces together.

    Raises
    ------
    TypeError, ValueError
        What is no traces, or none; or times that are no functions, or none that can pass.
    """
    traces = checked_traces(traces)
    costs = Costs(_timed("draft_step", draft_step), _timed("target_forward", target_forward))

    def seconds(draft_length: int | str | None, overlap: bool = True) -> float:
        learnt, rows = KeptBetweenRuns(), [([trace.guesses], [trace.prompt_ids]) for trace in traces]
        return sum(
            simulate_run(guesses, costs, draft_length, overlap, prompts=prompts, learnt=learnt).seconds
            for guesses, prompts in rows
        )

    sequential, sequential_length = _best(lambda length: seconds(length, overlap=False))
    lockstep, lockstep_length = _best(seconds)
    return SimulatedTimes(
        plain=seconds(None),
        sequential=sequential,
        sequential_length=sequential_length,
        lockstep=lockstep,
        lockstep_length=lockstep_length,
        pearl=seconds("auto"),
        bound=sum(_bound(trace, costs.target_forward) for trace in traces),
    )


def _timed(name: str, seconds: Any) -> Callable[[int], float]:
    """A function of seconds that refuses what is no time."""
    if not callable(seconds):
        raise TypeError(
            f"`{name}` must be a function from a number of tokens to seconds, such as `lambda tokens: 1e-3`; got a "
            f"{type(seconds).__name__}."
        )

    @functools.cache
    def timed(size: int) -> float:
        returned = seconds(size)
        value = _number(returned)
        if value is None:
            raise TypeError(f"`{name}` must return a number of seconds; for {size} it returned {returned!r}.")
        if not 0.0 <= value < math.inf:
            raise ValueError(f"`{name}` must return seconds, 0 or more and finite; for {size} it returned {value}.")
        return value

    return timed


def _number(value: Any) -> float | None:
    """A number, of whatever library, as a float; None for what is none."""
    if isinstance(value, (str, bytes, bool)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # The last of a tensor that is not one number.
        return None


def _best(seconds: Callable[[int], float]) -> tuple[float, int]:
    """The least time of `DRAFT_LENGTHS`, and the length that it comes of.

    All are tried: where a forward over two tokens takes much longer than one over one, only long ones gain.
    """
    return min((seconds(length), length) for length in DRAFT_LENGTHS)


def _bound(trace: Trace, target_forward: Callable[[int], float]) -> float:
    """Each forward verifies all guesses that stand, and its own token replaces the first that does not."""
    total, num_stood = 0.0, 0
    for guess in trace.guesses:
        if guess.stands:
            num_stood += 1
        else:
            total += target_forward(1 + num_stood)
            num_stood = 0
    return total + (target_forward(num_stood) if num_stood else 0.0)
