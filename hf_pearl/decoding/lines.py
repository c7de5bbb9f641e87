"""The lines of guesses that a request's coming forward verifies: the draft's, those looked up, or both in a row."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

from .guesses import Guesses, GuessTree
from .lookup import MAX_LOOKED_UP, LookupChances, PromptLookup
from .messages import MAX_TREE_TOKENS, TokenTree
from .request import Request


class Line(NamedTuple):
    """Guesses one behind the other, the first ones a draft's, and each one's chance if all before it stand."""

    token_ids: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    num_drafted: int = 0

    @property
    def chance(self) -> float:
        """That all of it stands."""
        return math.prod(self.chances)

    @property
    def expected_tokens(self) -> float:
        """How many of its tokens stand, on average."""
        return sum(itertools.accumulate(self.chances, operator.mul))


class Proposal(NamedTuple):
    """What may be verified next: the likeliest line as far as it is known, and the guesses that are worth it."""

    line: Line
    guesses: Guesses
    tree: TokenTree | None  # what the draft had published


def find_root(tree: TokenTree | None, request: Request) -> int | None:
    """Where the last verified token is in `tree`, whether or not the draft has seen its verdict; -1: at its root."""
    if tree is None or tree.root > len(request.verified):
        return None
    node = -1
    for token_id in request.verified[tree.root :]:
        following = _child(tree, node, token_id)
        if following is None:
            return None
        node = following
    return node


def _child(tree: TokenTree, parent: int, token_id: int) -> int | None:
    place = parent
    while True:
        try:
            place = tree.token_ids.index(token_id, place + 1)
        except ValueError:
            return None
        if tree.parents[place] == parent:
            return place


def likeliest_line(tree: TokenTree | None, request: Request) -> Line:
    """The likeliest line of `tree` behind the verified tokens."""
    root = find_root(tree, request)
    return Line() if tree is None or root is None else _likeliest_line(tree, root, request.room)


def _likeliest_line(tree: TokenTree, root: int, room: int) -> Line:
    places: list[int] = []
    node = root
    for place in range(root + 1, len(tree.token_ids)):  # The likeliest child of a node comes first, and behind it.
        if tree.parents[place] == node and len(places) < room:
            places.append(place)
            node = place
    token_ids = tuple(tree.token_ids[place] for place in places)
    return Line(token_ids, tuple(tree.chances[place] for place in places), len(places))


class Lines:
    """The guesses behind every request of a call, and what became of those before.

    Parameters
    ----------
    lookup_chances : LookupChances or None
        Learns how often tokens stand that are looked up; None: none are.
    is_tree : bool
        Whether one forward may verify several lines.
    """

    def __init__(self, lookup_chances: LookupChances | None, is_tree: bool = True) -> None:
        self._chances = lookup_chances
        self._is_tree = is_tree
        self._lookups: dict[int, PromptLookup] = {}
        self._found: dict[int, tuple[list[int], int]] = {}  # request -> tokens looked up behind it, matching ones

    def settle(self, request: Request) -> None:
        """Learn what became of the guesses behind the last verified tokens, and look up those behind the new ones."""
        if self._chances is None:
            return
        lookup = self._lookups.setdefault(request.request_id, PromptLookup())
        new = request.verified[len(lookup.token_ids) :]
        found, match = self._found.get(request.request_id, ([], 0))
        for token_id, right in zip(found, new, strict=False):
            self._chances.judge(match, token_id == right)
            if token_id != right:
                break
            match += 1
        lookup.extend(new)
        self._found[request.request_id] = lookup.continuation((), MAX_LOOKED_UP)

    def propose(self, request: Request, tree: TokenTree | None, least: float) -> Proposal:
        """The guesses that are likelier than `least` to be verified: of all lines, or of the one that promises most."""
        root = find_root(tree, request)
        drafted = Line() if tree is None or root is None else _likeliest_line(tree, root, request.room)
        lines = [drafted]
        if self._chances is not None:
            lines = [self._extended(Line(), *self._found[request.request_id])]
            if drafted.token_ids:
                behind = self._lookups[request.request_id].continuation(drafted.token_ids, MAX_LOOKED_UP)
                lines.insert(0, self._extended(drafted, *behind))
        if not drafted.token_ids and (not lines[0].token_ids or lines[0].chances[0] <= least):
            return Proposal(lines[0], Guesses(), tree)  # Mostly so while the draft rests.
        best = max(lines, key=lambda line: line.expected_tokens)
        guesses = GuessTree(request.room)
        if self._is_tree and tree is not None and root is not None:
            _add_drafted(guesses, tree, root, least)
        for line in lines if self._is_tree else [best]:
            _add_line(guesses, line, least)
        return Proposal(best, guesses.above(least, MAX_TREE_TOKENS), tree)

    def _extended(self, line: Line, found: Sequence[int], match: int) -> Line:
        assert self._chances is not None
        chances = tuple(self._chances.chance(match + place) for place in range(len(found)))
        return Line(line.token_ids + tuple(found), line.chances + chances, line.num_drafted)


def _add_drafted(guesses: GuessTree, tree: TokenTree, root: int, least: float) -> None:
    """Add what `tree` holds behind its place `root`, as far as it may be likelier than `least`."""
    known: dict[int, tuple[int, float]] = {root: (-1, 1.0)}  # place in the tree -> place in `guesses`, path's chance
    for place in range(root + 1, len(tree.token_ids)):
        parent, before = known.get(tree.parents[place], (None, 0.0))
        if parent is None:
            continue
        chance = before * tree.chances[place]
        if chance <= least:
            break  # The likelier of two guesses behind the same token comes first, wherever they are.
        added = guesses.add(parent, tree.token_ids[place], tree.chances[place])
        if added is not None:
            known[place] = added, chance


def _add_line(guesses: GuessTree, line: Line, least: float) -> None:
    """Add a line as far as it may be likelier than `least`."""
    parent, path_chance = -1, 1.0
    for place, (token_id, chance) in enumerate(zip(line.token_ids, line.chances, strict=True)):
        path_chance *= chance
        if path_chance <= least:
            return
        added = guesses.add(parent, token_id, chance, is_looked_up=place >= line.num_drafted)
        if added is None:
            return
        parent = added
