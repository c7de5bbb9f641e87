"""What the windows of a forward are to a model: one packed row of tokens.

Shapes: `T` packed tokens, `N` of them with logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..cache import PagedSequence
from ..cache.sdpa import TreeMask
from ..decoding.messages import Window


class PackedWindows(NamedTuple):
    """Windows of several sequences, one behind the other.

    Attributes
    ----------
    token_ids, positions : list of int
        `T` each.
    kept : list of int
        Places of the `N` tokens whose logits are wanted, ascending.
    num_new : list of int
        Tokens of every window.
    trees : list of TreeMask or None
        For every window, what its tokens attend to where that is not all before them.
    """

    token_ids: list[int]
    positions: list[int]
    kept: list[int]
    num_new: list[int]
    trees: list[TreeMask | None]


def pack(sequences: Sequence[PagedSequence], windows: Sequence[Window], vocab_size: int) -> PackedWindows:
    """Put windows into one row; their sequences hold them already. A token that the model cannot know becomes 0."""
    token_ids: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    for sequence, window in zip(sequences, windows, strict=True):
        token_ids.extend(token if token < vocab_size else 0 for token in window.token_ids)
        positions.extend(_positions(sequence, window))
        kept.extend(range(len(token_ids) - window.num_logits, len(token_ids)))
    num_new = [len(window.token_ids) for window in windows]
    trees = [None if window.branches is None else TreeMask(*window.branches) for window in windows]
    return PackedWindows(token_ids, positions, kept, num_new, trees)


def _positions(sequence: PagedSequence, window: Window) -> Iterable[int]:
    if window.branches is None:
        return range(sequence.length - len(window.token_ids), sequence.length)
    num_common, paths = window.branches
    return (num_common + len(path) - 1 for path in paths)


def chained(sequences: Sequence[PagedSequence], first: PackedWindows, num_steps: int) -> list[PackedWindows]:
    """The steps of a chain, in each of which a token is put behind every one of the step before.

    Their ids are not known, but all else. The sequences have room for them. Tokens 5 and 6 of a sequence on branches
    from its token 4 are followed by 7, behind 5, and 8, behind 6; and these by 9 and 10.
    """
    steps = []
    for step in range(num_steps):
        trees = [
            tree and _grown(tree, sequence.length - (num_steps - 1) * num, num, step)
            for sequence, num, tree in zip(sequences, first.num_new, first.trees, strict=True)
        ]
        steps.append(first._replace(positions=[position + step for position in first.positions], trees=trees))
    return steps


def _grown(tree: TreeMask, length: int, num_new: int, step: int) -> TreeMask:
    """The tree of a step; at the end of the chain's first one the sequence has `length` tokens."""
    end = length + num_new * step
    paths = [(*path, *range(length + place, end, num_new)) for place, path in enumerate(tree.paths)]
    return TreeMask(tree.num_common, tuple(paths))
