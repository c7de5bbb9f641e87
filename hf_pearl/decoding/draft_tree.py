"""What the draft guesses beyond the verified tokens of one request: a tree, and how a verdict prunes it.

Its root is the last verified token. With one line the tree is the paper's draft (PEARL, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .messages import MAX_TREE_TOKENS

MAX_LINE = 32
MAX_DRAFT_LENGTH = MAX_TREE_TOKENS // 2


def longest_line(draft_length: int | str) -> int:
    """Guesses beyond the verified tokens at which a line waits for a verdict.

    In lockstep (an int) there is room for a window, and for as many guesses that are drafted while it is verified.
    """
    return MAX_LINE if isinstance(draft_length, str) else max(MAX_LINE, 2 * draft_length)


class Candidate(NamedTuple):
    """A token that may come next: how sure the draft is of it, and what calibration makes of that."""

    token_id: int
    confidence: float
    chance: float


class Node:
    """A guess, and what is guessed behind it.

    Attributes
    ----------
    parent : Node or None
        The guess before it; None for the root.
    depth : int
        Guesses up to it, itself included; 0 for the root.
    candidate : Candidate or None
        What it is; None for the root.
    path_chance : float
        Estimated chance that it and all before it stand.
    children : list of Node
        The likeliest first; empty while it has not been computed.
    place : int or None
        Where its keys and values are in the request's sequence; None while it has not been computed.
    """

    __slots__ = ("candidate", "children", "depth", "parent", "path_chance", "place")

    def __init__(self, parent: Node | None, candidate: Candidate | None) -> None:
        self.parent = parent
        self.candidate = candidate
        self.children: list[Node] = []
        self.place: int | None = None
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.path_chance: float = 1.0
        if parent is not None and candidate is not None:
            self.path_chance = parent.path_chance * candidate.chance

    @property
    def token_id(self) -> int:
        """Its token."""
        assert self.candidate is not None
        return self.candidate.token_id

    def child(self, token_id: int) -> Node | None:
        """The child with a token, if it was guessed."""
        return next((child for child in self.children if child.token_id == token_id), None)

    def walk(self) -> Iterator[Node]:
        """Itself and all behind it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children)


class Pruned(NamedTuple):
    """What a verdict left of a tree.

    Attributes
    ----------
    num_first : int
        Tokens at the start of the sequence that stay where they are.
    places : list of int
        Those behind that stay, in ascending order: they move up, and all others go.
    judged : list of tuple of Node and int
        Nodes whose children were guesses for a token that is known now, and that token.
    """

    num_first: int
    places: list[int]
    judged: list[tuple[Node, int]]


class DraftTree:
    """Verified tokens of a request as far as the draft knows them, and a tree of guesses behind them.

    One sequence in the draft's cache holds what is computed of both: first the verified tokens, then the guesses in the
    order in which they were computed, each of which attends to its own branch alone.

    Parameters
    ----------
    token_ids : sequence of int
        The prompt, all of it verified.
    max_length : int
        The length at which the request ends; no token is guessed that no verdict could confirm.
    """

    def __init__(self, token_ids: Sequence[int], max_length: int) -> None:
        self.verified = list(token_ids)
        self.max_length = max_length
        self.root = Node(None, None)
        self.verdict_number = 0
        self.num_drafted = 0

    @property
    def num_verified(self) -> int:
        """How many tokens are verified."""
        return len(self.verified)

    def length(self, node: Node) -> int:
        """Tokens of the request up to a node."""
        return len(self.verified) + node.depth

    def has_room(self, node: Node) -> bool:
        """Whether a guess behind `node` could stand: a verdict ends in a token of the target's own."""
        return self.length(node) + 1 < self.max_length

    def tokens(self, node: Node) -> list[int]:
        """Verified tokens, and the guesses up to a node."""
        guesses: list[int] = []
        while node.parent is not None:
            guesses.append(node.token_id)
            node = node.parent
        return self.verified + guesses[::-1]

    def leaves(self) -> Iterator[Node]:
        """Nodes that are not computed."""
        return (node for node in self.root.walk() if node.place is None)

    def likeliest(self, num_nodes: int) -> list[Node]:
        """The guesses that are likeliest to stand, every one behind its parent."""
        nodes = [node for node in self.root.walk() if node is not self.root]
        return sorted(nodes, key=lambda node: -node.path_chance)[:num_nodes]

    def path(self, node: Node) -> list[int]:
        """Places of the guesses up to a node, as far as they are computed."""
        path = []
        while node.parent is not None:
            if node.place is not None:
                path.append(node.place)
            node = node.parent
        return path[::-1]

    def computed(self, node: Node, place: int, candidates: Sequence[Candidate]) -> None:
        """`node` is in the draft's cache, at `place`, and these tokens may come behind it, the likeliest first."""
        node.place = place
        if self.has_room(node):
            node.children = [Node(node, candidate) for candidate in candidates]
            self.num_drafted += 1

    def drop_guesses(self) -> None:
        """Forget all guesses, and that the last verified token is computed."""
        self.root = Node(None, None)

    def prune(self, number: int, token_ids: Sequence[int]) -> Pruned:
        """Apply a verdict: move the root behind `token_ids`, keep what was guessed behind them."""
        node, judged = self.root, []
        num_first = self.num_verified if node.place is not None else self.num_verified - 1
        for token_id in token_ids:
            if node.children:
                judged.append((node, token_id))
            following = node.child(token_id)
            if following is None or following.place is None:
                break
            node = following
        places = self.path(node)
        if node.depth == len(token_ids):
            held = {each.place: each for each in node.walk() if each.place is not None}
            places += [place for place in sorted(held) if held[place] is not node]
            for new, place in enumerate(sorted(held), start=num_first + node.depth - 1):
                held[place].place = new
            self._make_root(node)
        else:
            self.drop_guesses()
        self.verified.extend(token_ids)
        self.verdict_number = number
        return Pruned(num_first, places, judged)

    def _make_root(self, node: Node) -> None:
        lost = node.depth
        chance = node.path_chance
        node.parent, node.candidate = None, None
        for each in node.walk():
            each.depth -= lost
            each.path_chance = each.path_chance / chance if chance else 0.0
        self.root = node
