"""Which blocks are in use, by how many, and which are free: bookkeeping only, no keys and values."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict

from ..errors import PearlOutOfBlocksError
from .free_runs import FreeRuns


class BlockPool:
    """Reference counts over `num_blocks` blocks.

    A block is in exactly one of three states: *referenced* (its count is the number of block tables that name it),
    *cached* (unreferenced, but the prefix index may still find it; evicted least recently used first) or *free*.

    Parameters
    ----------
    num_blocks : int
        Blocks there are at the start; `grow` adds more.
    max_blocks : int
        Blocks there may ever be.
    """

    def __init__(self, num_blocks: int, max_blocks: int) -> None:
        self.num_blocks = 0
        self.max_blocks = max_blocks
        self._counts: Counter[int] = Counter()
        self._free = FreeRuns()
        self._cached: dict[int, int] = {}  # block -> when it became cached
        self._oldest_first: OrderedDict[int, int] = OrderedDict()  # and back
        self._ticks = itertools.count()
        self.grow(num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks that the prefix index may still find."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks that at least one block table names."""
        return self.num_blocks - len(self._free) - len(self._cached)

    def count(self, block: int) -> int:
        """How many block tables name `block`."""
        return self._counts[block]

    @property
    def counts(self) -> Counter[int]:
        """How many block tables name each block that was ever taken."""
        return self._counts

    def is_cached(self, block: int) -> bool:
        """Whether `block` is unreferenced and kept for the prefix index."""
        return block in self._cached

    def grow(self, num_blocks: int) -> None:
        """Have `num_blocks` blocks in all; the new ones are free."""
        self._free.add(self.num_blocks, num_blocks)
        self.num_blocks = max(self.num_blocks, num_blocks)

    def take(self, after: int | None, expected: int = 0) -> int | None:
        """Reference a free block, the one next to `after` if possible; see `FreeRuns.take`.

        Returns None where no block is free: the caller grows the pool or evicts a cached block.
        """
        block = self._free.take(after, expected)
        if block is not None:
            self._counts[block] = 1
        return block

    def reference(self, block: int) -> None:
        """One more block table names `block`, referenced or cached."""
        if block in self._cached:
            del self._oldest_first[self._cached.pop(block)]
        self._counts[block] += 1

    def release(self, block: int, keep: bool) -> None:
        """One block table less names `block`. `keep`: if it was the last, the block stays cached, not free."""
        self._counts[block] -= 1
        if self._counts[block]:
            return
        self._free.forget_expectation(block)
        if keep:
            self._cached[block] = tick = next(self._ticks)
            self._oldest_first[tick] = block
        else:
            self._free.add(block, block + 1)

    def drop(self, block: int) -> None:
        """Make a cached block free; a referenced one stays what it is."""
        if block in self._cached:
            del self._oldest_first[self._cached.pop(block)]
            self._free.add(block, block + 1)

    def exchange(self, block: int, cached: int) -> None:
        """Let `block`, which was just taken, be cached in the place of `cached`, which is referenced instead."""
        self._free.pass_expectation(block, cached)
        self._cached[block] = tick = self._cached.pop(cached)
        self._oldest_first[tick] = block
        self._counts[block], self._counts[cached] = 0, 1

    def evict(self) -> int | None:
        """Make the least recently used cached block free and name it, so that the index forgets it too.

        A block is released after those behind it, and used whenever they are: it is evicted after them.
        """
        if not self._cached:
            return None
        _, block = self._oldest_first.popitem(last=False)
        del self._cached[block]
        self._free.add(block, block + 1)
        return block

    def evict_all(self) -> None:
        """Make every cached block free."""
        while self.evict() is not None:
            pass

    def check_fits(self, num_tokens: int, block_size: int) -> None:
        """Raise `PearlOutOfBlocksError` if a sequence of `num_tokens` tokens could not have blocks enough ever."""
        num_needed = -(-num_tokens // block_size)
        if num_needed > self.max_blocks:
            raise PearlOutOfBlocksError(
                f"a sequence of {num_tokens} tokens needs {num_needed} blocks of {block_size} tokens, and the "
                f"paged cache has at most {self.max_blocks}. Raise `PearlConfig(cache_memory=...)`."
            )

    def out_of_blocks(self, num_needed: int) -> PearlOutOfBlocksError:
        """The error that says what was needed, what there is, and what to change."""
        return PearlOutOfBlocksError(
            f"the paged cache is full: {num_needed} more block(s) needed, {self.num_free} free, "
            f"{self.num_cached} cached, {self.num_referenced} in use of at most {self.max_blocks}. Raise "
            f"`PearlConfig(cache_memory=...)` (`max_blocks` of a cache of your own), "
            f"or generate fewer or shorter sequences at a time."
        )
