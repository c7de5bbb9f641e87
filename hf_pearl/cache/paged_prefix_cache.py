"""`PagedPrefixCache`: keys and values of many sequences in blocks, shared by prefix and kept between calls.

Who owns which positions of a sequence of `n` tokens in the cache, after each operation (half-open intervals):

| operation       | shared, read only   | own, written   | indexed                      |
|-----------------|---------------------|----------------|------------------------------|
| allocate        | [0, hit)            | -              | [0, hit)                     |
| append k        | [0, hit)            | [hit, n + k)   | [0, hit)                     |
| fork            | [0, n), both        | -              | as before                    |
| append to it    | whole blocks of it  | what follows   | as before                    |
| rollback to m   | [0, min(hit, m))    | the rest       | as before                    |
| index v tokens  | whole blocks of it  | the rest       | [0, v)                       |
| free            | -                   | -              | as before; blocks are cached |

A block is written to only by a sequence that alone names it, and only behind what is indexed of it: `append` copies
the last block where that is not so (copy on write).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import PearlOutOfBlocksError
from .batch import BatchOfRows
from .block_pool import BlockPool
from .cache_arguments import check_arguments
from .paged_layer import PagedLayer, as_numbers
from .paged_sequence import PagedSequence
from .prefix_index import PrefixIndex
from .sizing import DEFAULT_BLOCK_SIZE, CacheNeeds, memory_share, num_blocks_for
from .slot_moves import move_slots
from .statistics import CacheStatistics

INITIAL_BLOCKS = 256


class PagedPrefixCache(BatchOfRows):
    """Paged keys and values of one model, for any number of sequences.

    Engines allocate sequences and run ragged steps over them (`PagedStep`). It is a transformers cache too: passed as
    `cache=` or `past_key_values=`, it holds a batch of rows of one length, and methods mean what they mean there.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's; `PearlUnsupportedModelError` where its layers keep anything but keys and values.
    max_blocks : int, optional
        Blocks there may be; by default as many as fit into a share of the memory there is.
    block_size : int
        Tokens of a block, a power of two.
    eight_bit : bool
        Keep keys and values in 8 bits (float8_e4m3fn, a scale per token and head): half the memory of bfloat16, and
        attention over values that are off by up to 1/16 of themselves.
    device : torch.device or str
        Where the model is. Keys and values are kept where they come from, each layer's on that layer's device.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        max_blocks: int | None = None,
        block_size: int = DEFAULT_BLOCK_SIZE,
        eight_bit: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        check_arguments(config, max_blocks, block_size, eight_bit)
        super().__init__([PagedLayer(eight_bit) for _ in range(config.get_text_config().num_hidden_layers)])
        self.config = config
        self.block_size, self.eight_bit = block_size, eight_bit
        self._max_blocks = max_blocks
        self.index, self.statistics = PrefixIndex(block_size), CacheStatistics()
        self._settle(torch.device(device))

    def _settle(self, device: torch.device) -> None:
        """Find out how many blocks there may be on a device."""
        self.device, max_blocks = device, self._max_blocks
        if max_blocks is None:
            needs = CacheNeeds(self.config, self.config.dtype or torch.get_default_dtype(), device, self.eight_bit)
            max_blocks = num_blocks_for([needs], None, memory_share, self.block_size)
        # A CPU's memory is taken page by page, when it is first written to; elsewhere the pools grow.
        self.pool = BlockPool(max_blocks if device.type == "cpu" else min(INITIAL_BLOCKS, max_blocks), max_blocks)

    @property
    def num_slots(self) -> int:
        """Tokens that the pools have room for."""
        return self.pool.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        """Bytes that the pools may take."""
        return sum(layer.nbytes for layer in self.layers)

    def allocate(self, token_ids: Sequence[int] = (), salt: str = "", expected_length: int = 0) -> PagedSequence:
        """A new sequence that already holds the longest known prefix of `token_ids`, short of its last token.

        Parameters
        ----------
        salt : str
            Only prefixes that came under the same salt are found.
        expected_length : int
            Tokens the sequence may have in the end, where that is known.
        """
        sequence = PagedSequence(salt, expected_length)
        found = self.index.find(token_ids, salt)
        for block in found.blocks:
            self.pool.reference(block)
            sequence.push(block)
        sequence.length = len(found.blocks) * self.block_size
        if found.tail_block is not None:
            self._take_over(sequence, found.tail_block, found.num_tail_tokens)
        self.statistics.queried_tokens += len(token_ids)
        self.statistics.hit_tokens += sequence.length
        return sequence

    def _take_over(self, sequence: PagedSequence, block: int, num_tokens: int) -> None:
        """Begin the sequence's next block with the first `num_tokens` of `block`: in place if nobody minds."""
        entry = self.index.entry(block)
        in_place = self.pool.is_cached(block) and entry is not None and len(entry.token_ids) == num_tokens
        self.pool.reference(block)  # It must not be evicted for its own copy.
        own = block if in_place else self._take(sequence)
        if own is not None:
            sequence.push(own)
            sequence.length += num_tokens
        if own is not None and not in_place:
            self._copy(block, own)
        if not in_place:
            self.pool.release(block, keep=block in self.index)

    def append(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens; all or nothing.

        Raises
        ------
        PearlOutOfBlocksError
            No block is free, none can be evicted, and the pool may not grow.
        """
        before = len(sequence.block_table)
        last, filled = sequence.last_block, sequence.length % self.block_size
        shared = last if num_tokens and filled and last is not None and self._others_read(last, filled) else None
        num_new = -(-(sequence.length + num_tokens) // self.block_size) - before + (shared is not None)
        if shared is not None:
            sequence.pop()
        for taken in range(num_new):
            block = self._take(sequence)
            if block is None:
                self._shrink(sequence, len(sequence.block_table) - taken)
                if shared is not None:
                    sequence.push(shared)
                raise self.pool.out_of_blocks(num_new)
            sequence.push(block)
        if shared is not None:
            self._copy(shared, sequence.block_table[before - 1])
            self.pool.release(shared, keep=shared in self.index)
        sequence.length += num_tokens

    def _others_read(self, block: int, filled: int) -> bool:
        """Whether somebody else names the block, or may find what lies behind its first `filled` tokens."""
        entry = self.index.entry(block)
        return self.pool.count(block) > 1 or (entry is not None and len(entry.token_ids) > filled)

    def _copy(self, source: int, target: int) -> None:
        size = self.block_size
        for layer in self.layers:
            layer.copy(slice(source * size, (source + 1) * size), slice(target * size, (target + 1) * size))
        self.statistics.copied_blocks += 1

    def _take(self, sequence: PagedSequence) -> int | None:
        """A free block for the end of `sequence`; the pool grows for it, then cached blocks are evicted."""
        after = sequence.last_block
        expected = -(-sequence.expected_length // self.block_size) - len(sequence.block_table) - 1
        block = self.pool.take(after, max(0, expected))
        if block is not None and after is not None and self.pool.is_cached(after + 1):
            block = self._exchange(block, after + 1)
        if block is None and self._grow():
            block = self.pool.take(after, max(0, expected))
        if block is None and (evicted := self.pool.evict()) is not None:
            for follower in self.index.forget(evicted):  # Those that another sequence holds, behind its own copy.
                self.pool.drop(follower)
            self.statistics.evicted_blocks += 1
            block = self.pool.take(after, max(0, expected))
        return block

    def _exchange(self, block: int, cached: int) -> int:
        """Move a cached block away, so that a sequence that began with a cached prefix goes on in the same run."""
        self._copy(cached, block)
        self.index.move(cached, block)
        self.pool.exchange(block, cached)
        return cached

    def _grow(self) -> bool:
        """Double the pools, if they may and can grow; whether they did."""
        num_blocks = min(2 * self.pool.num_blocks, self.pool.max_blocks)
        if num_blocks == self.pool.num_blocks:
            return False
        self.layout += 1
        try:
            for layer in self.layers:
                layer.resize(num_blocks * self.block_size)
        except PearlOutOfBlocksError:
            return False  # A layer that has grown already does no harm.
        self.pool.grow(num_blocks)
        return True

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens; it takes memory only where the two go on differently."""
        for block in sequence.block_table:
            self.pool.reference(block)
        return sequence.copy()

    def rollback(self, sequence: PagedSequence, length: int) -> None:
        """Drop every token from position `length` on; raises `ValueError` where there is none."""
        if not 0 <= length <= sequence.length:
            raise ValueError(f"`length` must be between 0 and {sequence.length}, got {length}.")
        sequence.length = length
        self._shrink(sequence, -(-length // self.block_size))

    def keep(self, sequence: PagedSequence, num_first: int, places: Sequence[int]) -> None:
        """Keep the first tokens and those at `places`, ascending, which move up; `ValueError` where others read."""
        end = num_first + len(places)
        moved = [(new, place) for new, place in enumerate(places, start=num_first) if new != place]
        if moved:
            first, size = moved[0][0], self.block_size
            written = enumerate(sequence.block_table[first // size : -(-end // size)], start=first // size)
            if any(self._others_read(block, max(0, first - number * size)) for number, block in written):
                raise ValueError(f"`places` would move over tokens from {first} on that are forked or indexed.")
            slots = as_numbers(sequence.slots(self.block_size, num_first, sequence.length)).tolist()
            new, old = ([slots[place - num_first] for place in each] for each in zip(*moved, strict=True))
            move_slots(self.layers, self.backend, old, new)
        self.rollback(sequence, end)

    def _shrink(self, sequence: PagedSequence, num_blocks: int) -> None:
        while len(sequence.block_table) > num_blocks:
            block = sequence.pop()
            self.pool.release(block, keep=block in self.index)

    def insert_prefix(self, sequence: PagedSequence, token_ids: Sequence[int]) -> None:
        """Let later sequences find `token_ids`, the verified tokens at the start of `sequence`.

        Whole blocks that the index knows already are exchanged for those it knows: a prefix is kept once.
        """
        token_ids = token_ids[: sequence.length]
        standing, superseded = self.index.insert(token_ids, sequence.block_table, sequence.salt)
        own = sequence.block_table[: len(standing)]
        for block in standing:
            self.pool.reference(block)
        for block in own:
            self.pool.release(block, keep=block in self.index)
        if standing != own:
            sequence.replace(standing)
        for block in superseded:
            self.pool.drop(block)

    def free(self, sequence: PagedSequence) -> None:
        """Give the sequence back; indexed blocks stay cached until their memory is needed, leaves going first."""
        self.rollback(sequence, 0)

    def clear(self) -> None:
        """Forget every prefix; sequences in use keep their blocks."""
        self.layout += 1
        self.index.clear()
        self.pool.evict_all()

    def reset_pools(self) -> None:
        """Forget every prefix, and the shapes and dtypes of keys and values; no sequence may be in use."""
        self.clear()
        for layer in self.layers:
            layer.pools = None

    def before_first_rows(self, device: torch.device) -> None:
        """Make room on another kind of device than expected, if nothing is held yet."""
        if self.device.type != device.type and not self.pool.num_referenced and not len(self.index):
            self._settle(device)

    def rows_are_gone(self) -> None:
        """Make new pools for the next batch, unless other sequences are in use."""
        if not self.pool.num_referenced:
            self.reset_pools()

    def start_anew(self) -> None:
        """Forget all sequences and prefixes, and whose blocks they were: after an interrupt, which comes anywhere."""
        self.pool = BlockPool(self.pool.num_blocks, self.pool.max_blocks)
        self.index.clear()
        self.batch_rows = []

    @property
    def options(self) -> tuple[Any, ...]:
        """What it was made with."""
        return self.config, self._max_blocks, self.block_size, self.eight_bit, self.device

    def check_integrity(self, sequences: Sequence[PagedSequence]) -> None:
        """Raise `RuntimeError` unless the books balance; `sequences` are all those in use, but for a batch's rows."""
        counts = Counter(block for sequence in (*sequences, *self.batch_rows) for block in sequence.block_table)
        wrong = sorted(block for block in counts | self.pool.counts if counts[block] != self.pool.count(block))
        if wrong:
            raise RuntimeError(f"reference counts of blocks {wrong} differ from the block tables that name them")
