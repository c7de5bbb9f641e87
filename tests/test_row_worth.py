"""A token counts by how much it shortens the call."""

from __future__ import annotations

import pytest

from hf_pearl.decoding.policy import Cycles, Pace
from hf_pearl.decoding.request import Request
from hf_pearl.decoding.row_worth import row_worths
from hf_pearl.decoding.schedule import Choices, FreeRunning

MAX_LENGTH = 101


def rows(*num_verified: int) -> list[Request]:
    return [Request(row, 1, (), MAX_LENGTH, [0] * num) for row, num in enumerate(num_verified)]


def cycles(seconds_per_cycle: float, seconds_per_token: float, tokens_per_row: int = 2) -> Cycles:
    found = Cycles()
    for num_tokens in (4, 5, 6, 8):
        found.record(2, 2 * tokens_per_row, 1.0)
        found.times.record(num_tokens, seconds_per_cycle + seconds_per_token * num_tokens)
    return found


def test_rows_that_are_level_count_the_same() -> None:
    assert list(row_worths(rows(40, 40, 40), cycles(7.0, 0.3)).values()) == pytest.approx([1.0] * 3)


def test_a_token_of_the_row_that_ends_last_is_worth_a_cycle_and_one_of_the_others_only_its_own_time() -> None:
    worths = row_worths(rows(1, 100), cycles(7.0, 0.3))
    average = 0.3 + 7.0 / 2
    assert worths == {0: pytest.approx(7.3 / average, rel=0.01), 1: pytest.approx(0.3 / average, rel=0.02)}


@pytest.mark.parametrize("lengths", [(10, 20), (1, 50, 90), (30, 31, 32, 33)])
def test_a_row_that_is_behind_counts_more_and_all_count_one_on_average(lengths: tuple[int, ...]) -> None:
    worths = list(row_worths(rows(*lengths), cycles(7.0, 0.3)).values())
    assert worths == sorted(worths, reverse=True) and worths[0] > worths[-1]
    assert sum(worths) == pytest.approx(len(lengths))


def test_a_lead_counts_less_where_rows_advance_by_leaps() -> None:
    steady, leaping = (row_worths(rows(30, 50), cycles(7.0, 0.3, num))[0] for num in (2, 9))
    assert 1.0 < leaping < steady


@pytest.mark.parametrize("weighs_rows", [True, False])
def test_a_schedule_may_leave_it_out(weighs_rows: bool) -> None:
    pace, requests = Pace(), rows(1, 90)
    pace._cycles[(2).bit_length()] = cycles(7.0, 0.3)
    schedule = FreeRunning(None, pace, choices=Choices(weighs_rows=weighs_rows))  # type: ignore[arg-type]
    schedule._begin(requests, pace)
    assert (schedule._worths[0] == schedule._worths[1] == 1.0) == (not weighs_rows)


@pytest.mark.parametrize("known", [Cycles(), cycles(0.0, 0.0)], ids=["nothing is known", "nothing takes time"])
def test_without_times_all_rows_count_the_same(known: Cycles) -> None:
    assert row_worths(rows(1, 90), known) == {0: 1.0, 1: 1.0}
