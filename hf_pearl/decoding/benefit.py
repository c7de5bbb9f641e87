"""Does the draft pay? Found out while decoding: cycles with a draft beside cycles without one.

A cycle is what passes from the wish for a forward to its verdict. A draft costs more than its own time: a core that the
target then lacks, memory bandwidth, wider windows. So what is compared is what users see, tokens per second and row.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Literal

from .policy import ForwardTimes

NUM_PLAIN = 6  # cycles without a draft that are measured before it may begin, and when that was long ago
NUM_TRIAL = 24  # cycles with it after which it must have paid, and between two looks at that
NUM_FIRST, FAR_BEHIND = 8, 0.8  # cycles after which a trial ends that is so far behind
MIN_GAIN = 1.01  # times as fast, or it rests: telling it of verdicts takes time outside the cycles
RECENT = 128  # cycles for which a measurement without a draft is taken for what it would be now
EXPIRY = 2048  # cycles after which it is made again, whatever it was: contexts grow
MIN_PATIENCE, MAX_PATIENCE = 256, 16384  # cycles until a draft that did not pay is tried again


class Benefit:
    """Whether the draft should take part, for calls of one kind.

    Attributes
    ----------
    phase : {"measure", "draft", "rest"}
        Decode a few tokens without a draft to see how fast that is; with it; without it, because that is faster.
    """

    def __init__(self) -> None:
        self.phase: Literal["measure", "draft", "rest"] = "measure"
        self._plain: deque[tuple[float, float]] = deque(maxlen=32)  # tokens per row, seconds
        self._drafted: deque[tuple[float, float]] = deque(maxlen=2 * NUM_TRIAL)
        self._left = NUM_PLAIN
        self._age = 0
        self._patience = MIN_PATIENCE

    @property
    def drafts(self) -> bool:
        """Whether the draft should take part in the next cycle."""
        return self.phase == "draft"

    @property
    def plain_rate(self) -> float:
        """Tokens per second and row without a draft; 0.0 while unknown.

        By the median of the seconds, of which there are few: a stray cycle decides nothing.
        """
        if not self._plain:
            return 0.0
        num_tokens = statistics.mean(tokens for tokens, _ in self._plain)
        return num_tokens / statistics.median(seconds for _, seconds in self._plain)

    @property
    def drafted_rate(self) -> float:
        """Tokens per second and row with it; 0.0 while unknown."""
        seconds = sum(seconds for _, seconds in self._drafted)
        return sum(tokens for tokens, _ in self._drafted) / seconds if seconds > 0 else 0.0

    def record(self, num_tokens: float, seconds: float) -> None:
        """Learn from a cycle of `num_tokens` tokens per row, in the phase as it is."""
        if self.drafts:
            self._drafted.append((num_tokens, seconds))
            self._age += 1
        else:
            self._plain.append((num_tokens, seconds))
            self._age = 0
        self._left -= 1
        if self._left <= 0 or self._is_far_behind:
            self._decide()

    @property
    def _is_far_behind(self) -> bool:
        return len(self._drafted) == NUM_FIRST and self.drafts and self.drafted_rate < FAR_BEHIND * self.plain_rate

    def _decide(self) -> None:
        is_measured = len(self._drafted) >= NUM_TRIAL or self._is_far_behind
        is_slower = is_measured and self.drafted_rate < MIN_GAIN * self.plain_rate
        if self.phase == "rest":
            self._drafted.clear()
            self._enter("draft", NUM_TRIAL)
        elif is_slower and self._age <= RECENT:
            self._enter("rest", self._patience)
            self._patience = min(2 * self._patience, MAX_PATIENCE)
        elif is_slower or self._age > EXPIRY:
            self._plain.clear()
            self._enter("measure", NUM_PLAIN)
        else:
            if len(self._drafted) == self._drafted.maxlen:
                self._patience = MIN_PATIENCE
            self._enter("draft", NUM_TRIAL)

    def _enter(self, phase: Literal["measure", "draft", "rest"], num_cycles: int) -> None:
        self.phase, self._left = phase, num_cycles


class Benefits:
    """One `Benefit` per number of rows, in powers of two: more rows leave less to gain.

    Attributes
    ----------
    plain_times : ForwardTimes
        Of target forwards while the draft rests.
    """

    def __init__(self) -> None:
        self.plain_times = ForwardTimes()
        self._by_rows: dict[int, Benefit] = {}

    def of(self, num_rows: int) -> Benefit:
        """The one for `num_rows` rows."""
        return self._by_rows.setdefault(num_rows.bit_length(), Benefit())

    @property
    def all(self) -> list[Benefit]:
        """All there are."""
        return list(self._by_rows.values())
