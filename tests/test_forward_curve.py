"""How many guesses a forward verifies follows from what forwards take, whatever shape that has."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_pearl.decoding.forward_curve import MAX_TOKENS, ForwardCurve, best_count
from hf_pearl.decoding.guesses import Guesses
from hf_pearl.decoding.policy import Pace
from hf_pearl.decoding.recorded import TracedGuess
from hf_pearl.decoding.schedule import FreeRunning
from hf_pearl.decoding.simulation import Costs, simulate_run


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=30),
    st.lists(st.floats(0.0, 2.0), min_size=31, max_size=31),
    st.floats(0.01, 3.0),
)
def test_the_best_forward_is_found_where_all_sizes_are_known(
    chances: list[float], steps: list[float], rate: float
) -> None:
    """Fewer guesses than there are only where that gains clearly more."""
    chances = sorted(chances, reverse=True)
    seconds = (5.0 + np.cumsum(steps)[: len(chances) + 1]).tolist()
    gains = [sum(chances[:count]) - rate * (seconds[count] - seconds[0]) for count in range(len(seconds))]
    best = best_count(4, chances, seconds, rate)
    assert best is not None and best.num_guesses <= len(chances)
    if best.num_guesses < len(chances):
        assert gains[best.num_guesses] == pytest.approx(max(gains)) == best.gain
    else:
        assert max(gains) - gains[-1] <= 0.1 * rate * seconds[-1] + 1e-9


def test_nothing_is_known_at_first_and_windows_double() -> None:
    curve, sizes = ForwardCurve(), [4]
    assert best_count(4, [0.9] * 40, curve.seconds(4, 44), 1.0) is None
    while sizes[-1] < 44:
        curve.record(sizes[-1], 8.0)
        best = best_count(4, [0.9] * 40, curve.seconds(4, 44), 0.1)
        assert best is not None
        sizes.append(4 + best.num_guesses)
    assert len(sizes) < 10 and all(later <= 2 * size for size, later in itertools.pairwise(sizes))


@pytest.mark.parametrize("num_seen", [1, 2, 3])
def test_of_equally_likely_guesses_as_many_are_verified_as_are_worth_it(num_seen: int) -> None:
    """None would be, if the chance of the first that is left out were the limit: nothing more would be learnt then."""
    pace = Pace()
    pace.record_cycle(1, num_seen, 1, 8.0, 0.0)
    schedule = FreeRunning(None, pace)  # type: ignore[arg-type]
    guesses = Guesses(tuple(range(9)), (-1, 0, 1, -1, 3, -1, 5, 6, 7), (0.5,) * 9, (False,) * 9)
    kept = schedule._trimmed({7: guesses})[7]
    assert kept == guesses.first(2 * num_seen - 1)


def test_sizes_tell_of_their_neighbours_and_old_forwards_are_forgotten() -> None:
    curve = ForwardCurve()
    for _ in range(50):
        curve.record(40, 2.0)
    seconds = curve.seconds(0, 60)
    assert seconds[40] == pytest.approx(2.0) and np.isnan(seconds[30]) and np.isnan(seconds[50])
    for _ in range(3000):
        curve.record(40, 4.0)
    assert curve.seconds(40, 40)[0] == pytest.approx(4.0, rel=0.01)
    curve.record(MAX_TOKENS + 1, 1.0)  # no tree of guesses makes it that wide
    assert len(curve.seconds(MAX_TOKENS - 1, MAX_TOKENS + 5)) == 2


Shape = Callable[[int], float]
SHAPES: dict[str, tuple[int, float, Shape]] = {
    "free up to 32 tokens, then dear": (8, 0.9, lambda num: 8 + 2 * max(0, num - 32)),
    "free up to 32 tokens, then less so": (8, 0.9, lambda num: 8 + 0.5 * max(0, num - 32)),
    "in steps of 16": (4, 0.9, lambda num: 8.0 * math.ceil(num / 16)),
    "one row, free up to 8 tokens": (1, 0.95, lambda num: 8 + 4 * max(0, num - 8)),
    "a line": (4, 0.8, lambda num: 8 + 0.2 * num),
}


@pytest.mark.parametrize("num_tokens", [500, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_finds_where_a_forward_stops_being_flat(shape: str, num_tokens: int) -> None:
    """Within a quarter of the best fixed length of all, what it takes to find that out included.

    A line through all sizes, which stood here before, took 15091 s in the first case with 1,500 tokens per row, where
    plain decoding takes 12000.
    """
    num_rows, chance, target = SHAPES[shape]
    dice = random.Random(0)
    traces = [[TracedGuess(dice.random() < chance, chance) for _ in range(num_tokens)] for _ in range(num_rows)]
    costs = Costs(lambda num_guesses: 0.3 + 0.01 * (num_guesses - 1), target)
    prompts = [(row,) for row in range(num_rows)]

    def seconds(draft_length: int | None, overlap: bool) -> float:
        return simulate_run(traces, costs, draft_length, overlap, prompts=prompts).seconds

    fixed = min(seconds(length, overlap) for length in (1, 2, 3, 4, 5, 7, 10) for overlap in (True, False))
    assert simulate_run(traces, costs, prompts=prompts).seconds < 1.25 * fixed
