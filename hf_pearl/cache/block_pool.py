"""Which blocks are in use, by how many, and which are free: bookkeeping only, no keys and values."""

from __future__ import annotations

from collections import OrderedDict

from ..errors import PearlOutOfBlocksError


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
        self._counts: list[int] = []
        self._free: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()
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

    def grow(self, num_blocks: int) -> None:
        """Have `num_blocks` blocks in all; the new ones are free."""
        self._free.update(range(self.num_blocks, num_blocks))
        self._counts.extend([0] * (num_blocks - self.num_blocks))
        self.num_blocks = max(self.num_blocks, num_blocks)

    def take(self, after: int | None) -> int | None:
        """Reference a free block, the one next to `after` if possible, so that a sequence lies in one run.

        Returns None where no block is free: the caller grows the pool or evicts a cached block.
        """
        if not self._free:
            return None
        block = after + 1 if after is not None and after + 1 in self._free else self._start_of_a_run(after)
        self._free.remove(block)
        self._counts[block] = 1
        return block

    def _start_of_a_run(self, after: int | None) -> int:
        """The lowest free block; for a sequence that was cut off, the start of the longest free run."""
        if after is None and len(self._free) == self.num_blocks:
            return 0
        best, best_length, start, previous = -1, 0, -1, -2
        for block in sorted(self._free):
            if block != previous + 1:
                start = block
            if block - start + 1 > best_length:
                best, best_length = start, block - start + 1
            previous = block
        # A new sequence begins in the middle of a long run that another sequence is growing into.
        grows_into = best > 0 and self._counts[best - 1] > 0 and best_length >= 4
        return best + best_length // 2 if grows_into else best

    def reference(self, block: int) -> None:
        """One more block table names `block`, referenced or cached."""
        self._cached.pop(block, None)
        self._counts[block] += 1

    def release(self, block: int, keep: bool) -> bool:
        """One block table less names `block`; returns whether it was the last. `keep`: it stays cached, not free."""
        self._counts[block] -= 1
        if self._counts[block]:
            return False
        if keep:
            self._cached[block] = None
        else:
            self._free.add(block)
        return True

    def evict(self) -> int | None:
        """Make the least recently used cached block free and name it, so that the index forgets it too."""
        if not self._cached:
            return None
        block, _ = self._cached.popitem(last=False)
        self._free.add(block)
        return block

    def evict_all(self) -> list[int]:
        """Make every cached block free."""
        blocks = list(self._cached)
        self._cached.clear()
        self._free.update(blocks)
        return blocks

    def out_of_blocks(self, num_needed: int) -> PearlOutOfBlocksError:
        """The error that says what was needed, what there is, and what to change."""
        return PearlOutOfBlocksError(
            f"the paged cache is full: {num_needed} more block(s) needed, {self.num_free} free, "
            f"{self.num_cached} cached, {self.num_referenced} in use of at most {self.max_blocks}. Raise "
            f"`PearlConfig(cache_memory=...)`, or generate fewer or shorter sequences at a time."
        )
