"""Which mode of decoding is fastest? Found out while decoding, from cycles in each of them.

A cycle is what passes from the wish for a forward to its verdict. A draft costs more than its own time: a core that the
target then lacks, memory bandwidth, wider windows. So what is compared is what users see, tokens per second and row.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Literal

from .policy import ForwardTimes

# Without a draft; with it drafting all the time (PEARL); with it drafting while the target waits, which has all cores.
Mode = Literal["plain", "parallel", "sequential"]
MODES: tuple[Mode, ...] = ("plain", "parallel", "sequential")

NUM_PLAIN, NUM_BLOCK = 6, 12  # cycles without, with a draft before it is the other mode's turn, in a contest
NUM_CLEAR, CLEAR = 24, 2.0  # cycles of one from which a lead may be clear; standard errors by which it is
FAR_BEHIND = 0.8  # times as fast, and the challenger has lost
NUM_CONTEST, NUM_BEHIND = 96, 24  # cycles of each after which it has lost, too: its lead is not clear, or there is none
NUM_USED = 24  # cycles of the mode in use between two looks around
# How much faster a mode must be: the draft rests, or drafts beside the target, where the outcome is close.
HANDICAP: dict[Mode, float] = {"plain": 1.0, "parallel": 1.01, "sequential": 1.05}
MIN_PATIENCE, MAX_PATIENCE = 256, 16384  # cycles until a mode that was slower is tried again


class Benefit:
    """Which mode should be used, for calls of one kind.

    The mode in use is left for one that has won a contest with it. In a contest the two take turns every few cycles, so
    that both decode the same text: how much of it can be guessed differs more between texts than between modes.

    Parameters
    ----------
    modes : sequence of Mode
        Those there are; the first is measured first, while the draft's worker may still be starting.

    Attributes
    ----------
    mode : Mode
        That of the next cycle.
    """

    def __init__(self, modes: Sequence[Mode] = MODES) -> None:
        self.modes = modes
        self._cycles: dict[Mode, deque[tuple[float, float]]] = {}  # tokens per row, seconds
        self._ages: dict[Mode, int] = {}  # cycles since
        self._patience: dict[Mode, int] = {}
        for mode in modes:
            self._cycles[mode] = deque(maxlen=2 * NUM_CONTEST)
            self._ages[mode], self._patience[mode] = 0, MIN_PATIENCE
        self._champion: Mode = modes[0]
        self._challenger: Mode | None = None
        self.mode: Mode = self._champion
        self._left = NUM_PLAIN

    @property
    def rests(self) -> bool:
        """Whether decoding goes on without the draft because that has been found to be faster."""
        return self._champion == self.mode == "plain" and all(self._cycles.values())

    def rate(self, mode: Mode) -> float:
        """Tokens per second and row; 0.0 while unknown.

        Without a draft by the median of the seconds, of which there are few: a stray cycle decides nothing.
        """
        cycles = self._cycles[mode]
        if not cycles:
            return 0.0
        seconds = [seconds for _, seconds in cycles]
        mean = statistics.median(seconds) if mode == "plain" else statistics.mean(seconds)
        return statistics.mean(tokens for tokens, _ in cycles) / mean if mean > 0 else 0.0

    def _error(self, mode: Mode) -> float:
        """Standard error of a rate, a ratio of means; without a draft only what is looked up makes cycles differ."""
        cycles, rate = self._cycles[mode], self.rate(mode)
        if len(cycles) < 2 or not rate:
            return 0.0
        weight = 0.0 if mode == "plain" else rate
        deviation = statistics.stdev(tokens - weight * seconds for tokens, seconds in cycles)
        mean_seconds = statistics.mean(tokens for tokens, _ in cycles) / rate
        return deviation / math.sqrt(len(cycles)) / mean_seconds

    @property
    def drafted_rate(self) -> float:
        """The best rate with a draft."""
        return max((self.rate(mode) for mode in self.modes if mode != "plain"), default=0.0)

    def record(self, num_tokens: float, seconds: float) -> None:
        """Learn from a cycle of `num_tokens` tokens per row in the present mode."""
        for mode in self.modes:
            self._ages[mode] += 1
        self._ages[self.mode] = 0
        self._cycles[self.mode].append((num_tokens, seconds))
        self._left -= 1
        if self._left > 0:
            return
        if self._challenger is None:
            self._look_around()
        elif self.mode == self._challenger:
            self._turn(self._champion)
        elif self._is_over(self._challenger):
            self._look_around()
        else:
            self._turn(self._challenger)

    def _turn(self, mode: Mode) -> None:
        self.mode, self._left = mode, NUM_PLAIN if mode == "plain" else NUM_BLOCK

    def _is_over(self, challenger: Mode) -> bool:
        """Whether the contest has been decided."""
        lead, error = self._lead(challenger)
        num_cycles = max(len(self._cycles[challenger]), len(self._cycles[self._champion]))
        if lead > CLEAR * error and num_cycles >= NUM_CLEAR:
            self._patience[self._champion] = MIN_PATIENCE
            self._champion = challenger
            return True
        is_far_behind = self.rate(challenger) < FAR_BEHIND * self.rate(self._champion)
        is_over = is_far_behind or num_cycles >= (NUM_CONTEST if lead > 0.0 else NUM_BEHIND)
        if is_over:
            self._patience[challenger] = min(2 * self._patience[challenger], MAX_PATIENCE)
        return is_over

    def _look_around(self) -> None:
        """Begin a contest with a mode that is unknown, seems to be faster, or was not tried for long, if any."""
        self._challenger = None
        self.mode, self._left = self._champion, NUM_USED
        for mode in self.modes:
            lead, error = self._lead(mode)
            is_overdue = self._ages[mode] > self._patience[mode]
            if mode != self._champion and (not self._cycles[mode] or lead > CLEAR * error or is_overdue):
                self._cycles[mode].clear()
                self._cycles[self._champion].clear()
                self._challenger = mode
                self._turn(mode)
                return

    def _lead(self, mode: Mode) -> tuple[float, float]:
        """By how much a mode is faster than the one in use, and the standard error of that."""
        lead = self._worth(mode) - self._worth(self._champion)
        return lead, math.hypot(self._error(mode), self._error(self._champion))

    def _worth(self, mode: Mode) -> float:
        return self.rate(mode) / HANDICAP[mode]


class Benefits:
    """One `Benefit` per number of rows, in powers of two: more rows leave less to gain.

    Attributes
    ----------
    times : dict of Mode and ForwardTimes
        Of target forwards in each mode.
    """

    def __init__(self) -> None:
        self.times: dict[Mode, ForwardTimes] = {mode: ForwardTimes() for mode in MODES}
        self._by_rows: dict[tuple[int, bool], Benefit] = {}

    def of(self, num_rows: int, is_concurrent: bool = True) -> Benefit:
        """The one for `num_rows` rows; for a draft that is not concurrent, "sequential" would be what "parallel" is."""
        modes = MODES if is_concurrent else MODES[:2]
        return self._by_rows.setdefault((num_rows.bit_length(), is_concurrent), Benefit(modes))

    @property
    def all(self) -> list[Benefit]:
        """All there are."""
        return list(self._by_rows.values())
