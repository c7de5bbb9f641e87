"""How many forwards a text would have taken without a draft: counted as it comes, and by going through it once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_pearl.decoding.lookup import MAX_LOOKED_UP, LookupChances
from hf_pearl.decoding.request import Request
from hf_pearl.decoding.undrafted import UndraftedForwards

LEAST = 0.2
PROMPT = [1, 2, 3, 1, 2]


def forwards(text: list[int], num_known: int) -> int:
    """From the first tokens of a text to its end: every forward starts behind what is known, and looks up."""
    chances, num_forwards = LookupChances(), 0
    while num_known < len(text):
        known, num_forwards = text[:num_known], num_forwards + 1
        place = next(
            (
                at
                for size in (3, 2)
                for at in range(num_known - 1, size - 1, -1)
                if known[at - size : at] == known[num_known - size :]
            ),
            None,
        )
        num_known += 1
        if place is None:
            continue
        match = 0
        while match < min(12, place) and known[place - 1 - match] == known[-1 - match]:
            match += 1
        path, guesses = 1.0, list(known)
        for ahead in range(MAX_LOOKED_UP):
            guesses.append(guesses[place + ahead])
            path *= chances.chance(match + ahead)
            if path <= LEAST or num_known > len(text) or guesses[-1] != text[num_known - 1]:
                break
            num_known += 1
    return num_forwards


def count(text: list[int], ends: list[int]) -> int:
    """The same as the text is verified in pieces."""
    request = Request(0, len(PROMPT), (), len(text), text[: len(PROMPT)])
    undrafted = UndraftedForwards(LookupChances())
    undrafted.follow(request)
    assert undrafted.count(request, LEAST) == 0, "a prompt takes no forward of decoding"
    total = 0
    for end in sorted({*ends, len(PROMPT) + 1, len(text)}):
        request.verified = text[:end]
        undrafted.follow(request)
        request.finished = end == len(text)
        total += undrafted.count(request, LEAST)
    return total


@given(st.lists(st.integers(0, 2), min_size=2, max_size=120), st.sets(st.integers(1, 118)))
def test_in_whatever_pieces_a_text_comes_its_forwards_are_those_of_the_whole(
    tokens: list[int], pieces: set[int]
) -> None:
    text = [*PROMPT, *tokens]
    ends = [len(PROMPT) + piece for piece in pieces if piece < len(tokens)]
    assert count(text, ends) == forwards(text, len(PROMPT) + 1)


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
def test_without_looking_up_every_token_takes_a_forward(num_tokens: int) -> None:
    request = Request(0, 3, (), 100, [5, 5, 5, 5])
    undrafted = UndraftedForwards(None)
    undrafted.follow(request)
    request.verified += [5] * num_tokens
    assert undrafted.count(request, LEAST) == num_tokens
    assert undrafted.count(request, LEAST) == 0


def test_text_that_repeats_itself_takes_few() -> None:
    dice = random.Random(0)
    phrase = [dice.randrange(1000) for _ in range(16)]
    assert forwards(PROMPT + 10 * phrase, len(PROMPT)) < 16 + 2 + 10 * 2
    assert count(PROMPT + 10 * phrase, [20, 33, 60]) < 16 + 2 + 10 * 2
