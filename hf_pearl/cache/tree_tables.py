"""Which places of a tree its new tokens see, as the numbers that kernels read (`StepTables`).

Shapes: `R` trees, `Q` new tokens of all of them, `L` lengths of their paths in all, `W` words of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from .sdpa import TreeMask

WORD_BITS = 32


def num_words(tree: TreeMask) -> int:
    """Words that a query's mask over the places of the tree takes; the last of these is the last query's own."""
    return -(-(tree.paths[-1][-1] + 1 - tree.num_common) // WORD_BITS)


def describe_trees(trees: Sequence[TreeMask]) -> list[np.ndarray]:
    """The numbers of each tree, at least one, int32, as `StepTables` holds them; no loop over tokens.

    A tree behind 5 common tokens whose two queries, at the places 6 and 7, both follow the one at place 5 has `W = 1`
    and is `[6, 0b011, 6, 0b101]`, then `[5, 6, 6]` and 29 zeros: both are at position 6, and see place 5 and their own.
    """
    words, num_queries = [num_words(tree) for tree in trees], [len(tree.paths) for tree in trees]
    paths = list(chain.from_iterable(tree.paths for tree in trees))
    lengths = np.fromiter(map(len, paths), np.int64, len(paths))  # (Q,)
    ends = np.cumsum(lengths)
    places = np.fromiter(chain.from_iterable(paths), np.int64, int(ends[-1]))  # (L,)
    bases = np.repeat([tree.num_common for tree in trees], num_queries)  # (Q,)
    query = np.repeat(np.arange(len(paths)), lengths)  # (L,)
    offsets = places - bases[query]
    positions = bases[query] + np.arange(len(places)) - (ends - lengths)[query]
    tree_of_query = np.repeat(np.arange(len(trees)), num_queries)

    seen = np.zeros((len(paths), max(words) * WORD_BITS), dtype=np.bool_)
    seen[query, offsets] = True
    of_places = np.zeros((len(trees), max(words) * WORD_BITS), dtype=np.int32)
    of_places[tree_of_query[query], offsets] = positions
    rows = np.empty((len(paths), 1 + max(words)), dtype=np.int32)  # (Q, 1 + W)
    rows[:, 0] = bases + lengths - 1
    rows[:, 1:] = np.packbits(seen, axis=1, bitorder="little").view("<i4")
    parts = np.split(rows, np.cumsum(num_queries)[:-1])
    return [
        np.concatenate([part[:, : 1 + count].ravel(), held[: count * WORD_BITS]])
        for part, held, count in zip(parts, of_places, words, strict=True)
    ]
