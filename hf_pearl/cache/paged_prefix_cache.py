"""`PagedPrefixCache`: keys and values of many sequences in blocks, shared by prefix and kept between calls.

Who owns which positions of a sequence of `n` tokens in the cache, after each operation (half-open intervals):

| operation       | shared, read only | own, written | indexed                     |
|-----------------|-------------------|--------------|-----------------------------|
| allocate        | [0, hit)          | -            | [0, hit)                    |
| append k        | [0, hit)          | [hit, n + k) | [0, hit)                    |
| rollback to m   | [0, hit)          | [hit, m)     | [0, hit)                    |
| index v tokens  | [0, hit)          | [hit, n)     | [0, v), in whole blocks     |
| free            | -                 | -            | as before; blocks are cached |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache

from .block_pool import BlockPool
from .prefix_index import PrefixIndex
from .step import PagedStep, SequenceSpan

DEFAULT_BLOCK_SIZE = 32
INITIAL_BLOCKS = 64


@dataclass(eq=False)
class PagedSequence:
    """One sequence in the cache: its block table, and how many tokens of it are there."""

    block_table: list[int] = field(default_factory=list)
    length: int = 0


class PagedPrefixCache(Cache):
    """Paged keys and values of one model, for any number of sequences.

    Parameters
    ----------
    num_layers : int
        Attention layers of the model.
    block_size : int
        Tokens of a block, a power of two.
    max_blocks : int
        Blocks there may be; the pools grow up to it on demand.
    device : torch.device or str
        Where the pools lie. Their dtype and head sizes are those of the keys and values first stored.
    """

    def __init__(
        self,
        num_layers: int,
        max_blocks: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(layers=[])
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(f"`block_size` must be a power of two, got {block_size}.")
        self.block_size = block_size
        self.device = torch.device(device)
        self.pool = BlockPool(min(INITIAL_BLOCKS, max_blocks), max_blocks)
        self.index = PrefixIndex()
        self._pools: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * num_layers

    def allocate(self, token_ids: Sequence[int] = ()) -> PagedSequence:
        """A new sequence that already holds the longest indexed prefix of `token_ids`, short of its last token."""
        blocks = self.index.find(token_ids, self.block_size)
        for block in blocks:
            self.pool.reference(block)
        return PagedSequence(list(blocks), len(blocks) * self.block_size)

    def append(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens; all or nothing.

        Raises
        ------
        PearlOutOfBlocksError
            No block is free, none can be evicted, and the pool may not grow.
        """
        num_blocks = -(-(sequence.length + num_tokens) // self.block_size)
        num_new = num_blocks - len(sequence.block_table)
        before = len(sequence.block_table)
        for _ in range(num_new):
            last = sequence.block_table[-1] if sequence.block_table else None
            block = self._take(last)
            if block is None:
                self._shrink(sequence, before)
                raise self.pool.out_of_blocks(num_new)
            sequence.block_table.append(block)
        sequence.length += num_tokens

    def _take(self, after: int | None) -> int | None:
        block = self.pool.take(after)
        if block is None and self.pool.num_blocks < self.pool.max_blocks:
            self._grow()
            block = self.pool.take(after)
        if block is None and (evicted := self.pool.evict()) is not None:
            self.index.forget(evicted)
            block = self.pool.take(after)
        return block

    def rollback(self, sequence: PagedSequence, length: int) -> None:
        """Drop every token from position `length` on."""
        if not 0 <= length <= sequence.length:
            raise ValueError(f"`length` must be between 0 and {sequence.length}, got {length}.")
        sequence.length = length
        self._shrink(sequence, -(-length // self.block_size))

    def _shrink(self, sequence: PagedSequence, num_blocks: int) -> None:
        while len(sequence.block_table) > num_blocks:
            block = sequence.block_table.pop()
            self.pool.release(block, keep=block in self.index)

    def insert_prefix(self, sequence: PagedSequence, token_ids: Sequence[int]) -> None:
        """Let later sequences find the full blocks of `token_ids`, the verified tokens at the start of `sequence`."""
        num_tokens = min(len(token_ids), sequence.length)
        self.index.insert(token_ids[:num_tokens], sequence.block_table, self.block_size)

    def free(self, sequence: PagedSequence) -> None:
        """Give the sequence back; indexed blocks stay cached until their memory is needed, leaves going first."""
        sequence.length = 0
        self._shrink(sequence, 0)

    def clear(self) -> None:
        """Forget every prefix; sequences in use keep their blocks."""
        self.index.clear()
        self.pool.evict_all()

    def reset_pools(self) -> None:
        """Forget every prefix, and the shapes and dtypes of keys and values; no sequence may be in use."""
        self.clear()
        self._pools = [None] * len(self._pools)

    def begin_step(self, sequences: Sequence[PagedSequence], num_new: Sequence[int]) -> PagedStep:
        """The plan of a forward in which the last `num_new[i]` tokens of `sequences[i]` are computed."""
        spans = [
            SequenceSpan(sequence.block_table, sequence.length, num)
            for sequence, num in zip(sequences, num_new, strict=True)
        ]
        return PagedStep(self, spans)

    def pools(self, layer_index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's pools `(num_slots, K, D)`, made on first use to fit `key` and `value` `(1, K, T, D)`."""
        pools = self._pools[layer_index]
        if pools is None:
            num_slots = self.pool.num_blocks * self.block_size
            pools = (
                key.new_zeros(num_slots, key.shape[1], key.shape[3], device=self.device),
                value.new_zeros(num_slots, value.shape[1], value.shape[3], device=self.device),
            )
            self._pools[layer_index] = pools
        return pools

    def _grow(self) -> None:
        old_slots = self.pool.num_blocks * self.block_size
        self.pool.grow(min(2 * self.pool.num_blocks, self.pool.max_blocks))
        num_slots = self.pool.num_blocks * self.block_size
        for layer_index, pools in enumerate(self._pools):
            if pools is not None:
                grown = tuple(pool.new_zeros(num_slots, *pool.shape[1:]) for pool in pools)
                for new, old in zip(grown, pools, strict=True):
                    new[:old_slots] = old
                self._pools[layer_index] = (grown[0], grown[1])

    @property
    def num_bytes(self) -> int:
        """Bytes that the pools hold."""
        return sum(pool.nbytes for pools in self._pools if pools is not None for pool in pools)

    def check_integrity(self, sequences: Sequence[PagedSequence]) -> None:
        """Raise `RuntimeError` unless the books balance; `sequences` are all those in use."""
        counts = [0] * self.pool.num_blocks
        for sequence in sequences:
            for block in sequence.block_table:
                counts[block] += 1
        wrong = [block for block, count in enumerate(counts) if count != self.pool.count(block)]
        if wrong:
            raise RuntimeError(f"reference counts of blocks {wrong} differ from the block tables that name them")
        if self.pool.num_free + self.pool.num_cached + self.pool.num_referenced != self.pool.num_blocks:
            raise RuntimeError("free, cached and referenced blocks do not add up to the pool")
