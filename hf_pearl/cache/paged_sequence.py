"""One sequence in the paged cache: its block table, and where its tokens lie."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from .paged_layer import Slots

_table_numbers = itertools.count(1)


class PagedSequence:
    """Block table of a sequence, and how many of its tokens are there.

    Attributes
    ----------
    block_table : list of int
        Read only; blocks come and go through the methods.
    table_number : int
        Changes with every change of the block table; two sequences that have the same one have equal tables.
    length : int
        Tokens whose keys and values are there, or are being computed.
    salt : str
        Only sequences of one salt share prefixes.
    expected_length : int
        Tokens it may have in the end: where blocks are chosen, so much room is left behind it.
    """

    def __init__(self, salt: str = "", expected_length: int = 0) -> None:
        self.block_table: list[int] = []
        self.table_number = 0
        self.length = 0
        self.salt = salt
        self.expected_length = expected_length
        self._run_starts: list[int] = []  # places in the block table where a run of neighbours begins
        self._numbers = array("i")  # the block table once more: copied into a kernel's tables without a loop

    def copy(self) -> PagedSequence:
        """The same sequence again."""
        copied = PagedSequence(self.salt, self.expected_length)
        copied.length, copied.table_number = self.length, self.table_number
        copied.block_table, copied._run_starts = self.block_table.copy(), self._run_starts.copy()
        copied._numbers = self._numbers[:]
        return copied

    @property
    def last_block(self) -> int | None:
        """The last block of the table."""
        return self.block_table[-1] if self.block_table else None

    def push(self, block: int) -> None:
        """Add a block at the end."""
        if not self.block_table or block != self.block_table[-1] + 1:
            self._run_starts.append(len(self.block_table))
        self.block_table.append(block)
        self._numbers.append(block)
        self.table_number = next(_table_numbers)

    def pop(self) -> int:
        """Take the last block off."""
        if self._run_starts[-1] == len(self.block_table) - 1:
            self._run_starts.pop()
        self._numbers.pop()
        self.table_number = next(_table_numbers)
        return self.block_table.pop()

    def replace(self, blocks: Sequence[int]) -> None:
        """Put `blocks` in the place of as many blocks at the start."""
        table = [*blocks, *self.block_table[len(blocks) :]]
        self.block_table, self._run_starts, self._numbers = [], [], array("i")
        for block in table:
            self.push(block)

    def block_numbers(self) -> np.ndarray:
        """The block table, int32; to be read at once, since blocks cannot come or go while the array exists."""
        return np.frombuffer(self._numbers, dtype=np.int32) if self._numbers else np.empty(0, dtype=np.int32)

    def slots(self, block_size: int, start: int, end: int) -> Slots:
        """Where the tokens from position `start` to `end - 1` lie: a slice if their blocks are one run."""
        if start >= end:
            return slice(0, 0)
        first, last = start // block_size, (end - 1) // block_size
        offset = start - first * block_size
        if self._run_starts[bisect_right(self._run_starts, last) - 1] <= first:
            slot = self.block_table[first] * block_size + offset
            return slice(slot, slot + end - start)
        blocks = torch.tensor(self.block_table[first : last + 1], device="cpu")
        return (blocks[:, None] * block_size + torch.arange(block_size, device="cpu")).flatten()[
            offset : offset + end - start
        ]
