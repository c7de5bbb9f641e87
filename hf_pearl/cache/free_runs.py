"""Free blocks, kept as runs of neighbours, so that sequences come to lie in one run and are read without a copy."""

from __future__ import annotations


class FreeRuns:
    """A set of block numbers, stored as maximal runs. Taking the block behind a sequence takes constant time."""

    def __init__(self) -> None:
        self._end_of: dict[int, int] = {}  # first block of a run -> the block behind it
        self._start_of: dict[int, int] = {}  # the block behind a run -> its first
        self._expected: dict[int, int] = {}  # last block of a sequence -> blocks it is likely to take behind it
        self._num_blocks = 0

    def __len__(self) -> int:
        return self._num_blocks

    def add(self, start: int, end: int) -> None:
        """Add the blocks from `start` to `end - 1`, none of which is in the set."""
        if start >= end:
            return
        self._num_blocks += end - start
        if start in self._start_of:
            start = self._start_of.pop(start)
        if end in self._end_of:
            end = self._end_of.pop(end)
        self._end_of[start], self._start_of[end] = end, start

    def take(self, after: int | None, expected: int = 0) -> int | None:
        """Remove a block, the one behind `after` if it is free, and name it; None where there is none.

        `expected` more blocks are likely to be taken behind it; other sequences begin elsewhere if they can.
        """
        if not self._num_blocks:
            return None
        block = after + 1 if after is not None and after + 1 in self._end_of else self._place(expected)
        self._remove(block)
        if after is not None:
            self._expected.pop(after, None)
        self._expected[block] = expected
        return block

    def forget_expectation(self, block: int) -> None:
        """No sequence grows behind `block` any more."""
        self._expected.pop(block, None)

    def pass_expectation(self, block: int, other: int) -> None:
        """What was expected behind `block` is expected behind `other`."""
        self._expected[other] = self._expected.pop(block)

    def _remove(self, block: int) -> None:
        start = block
        if block not in self._end_of:
            start = next(first for first, end in self._end_of.items() if first <= block < end)
        end = self._end_of.pop(start)
        del self._start_of[end]
        self._num_blocks -= end - start
        self.add(start, block)
        self.add(block + 1, end)

    def _place(self, expected: int) -> int:
        """Where a sequence of `expected + 1` blocks begins: in the smallest gap that holds it.

        A gap is what is left of a run behind what the sequence before it is likely to take. If none is large enough, it
        is the largest gap, and if they are all taken by expectations, the middle of the longest run.
        """
        gaps = []
        for start, end in self._end_of.items():
            reserved = min(self._expected.get(start - 1, 0), end - start)
            gaps.append((end - start - reserved, start + reserved))
        fitting = [gap for gap in gaps if gap[0] > expected]
        if fitting:
            return min(fitting)[1]
        largest, place = max(gaps, key=lambda gap: (gap[0], -gap[1]))
        start, end = max(self._end_of.items(), key=lambda run: (run[1] - run[0], -run[0]))
        return place if 2 * largest >= end - start else (start + end) // 2
