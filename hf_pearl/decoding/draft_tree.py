"""What the draft guesses beyond the verified tokens of one request: a tree, and how a verdict prunes it.

Its root is the last verified token. With one line the tree is the paper's draft (PEARL, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


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
    sequence : int or None
        The sequence in the draft's cache that holds its keys and values; None while it has not been computed.
    """

    __slots__ = ("candidate", "children", "depth", "parent", "path_chance", "sequence")

    def __init__(self, parent: Node | None, candidate: Candidate | None) -> None:
        self.parent = parent
        self.candidate = candidate
        self.children: list[Node] = []
        self.sequence: int | None = None
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
    sequence : int
        The sequence that holds the verified tokens, as far as they are computed.
    num_valid : int
        How many of its tokens are still what they were.
    dropped : list of int
        Sequences that nobody needs any more.
    judged : list of tuple of Node and int
        Nodes whose children were guesses for a token that is known now, and that token.
    """

    sequence: int
    num_valid: int
    dropped: list[int]
    judged: list[tuple[Node, int]]


class DraftTree:
    """Verified tokens of a request as far as the draft knows them, and a tree of guesses behind them.

    Parameters
    ----------
    token_ids : sequence of int
        The prompt, all of it verified.
    max_length : int
        The length at which the request ends; no token is guessed that no verdict could confirm.
    sequence : int
        The sequence in the draft's cache that will hold the verified tokens.
    """

    def __init__(self, token_ids: Sequence[int], max_length: int, sequence: int = 0) -> None:
        self.verified = list(token_ids)
        self.max_length = max_length
        self.sequence = sequence
        self.root = Node(None, None)
        self.verdict_number = 0
        self.num_drafted = 0
        self._tips: dict[int, Node] = {}  # sequence -> the last node that was computed on it

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
        return (node for node in self.root.walk() if node.sequence is None)

    def line(self) -> list[Candidate]:
        """The likeliest guesses, one behind the other."""
        node, line = self.root, []
        while node.children:
            node = node.children[0]
            assert node.candidate is not None
            line.append(node.candidate)
        return line

    def is_tip(self, node: Node) -> bool:
        """Whether nothing was computed behind `node` on its sequence."""
        return node.sequence is not None and self._tips.get(node.sequence) is node

    def computed(self, node: Node, sequence: int, candidates: Sequence[Candidate]) -> None:
        """`node` is in the draft's cache, on `sequence`, and these tokens may come behind it, the likeliest first."""
        node.sequence = sequence
        self._tips[sequence] = node
        if self.has_room(node):
            node.children = [Node(node, candidate) for candidate in candidates]
            self.num_drafted += 1

    def drop_lines(self) -> list[int]:
        """Forget all guesses; name the sequences that nobody needs any more."""
        dropped = [sequence for sequence in self._tips if sequence != self.sequence]
        self.root, self._tips = Node(None, None), {}
        return dropped

    def prune(self, number: int, token_ids: Sequence[int]) -> Pruned:
        """Apply a verdict: move the root behind `token_ids`, keep what was guessed behind them."""
        node, judged = self.root, []
        held, num_valid = self.sequence, self.num_verified
        num_known = 0
        for token_id in token_ids:
            if node.children:
                judged.append((node, token_id))
            following = node.child(token_id)
            if following is None or following.sequence is None:
                break
            node, num_known = following, num_known + 1
            held, num_valid = following.sequence, self.length(following)
        self.verified.extend(token_ids)
        self.verdict_number = number
        survives = num_known == len(token_ids) and node is not self.root
        if survives:
            self._make_root(node)
        elif token_ids:
            self.root = Node(None, None)
        kept = {each.sequence for each in self.root.walk()} | {held}
        dropped = [sequence for sequence in {*self._tips, self.sequence} if sequence not in kept]
        self._tips = {sequence: tip for sequence, tip in self._tips.items() if survives and sequence in kept}
        self.sequence = held
        return Pruned(held, num_valid, dropped, judged)

    def _make_root(self, node: Node) -> None:
        lost = node.depth
        chance = node.path_chance
        node.parent, node.candidate = None, None
        for each in node.walk():
            each.depth -= lost
            each.path_chance = each.path_chance / chance if chance else 0.0
        self.root = node
