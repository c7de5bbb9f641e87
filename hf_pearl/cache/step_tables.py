"""What kernels have to know of a step: a few small int32 tensors, filled once per forward and shared by all layers.

Everything lies in one buffer, pinned on the host, that goes to the device in one copy; block tables, the largest part
of it, only when one has changed. All tensors have fixed addresses and maximal sizes, and kernels read from device
memory how many sequences and tokens there are. So the calls of a forward can be captured in a CUDA graph once, with
`bounds` given, and be replayed for any later step within them:

    tables = StepTables(limits, block_size, device, bounds=Bounds(8, 64, 16, 4096, True))  # fixes grids and splits
    tables.fill(sequences, num_new, trees)  # the copy is queued on the current stream, before capture or replay
    graph.replay()                          # `store` and `paged_attention` of all layers, reading `tables`

Beyond this step's tokens, slots are -1 and nothing is stored; their outputs are left as they were. Two things the graph
bakes in are not here: the addresses of the pools, which change where the cache grows, and those of queries and outputs.

Shapes: `S` sequences, `T` packed tokens, `B` blocks of the longest sequence, `W` words of a sequence's tree masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .paged_sequence import PagedSequence
from .sdpa import TreeMask
from .tree_tables import WORD_BITS, describe_trees, num_words

ALIGNMENT = 4  # numbers, 16 bytes: kernels are compiled anew for addresses that are no multiple of it


class Limits(NamedTuple):
    """Sizes of the tables: sequences, packed tokens, blocks of a sequence, and int32 numbers that say what trees are.

    A tree of `n` new tokens, whose last place is `p` places behind its first, takes `n (1 + W) + 32 W` numbers, with
    `W = ceil(p / 32)`.
    """

    num_sequences: int
    num_tokens: int
    num_blocks: int
    num_tree_numbers: int

    def holds(self, other: Limits) -> bool:
        """Whether none of `other` is larger."""
        return all(own >= needed for own, needed in zip(self, other, strict=True))

    def grown(self, other: Limits) -> Limits:
        """The larger of each, rounded up to a power of two."""
        return Limits(*(1 << (max(pair) - 1).bit_length() for pair in zip(self, other, strict=True)))


class Bounds(NamedTuple):
    """What grids and loops of kernels are built from; no step they serve has more.

    Attributes
    ----------
    num_sequences, num_tokens : int
        Sequences, and packed tokens of all.
    max_queries : int
        New tokens of one sequence.
    max_keys : int
        Tokens of one sequence; a step with more is still right, and split into less parts than it might be.
    has_trees : bool
        Whether new tokens of a sequence may lie on branches.
    """

    num_sequences: int
    num_tokens: int
    max_queries: int
    max_keys: int
    has_trees: bool

    def serve(self, step: Bounds) -> bool:
        """Whether a step with these bounds may run in kernels launched for our own."""
        return (
            step.num_sequences <= self.num_sequences
            and step.num_tokens <= self.num_tokens
            and step.max_queries <= self.max_queries
            and (self.has_trees or not step.has_trees)
        )


class Tables(NamedTuple):
    """The int32 tensors of `StepTables`, on the device.

    Attributes
    ----------
    query_starts : torch.Tensor
        `(S + 1,)`; behind the last sequence of the step the number of its tokens.
    lengths, bases, tree_starts, tree_words : torch.Tensor
        `(S,)`.
    slots : torch.Tensor
        `(T,)`: where each packed token is stored; -1: nowhere.
    trees : torch.Tensor
        `(num_tree_numbers,)`.
    block_tables : torch.Tensor
        `(S, B)`.
    """

    query_starts: torch.Tensor
    lengths: torch.Tensor
    bases: torch.Tensor
    tree_starts: torch.Tensor
    tree_words: torch.Tensor
    slots: torch.Tensor
    trees: torch.Tensor
    block_tables: torch.Tensor


class StepTables:
    """The tables of a step, on the host and on the device.

    Query `i` of sequence `s` is packed token `query_starts[s] + i`. It is the sequence's token at the place
    `lengths[s] - n + i`, if `n` are new, and sees the places below `bases[s]` up to its own position. Without a tree,
    `bases[s]` is `lengths[s]`. With one, it is where the tree begins, and `trees[tree_starts[s]:]` holds a row of
    `1 + W` numbers per query, `W = tree_words[s]`: its position, and a bit for each place of the tree, whether the
    query sees it; then the position of each place of the tree (of those that some query sees).

    Attributes
    ----------
    on_device : Tables
        What kernels read.
    bounds : Bounds
        Of the step that the tables were filled for, or those that were given.
    has_fixed_bounds : bool
        Whether they were given.
    num_new : list of int
        New tokens of each sequence of the step.
    """

    def __init__(
        self, limits: Limits, block_size: int, device: torch.device | str, bounds: Bounds | None = None
    ) -> None:
        self.limits = limits
        self.block_size = block_size
        self.device = torch.device(device)
        self.bounds = bounds or Bounds(0, 0, 0, 0, False)
        self.has_fixed_bounds = bounds is not None
        rooms = _rooms(limits)
        is_cuda = self.device.type == "cuda"
        with torch.inference_mode(False):  # Such a tensor is written to by every later step, in whatever mode.
            self._on_host = torch.zeros(sum(rooms), dtype=torch.int32, pin_memory=is_cuda, device="cpu")
            self._numbers = torch.zeros_like(self._on_host, device=self.device) if is_cuda else self._on_host
        self.device = self._numbers.device  # with its index: "cuda" is compared with no tensor's "cuda:0"
        self.num_new: list[int] = []
        self._sequences: Sequence[PagedSequence] = ()
        self._copied: torch.cuda.Event | None = torch.cuda.Event() if is_cuda else None
        self._num_before_blocks = sum(rooms[:-1])
        # `table_number` of what each row of the block tables holds, here and on the device
        self._held_rows = [0] * limits.num_sequences
        self.on_device = _parts(self._numbers, limits)
        self._host: tuple[np.ndarray, ...] = tuple(part.numpy() for part in _parts(self._on_host, limits))

    def fill(
        self,
        sequences: Sequence[PagedSequence],
        num_new: Sequence[int],
        trees: Sequence[TreeMask | None],
        num_later: int = 0,
    ) -> None:
        """Describe a step, and queue the copy to the device on the current stream.

        Parameters
        ----------
        num_later : int
            Steps like this one for whose tokens the sequences have room already, behind those of this step.

        Raises
        ------
        ValueError
            The step has more of something than the tables have room for, or than the bounds that were given say.
        """
        needed, bounds = needs(sequences, num_new, trees, self.block_size)
        if not self.limits.holds(needed):
            raise ValueError(f"tables of {self.limits} have no room for a step of {needed}; make larger ones.")
        if not self.has_fixed_bounds:
            self.bounds = bounds
        elif not self.bounds.serve(bounds):
            raise ValueError(f"kernels launched for {self.bounds} cannot run a step of {bounds}; make larger ones.")
        if self._copied is not None:
            self._copied.synchronize()  # The last copy reads what is about to be overwritten.
        self._sequences, self.num_new = sequences, list(num_new)
        self._fill_sequences(sequences, num_new, trees, num_later)
        changed = self._fill_block_tables(sequences)
        self._fill_slots(np.asarray(num_new))
        self._fill_trees(num_new, trees)
        self._copy(self._num_before_blocks + (len(sequences) * self.limits.num_blocks if changed else 0))
        for row in changed:
            self._held_rows[row] = sequences[row].table_number

    def runs(self) -> list[slice] | None:
        """The slots of each sequence of the step, if those of each are neighbours."""
        slots = [each.slots(self.block_size, 0, each.length) for each in self._sequences]
        runs = [each for each in slots if isinstance(each, slice)]
        return runs if len(runs) == len(slots) else None

    def _fill_sequences(
        self,
        sequences: Sequence[PagedSequence],
        num_new: Sequence[int],
        trees: Sequence[TreeMask | None],
        num_later: int,
    ) -> None:
        query_starts, lengths, bases, *_ = self._host
        count = len(sequences)
        np.cumsum(num_new, out=query_starts[1 : count + 1])
        query_starts[count + 1 :] = query_starts[count]
        lengths[:count] = [sequence.length for sequence in sequences]
        lengths[:count] -= num_later * np.diff(query_starts[: count + 1])
        bases[:count] = lengths[:count]
        for row, tree in enumerate(trees):
            if tree is not None:
                bases[row] = tree.num_common

    def _fill_block_tables(self, sequences: Sequence[PagedSequence]) -> list[int]:
        """Write the rows that hold anything else, and return them: a block serves many steps."""
        *_, rows = self._host
        held = self._held_rows
        changed = [row for row, sequence in enumerate(sequences) if held[row] != sequence.table_number]
        for row in changed:
            held[row] = -1  # until it is on the device
            rows[row, : len(sequences[row].block_table)] = sequences[row].block_numbers()
        return changed

    def _fill_slots(self, num_new: np.ndarray) -> None:
        query_starts, lengths, _, _, _, slots, _, block_tables = self._host
        row = np.repeat(np.arange(len(num_new)), num_new)
        total = len(row)
        place = np.arange(total) - query_starts[row] + lengths[row] - num_new[row]
        blocks = block_tables[row, place // self.block_size]
        slots[:total] = blocks * self.block_size + place % self.block_size
        slots[total:] = -1

    def _fill_trees(self, num_new: Sequence[int], trees: Sequence[TreeMask | None]) -> None:
        _, _, _, starts, words, _, numbers, _ = self._host
        words[:] = 0
        present = [(row, tree) for row, tree in enumerate(trees) if tree is not None]
        if not present:
            return
        end = 0
        for (row, tree), described in zip(present, describe_trees([tree for _, tree in present]), strict=True):
            assert len(tree.paths) == num_new[row]
            starts[row], words[row] = end, num_words(tree)
            numbers[end : end + len(described)] = described
            end += len(described)

    def _copy(self, num_numbers: int) -> None:
        """Queue the copy of so many numbers."""
        if self._copied is None:
            return
        self._numbers[:num_numbers].copy_(self._on_host[:num_numbers], non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self.device))


def _sizes(limits: Limits) -> list[int]:
    """Numbers of each of `Tables`."""
    s, t, b, n = limits
    return [s + 1, s, s, s, s, t, n, s * b]


def _rooms(limits: Limits) -> list[int]:
    """Numbers from the beginning of each of `Tables` to that of the next."""
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in _sizes(limits)]


def _parts(numbers: torch.Tensor, limits: Limits) -> Tables:
    """The tables that lie in one buffer."""
    rooms = numbers.split(_rooms(limits))
    *flat, block_tables = (room[:size] for room, size in zip(rooms, _sizes(limits), strict=True))
    return Tables._make([*flat, block_tables.view(limits.num_sequences, limits.num_blocks)])


def needs(
    sequences: Sequence[PagedSequence],
    num_new: Sequence[int],
    trees: Sequence[TreeMask | None],
    block_size: int,
) -> tuple[Limits, Bounds]:
    """What the tables of a step must have room for, and its own bounds."""
    max_keys = max(sequence.length for sequence in sequences)
    num_tree_numbers, has_trees = 0, False
    for num, tree in zip(num_new, trees, strict=True):
        if tree is not None:
            has_trees, words = True, num_words(tree)
            num_tree_numbers += num * (1 + words) + words * WORD_BITS
    num_blocks = max(len(sequence.block_table) for sequence in sequences)
    limits = Limits(len(sequences), sum(num_new), max(num_blocks, -(-max_keys // block_size)), num_tree_numbers)
    return limits, Bounds(len(sequences), sum(num_new), max(num_new), max_keys, has_trees)
