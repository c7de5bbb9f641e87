"""Trees of guesses that one target forward verifies."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_pearl.decoding.guesses import Guesses, GuessTree
from hf_pearl.decoding.lines import Lines
from hf_pearl.decoding.lookup import LookupChances
from hf_pearl.decoding.messages import TokenTree
from hf_pearl.decoding.request import Request

additions = st.lists(
    st.tuples(st.integers(0, 100), st.integers(0, 3), st.floats(0.01, 1.0), st.booleans()), max_size=24
)


def grow(added: list[tuple[int, int, float, bool]], room: int) -> GuessTree:
    """A tree in which every guess hangs behind an earlier one or the root."""
    tree, places = GuessTree(room), [-1]
    for number, token_id, chance, is_looked_up in added:
        place = tree.add(places[number % len(places)], token_id, chance, is_looked_up)
        if place is not None and place not in places:
            places.append(place)
    return tree


def path(guesses: Guesses, place: int) -> tuple[int, ...]:
    """The tokens up to a guess."""
    return () if place < 0 else (*path(guesses, guesses.parents[place]), guesses.token_ids[place])


@given(additions, st.integers(0, 6), st.floats(0.0, 0.5), st.integers(0, 12))
def test_what_is_verified_is_the_likeliest_part_of_the_tree(
    added: list[Any], room: int, least: float, num_guesses: int
) -> None:
    tree = grow(added, room)
    every, guesses = tree.above(0.0, 1000), tree.above(least, num_guesses)
    assert len({path(every, place) for place in range(len(every))}) == len(every)
    for each in (every, guesses):
        assert all(parent < place for place, parent in enumerate(each.parents))
        line = [place for place in range(len(each)) if each.parents[: place + 1] == tuple(range(-1, place))]
        assert list(each.chances[len(line) :]) == sorted(each.chances[len(line) :], reverse=True)
        for place in [-1, *line]:  # It goes on with the likeliest child, as far as there is one.
            chances = [each.chances[child] for child in each.behind(place)]
            assert not chances or (each.parents[place + 1] == place and chances[0] == max(chances))
        assert all(len(path(each, place)) <= room for place in range(len(each)))
        for place in range(-1, len(each)):
            total = sum(each.chances[child] for child in each.behind(place))
            assert total <= (1.0 if place < 0 else each.chances[place]) * (1 + 1e-9)
    assert len(guesses) == min(num_guesses, sum(chance > least for chance in every.chances))
    kept = sorted(every.chances, reverse=True)[: len(guesses)]
    assert sorted(guesses.chances, reverse=True) == kept


@given(additions, st.integers(1, 5))
def test_a_token_attends_to_its_own_path_alone(added: list[Any], length: int) -> None:
    guesses = grow(added, 5).above(0.0, 1000)
    branches = guesses.branches(length)
    assert (branches is None) == guesses.is_line == (guesses.parents == Guesses.line(guesses.token_ids).parents)
    if branches is None:
        return
    tokens = [None, *guesses.token_ids]  # the window: the last verified token, then the guesses
    for place, attended in enumerate(branches.paths[1:]):
        assert attended[0] == length
        assert tuple(tokens[each - length] for each in attended[1:]) == path(guesses, place)
    assert branches.num_common == length


@given(additions, st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_exactly_the_target_s_own_path_stands(added: list[Any], choices: list[int]) -> None:
    """The target's choices by depth: what it says off its own path is never looked at."""
    guesses = grow(added, 5).above(0.0, 1000)
    request = Request(0, 1, (), 100, [0])
    request.queue(torch.arange(1 + len(guesses)).float()[:, None], guesses)
    walked: list[int] = []
    while request.pending:
        judged = request.pending[0]
        assert path(guesses, judged.behind) == tuple(walked) == tuple(choices[: judged.depth])
        assert judged.logits.item() == judged.behind + 1
        walked.append(choices[judged.depth])
        request.take(walked[-1])
    paths = {path(guesses, place) for place in range(len(guesses))}
    num_stood = max((depth for depth in range(1, 6) if tuple(choices[:depth]) in paths), default=0)
    assert request.verified == [0, *choices[: num_stood + 1]]
    assert [path(guesses, place) for place in request.stood] == [tuple(choices[: 1 + at]) for at in range(num_stood)]
    assert [(each.place, each.stood) for each in request.judged][:num_stood] == [(at, True) for at in range(num_stood)]
    assert len(request.judged) == num_stood + bool(guesses.behind(request.stood[-1] if request.stood else -1))


def test_a_guess_that_is_drafted_and_looked_up_is_one() -> None:
    lines, row = Lines(LookupChances()), Request(0, 5, (), 100, [1, 2, 3, 1, 2])
    lines.settle(row)
    drafted = TokenTree(0, 0, 0, 5, (3, 9, 7, 8), (-1, -1, 0, 1), (0.6, 0.3, 0.5, 0.5))
    guesses = lines.propose(row, drafted, 0.0).guesses
    paths = {path(guesses, place): guesses.are_looked_up[place] for place in range(len(guesses))}
    assert paths.items() >= {(3,): False, (9,): False, (3, 7): False, (9, 8): False, (3, 1): True}.items()
    assert len(paths) == len(guesses)
