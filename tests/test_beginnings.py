"""How much longer calls take to begin with the draft, per cycle of decoding."""

from __future__ import annotations

import pytest

from hf_pearl.decoding.beginnings import Beginnings


def begin(beginnings: Beginnings, is_drafted: bool, seconds: float, num_cycles: int) -> None:
    beginnings.record_prefill(is_drafted, 100, seconds)
    for _ in range(num_cycles):
        beginnings.record_cycle()


@pytest.mark.parametrize("num_cycles", [10, 40])
def test_it_is_spread_over_the_cycles_of_a_call(num_cycles: int) -> None:
    beginnings = Beginnings()
    for _ in range(200):
        begin(beginnings, False, 1.0, num_cycles)
        begin(beginnings, True, 1.5, num_cycles)
        beginnings.record_delay(0.1)
    assert beginnings.seconds_per_cycle == pytest.approx(0.6 / num_cycles, rel=0.05)


def test_nothing_is_known_until_both_were_seen() -> None:
    beginnings = Beginnings()
    assert beginnings.seconds_per_cycle == 0.0
    begin(beginnings, True, 1.5, 10)
    assert beginnings.seconds_per_cycle == 0.0
    begin(beginnings, False, 1.0, 10)
    assert beginnings.seconds_per_cycle > 0.0
    assert not beginnings.asks_for_plain()


def test_a_call_is_asked_to_begin_without_the_draft_once() -> None:
    """Whether or not it had anything to read: every later call would lose its first guesses."""
    beginnings = Beginnings()
    assert [beginnings.asks_for_plain() for _ in range(3)] == [True, False, False]


def test_a_draft_beside_which_prompts_are_read_faster_gets_nothing_for_it() -> None:
    beginnings = Beginnings()
    for is_drafted, seconds in ((False, 2.0), (True, 1.0)):
        begin(beginnings, is_drafted, seconds, 10)
    assert beginnings.seconds_per_cycle == 0.0
