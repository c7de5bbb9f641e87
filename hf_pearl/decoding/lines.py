"""The line of guesses that a request's coming forward verifies: the draft's, one looked up, or both in a row."""

from __future__ import annotations

import itertools
import operator
from typing import NamedTuple

from .lookup import MAX_LOOKED_UP, LookupChances, PromptLookup
from .messages import TokenTree
from .policy import Acceptance
from .request import Request


class Guesses(NamedTuple):
    """A line beyond the verified tokens: the likeliest of a draft's tree, and perhaps what was looked up behind it."""

    token_ids: tuple[int, ...]
    chances: tuple[float, ...]
    num_drafted: int

    @property
    def expected_tokens(self) -> float:
        """How many of its tokens stand, on average."""
        return sum(itertools.accumulate(self.chances, operator.mul))


NO_GUESSES = Guesses((), (), 0)


def usable(tree: TokenTree | None, request: Request) -> Guesses:
    """The likeliest line of `tree` behind the verified tokens, whether or not the draft has seen their verdicts."""
    if tree is None or tree.root > len(request.verified):
        return NO_GUESSES
    node, places = -1, range(len(tree.token_ids))
    for token_id in request.verified[tree.root :]:
        behind = (place for place in places if (tree.parents[place], tree.token_ids[place]) == (node, token_id))
        following = next(behind, None)
        if following is None:
            return NO_GUESSES
        node = following
    line: list[int] = []
    for place in places[node + 1 :]:  # The likeliest child of a node comes first, and behind the node.
        if tree.parents[place] == node and len(line) < request.room:
            line.append(place)
            node = place
    token_ids, chances = tuple(tree.token_ids[place] for place in line), tuple(tree.chances[place] for place in line)
    return Guesses(token_ids, chances, len(line))


class Lines:
    """The likeliest line of every request of a call, and what became of those before.

    Parameters
    ----------
    acceptance : Acceptance
        Learns how often the draft's tokens stand.
    lookup_chances : LookupChances or None
        Learns how often tokens stand that are looked up; None: none are.
    """

    def __init__(self, acceptance: Acceptance, lookup_chances: LookupChances | None) -> None:
        self._acceptance = acceptance
        self._chances = lookup_chances
        self._drafted: dict[int, tuple[int, tuple[int, ...]]] = {}  # request -> its length at launch, draft tokens
        self._lookups: dict[int, PromptLookup] = {}
        self._found: dict[int, tuple[list[int], int]] = {}  # request -> tokens looked up behind it, matching ones

    def settle(self, request: Request) -> None:
        """Learn what became of the guesses behind the last verified tokens, and look up those behind the new ones."""
        length, drafted = self._drafted.pop(request.request_id, (0, ()))
        for token_id, right in zip(drafted, request.verified[length:], strict=False):
            self._acceptance.record(token_id == right)
            if token_id != right:
                break
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

    def best(self, request: Request, tree: TokenTree | None) -> Guesses:
        """The line of which most is expected to stand."""
        drafted = usable(tree, request)
        if self._chances is None:
            return drafted
        looked_up = self._extended(NO_GUESSES, *self._found[request.request_id], request.room)
        if not drafted.token_ids:
            return looked_up
        behind = self._lookups[request.request_id].continuation(drafted.token_ids, MAX_LOOKED_UP)
        return max(self._extended(drafted, *behind, request.room), looked_up, key=lambda line: line.expected_tokens)

    def _extended(self, line: Guesses, found: list[int], match: int, room: int) -> Guesses:
        assert self._chances is not None
        found = found[: max(0, room - len(line.token_ids))]
        chances = tuple(self._chances.chance(match + place) for place in range(len(found)))
        return Guesses(line.token_ids + tuple(found), line.chances + chances, line.num_drafted)

    def launch(self, request: Request, line: Guesses, num_tokens: int) -> None:
        """The first `num_tokens` of a line are being verified."""
        request.first_looked_up = line.num_drafted
        drafted = line.token_ids[: min(num_tokens, line.num_drafted)]
        self._drafted[request.request_id] = len(request.verified), drafted
