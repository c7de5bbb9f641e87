"""Which rows or columns of a weight one rank holds, zeros among them where the number of ranks does not divide.

All ranks' parts have the same shapes. Zeros add nothing: not to a sum over ranks, and not to logits, where the rows
behind the last token are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """The places `start` to `stop - 1` of the whole, and zeros behind them up to a `length`."""

    start: int
    stop: int
    length: int

    def times(self, unit: int) -> Piece:
        """The same of places that are `unit` rows each."""
        return Piece(self.start * unit, self.stop * unit, self.length * unit)

    def behind(self, offset: int) -> Piece:
        """The same of a whole that begins at `offset`."""
        return Piece(self.start + offset, self.stop + offset, self.length)


class Cut(NamedTuple):
    """A rank's part of a tensor: pieces of one dimension, one behind the other.

    Attributes
    ----------
    dim : int
        The dimension.
    pieces : tuple of Piece
        What of it; at least one.
    """

    dim: int
    pieces: tuple[Piece, ...]

    @property
    def length(self) -> int:
        """Size of the part in that dimension."""
        return sum(piece.length for piece in self.pieces)

    def take(self, like: torch.Tensor, device: torch.device, read: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """The part of a whole of the shape and dtype of `like`, in memory of its own.

        `read(start, stop)` returns those places of the whole; it is asked for no more than the part.
        """
        shape = list(like.shape)
        shape[self.dim] = self.length
        part, place = torch.zeros(shape, dtype=like.dtype, device=device), 0
        for piece in self.pieces:
            if piece.stop > piece.start:
                part.narrow(self.dim, place, piece.stop - piece.start).copy_(read(piece.start, piece.stop))
            place += piece.length
        return part


def even_piece(total: int, rank: int, size: int) -> Piece:
    """The `rank`-th of `size` equal parts of `total` places; the last ranks may hold zeros, or nothing else."""
    length = -(-total // size)
    start = min(rank * length, total)
    return Piece(start, min(start + length, total), length)


class HeadLayout(NamedTuple):
    """How query heads and key-value heads lie on the ranks, so that every query head has its key-value head at hand.

    The query heads of a key-value head are dealt out in chunks of `group`, each with a copy of that key-value head, and
    every rank gets `per_rank` chunks; zeros fill the last chunk of a key-value head and the last ranks. A layer on a
    rank is thus one of grouped-query attention again, with `per_rank` key-value heads.

    >>> HeadLayout.of(num_heads=4, num_key_value_heads=2, size=3)  # the third rank holds zeros
    HeadLayout(num_heads=4, num_key_value_heads=2, group=2, per_rank=1)
    >>> HeadLayout.of(num_heads=14, num_key_value_heads=2, size=6)  # 7 = 3 + 3 + 1
    HeadLayout(num_heads=14, num_key_value_heads=2, group=3, per_rank=1)
    """

    num_heads: int
    num_key_value_heads: int
    group: int
    per_rank: int

    @classmethod
    def of(cls, num_heads: int, num_key_value_heads: int, size: int) -> HeadLayout:
        """The layout in which a rank holds the fewest heads, those of keys among them."""
        layouts = []
        for group in range(1, num_heads // num_key_value_heads + 1):
            chunks = num_key_value_heads * -(-num_heads // num_key_value_heads // group)
            layouts.append(cls(num_heads, num_key_value_heads, group, -(-chunks // size)))
        return min(layouts, key=lambda layout: (layout.per_rank * (layout.group + 1), layout.per_rank))

    def _chunks(self, rank: int) -> list[tuple[int, int, int]]:
        """Of every chunk the key-value head, and its query heads from the first to behind the last; all 0 if empty."""
        whole_group = self.num_heads // self.num_key_value_heads
        chunks_per_head = -(-whole_group // self.group)
        chunks = []
        for chunk in range(rank * self.per_rank, (rank + 1) * self.per_rank):
            head, place = divmod(chunk, chunks_per_head)
            first = head * whole_group
            start, stop = first + place * self.group, first + min((place + 1) * self.group, whole_group)
            chunks.append((head, start, stop) if head < self.num_key_value_heads else (0, 0, 0))
        return chunks

    def queries(self, rank: int, unit: int) -> tuple[Piece, ...]:
        """The rows of a rank's query heads, each of `unit` rows."""
        return tuple(Piece(start, stop, self.group).times(unit) for _, start, stop in self._chunks(rank))

    def keys(self, rank: int, unit: int) -> tuple[Piece, ...]:
        """The rows of a rank's key-value heads, each of `unit` rows."""
        return tuple(Piece(head, head + (stop > start), 1).times(unit) for head, start, stop in self._chunks(rank))
