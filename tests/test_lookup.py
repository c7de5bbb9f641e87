"""Guesses that are looked up in prompt and output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import enabled_for_tiny_models

from hf_pearl.decoding.lines import Lines
from hf_pearl.decoding.lookup import MAX_MATCH, MIN_MATCH, LookupChances, PromptLookup
from hf_pearl.decoding.messages import TokenTree
from hf_pearl.decoding.policy import Pace
from hf_pearl.decoding.recorded import TracedGuess
from hf_pearl.decoding.request import Request
from hf_pearl.decoding.schedule import FreeRunning
from hf_pearl.decoding.simulation import Costs, simulate_run

TEXTS = st.lists(st.integers(0, 2), max_size=40)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def index(token_ids: Sequence[int]) -> PromptLookup:
    lookup = PromptLookup()
    lookup.extend(token_ids)
    return lookup


def naive_continuation(verified: list[int], line: list[int], num_tokens: int) -> tuple[list[int], int]:
    """By search: the last place in `verified` behind the last three tokens of all, or else the last two."""
    text = verified + line
    for size in (MIN_MATCH + 1, MIN_MATCH):
        for place in range(len(verified) - 1, size - 1, -1):
            if len(text) >= size and verified[place - size : place] == text[-size:]:
                match = size
                while (
                    match < MAX_MATCH
                    and place > match
                    and len(text) > match
                    and verified[place - match - 1] == text[-match - 1]
                ):
                    match += 1
                while len(text) < len(verified) + len(line) + num_tokens:
                    text = [*text, text[place]]
                    place += 1
                return text[len(verified) + len(line) :], match
    return [], 0


@given(TEXTS, st.lists(st.integers(0, 2), max_size=5), st.integers(0, 12), st.integers(0, 40))
def test_it_finds_what_a_search_finds(verified: list[int], line: list[int], num_tokens: int, first: int) -> None:
    lookup = index(verified[:first])
    lookup.extend(verified[first:])
    assert lookup.continuation(line, num_tokens) == naive_continuation(verified, line, num_tokens)


def test_repetition_is_continued_beyond_its_end() -> None:
    assert index([7, 1, 2, 3, 1, 2]).continuation((), 7) == ([3, 1, 2, 3, 1, 2, 3], 2)
    assert index([7, 1, 2, 3, 1]).continuation((2, 3), 4) == ([1, 2, 3, 1], 3)


def test_chances_are_learnt_by_matching_tokens() -> None:
    chances = LookupChances()
    assert chances.chance(2) < chances.chance(3) < chances.chance(MAX_MATCH) == chances.chance(10 * MAX_MATCH)
    for _ in range(300):
        chances.judge(3, False)
        chances.judge(50, True)
    assert chances.chance(3) < 0.1 < 0.9 < chances.chance(MAX_MATCH)
    assert chances.chance(4) == LookupChances().chance(4)


def request(token_ids: Sequence[int], room: int = 100) -> Request:
    return Request(0, len(token_ids), (), len(token_ids) + 1 + room, list(token_ids))


def tree(root: int, token_ids: tuple[int, ...], chance: float) -> TokenTree:
    return TokenTree(0, 0, 0, root, token_ids, tuple(range(-1, len(token_ids) - 1)), (chance,) * len(token_ids))


def test_the_better_line_is_taken_and_a_drafted_one_goes_on_with_what_is_looked_up() -> None:
    lines, row = Lines(LookupChances()), request([1, 2, 3, 4, 5, 1, 2, 3])
    lines.settle(row)
    line, guesses, _ = lines.propose(row, None, 0.0)
    assert (line.token_ids[:4], line.num_drafted) == ((4, 5, 1, 2), 0)
    assert guesses.is_line
    assert all(guesses.are_looked_up)
    unlikely, likely = tree(8, (9, 9), 0.1), tree(8, (4, 5), 0.99)
    line, *_ = lines.propose(row, likely, 0.0)
    assert (line.token_ids[:6], line.num_drafted, line.chances[:2]) == ((4, 5, 1, 2, 3, 4), 2, (0.99, 0.99))
    line, guesses, _ = lines.propose(row, unlikely, 0.0)
    assert line.token_ids[:2] == (4, 5)
    assert [guesses.token_ids[place] for place in guesses.behind(-1)] == [4, 9]  # Both are verified.
    assert lines.propose(row, unlikely, 0.3).guesses.is_line  # Here the other one is not worth it.
    one_line = Lines(LookupChances(), is_tree=False)
    one_line.settle(row)
    assert one_line.propose(row, unlikely, 0.0).guesses.token_ids == line.token_ids


def test_no_line_is_longer_than_the_room_there_is() -> None:
    for room in range(5):
        lines, row = Lines(LookupChances()), request([1, 2, 3, 1, 2], room)
        lines.settle(row)
        for drafted in (None, tree(5, (3, 1, 2, 3), 0.9)):
            guesses = lines.propose(row, drafted, 0.0).guesses
            assert guesses.is_line
            assert len(guesses) == room


def test_what_became_of_what_was_looked_up_is_learnt_once() -> None:
    chances = LookupChances()
    lines, row = Lines(chances), request([1, 2, 3, 1, 2])
    lines.settle(row)
    before = chances.chance(2), chances.chance(3)
    row.verified += [3, 6]  # What was looked up behind two matching tokens stood, then it did not behind three.
    lines.settle(row)
    assert chances.chance(2) > before[0]
    assert chances.chance(3) < before[1]
    known = chances.chance(2), chances.chance(3)
    lines.settle(row)
    assert (chances.chance(2), chances.chance(3)) == known


class BusyDraft:
    """It never has a line, and counts how often it is waited for."""

    concurrent, is_ready, is_starting = True, True, False
    step_seconds, max_line, num_steps = 1.0, 32, 0

    def __init__(self) -> None:
        self.num_waits = 0

    def tree(self, request_id: int) -> None:
        return None

    def grant(self, num_steps: int) -> None:
        raise AssertionError("nobody waits for grants in a free-running schedule")

    rest = grant

    def wait(self, num_steps: int, timeout: float) -> bool:
        self.num_waits += 1
        return False


@pytest.mark.parametrize(("token_ids", "is_waited_for"), [([1, 2, 3, 4, 5, 1, 2, 3], False), (range(8), True)])
def test_what_was_looked_up_is_not_waited_for(token_ids: Sequence[int], is_waited_for: bool) -> None:
    """No draft step makes such a line longer; where nothing is found, the same schedule waits for the draft."""
    pace, chances, draft = Pace(), LookupChances(), BusyDraft()
    pace.record_cycle(1, 1, 1, 8.0, 0.0)
    for match in range(MIN_MATCH, MAX_MATCH + 1):
        for _ in range(500):
            chances.judge(match, True)
    row = Request(0, 5, (), 100, list(token_ids))
    guesses = FreeRunning(draft, pace, True, chances).before_forward([row])
    assert bool(draft.num_waits) == is_waited_for == (not guesses[0])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_text_that_repeats_itself_needs_no_draft(num_rows: int) -> None:
    """A draft that is always wrong; the text is a loop of 20 tokens."""
    traces = [[TracedGuess(False, 0.5, token_id=place % 20) for place in range(200 + row)] for row in range(num_rows)]
    costs = Costs(lambda num_guesses: 1.0, lambda num_tokens: 8.0 + 0.1 * num_tokens)
    stats = simulate_run(traces, costs).stats
    assert stats.generated_tokens == num_rows * len(traces[-1])
    assert stats.target_forwards < 60
    assert stats.accepted_looked_up_tokens == stats.accepted_tokens > 100 * num_rows


def test_text_without_repetition_has_no_looked_up_guesses() -> None:
    trace = [TracedGuess(True, 0.9, token_id=place) for place in range(100)]
    stats = simulate_run([trace], Costs(lambda _: 1.0, lambda _: 8.0)).stats
    assert stats.accepted_looked_up_tokens == 0 < stats.accepted_tokens


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_simulated_call_looks_up_in_its_prompt(num_rows: int) -> None:
    """A draft that is always wrong; the texts repeat nothing but their prompts, which are of different lengths."""
    prompts = [range(100 * row, 100 * row + 60 + row) for row in range(num_rows)]
    traces = [[TracedGuess(False, 0.5, token_id=token_id) for token_id in prompt[:50]] for prompt in prompts]
    costs = Costs(lambda num_guesses: 1.0, lambda num_tokens: 8.0 + 0.1 * num_tokens)
    alone = simulate_run(traces, costs).stats
    behind = simulate_run(traces, costs, prompts=prompts).stats
    assert behind.generated_tokens == alone.generated_tokens == 50 * num_rows
    assert behind.accepted_looked_up_tokens > 25 * num_rows > 0 == alone.accepted_looked_up_tokens
    assert behind.prefilled_tokens == num_rows, "all of a prompt but its last token is cached"
