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

NUM_PLAIN, NUM_CYCLES = 6, 24  # cycles without, with a draft between two looks at how fast they are
NUM_FIRST, FAR_BEHIND = 8, 0.8  # cycles after which a mode is given up that is so far behind
MIN_GAIN = 1.01  # times as fast as plain decoding, or it rests: telling it of verdicts takes time outside the cycles
CLEAR = 2.0  # standard errors by which another mode must lead
MAX_ROUNDS = 8  # looks after which a lead that is not clear counts for nothing
MIN_PATIENCE, MAX_PATIENCE = 256, 16384  # cycles until a mode that was slower is tried again


class Benefit:
    """Which mode should be used, for calls of one kind.

    The mode in use is left for one that has won a contest with it. In a contest cycles are measured of the challenger,
    and then, while its lead is not clear, of whichever of the two is less certain.

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
            self._cycles[mode] = deque(maxlen=8 * NUM_CYCLES)
            self._ages[mode], self._patience[mode] = 0, MIN_PATIENCE
        self._champion: Mode = modes[0]
        self._challenger: Mode | None = None
        self._num_rounds = 0
        self._measure(self._champion)

    def _measure(self, mode: Mode) -> None:
        self.mode, self._left = mode, NUM_PLAIN if mode == "plain" else NUM_CYCLES

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
        """Standard error of a rate (of a ratio of means); not of plain decoding, whose cycles are alike."""
        cycles, rate = self._cycles[mode], self.rate(mode)
        if mode == "plain" or len(cycles) < 2:
            return 0.0
        deviation = statistics.stdev(tokens - rate * seconds for tokens, seconds in cycles)
        return deviation / math.sqrt(len(cycles)) / statistics.mean(seconds for _, seconds in cycles)

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
        if self._left > 0 and not self._is_far_behind:
            return
        if self._challenger is None or self._is_over(self._challenger):
            self._look_around()

    @property
    def _is_far_behind(self) -> bool:
        if self.mode != self._challenger or len(self._cycles[self.mode]) != NUM_FIRST:
            return False
        return self.rate(self.mode) < FAR_BEHIND * self.rate(self._champion)

    def _is_over(self, challenger: Mode) -> bool:
        """Whether the contest has been decided; otherwise it goes on."""
        self._num_rounds += 1
        lead, error = self._lead(challenger)
        if lead > CLEAR * error:
            self._patience[self._champion] = MIN_PATIENCE
            self._champion = challenger
        elif lead > 0.0 and self._num_rounds < MAX_ROUNDS:
            self._measure(max((challenger, self._champion), key=self._error))
            return False
        elif lead < -error:
            self._patience[challenger] = min(2 * self._patience[challenger], MAX_PATIENCE)
        return True

    def _look_around(self) -> None:
        """Begin a contest with a mode that is unknown, seems to be faster, or was not tried for long, if any."""
        self._challenger = None
        for mode in self.modes:
            lead, error = self._lead(mode)
            is_overdue = self._ages[mode] > self._patience[mode]
            if mode != self._champion and (not self._cycles[mode] or lead > CLEAR * error or is_overdue):
                self._challenger, self._num_rounds = mode, 0
                self._cycles[mode].clear()
                break
        self._measure(self._challenger or self._champion)

    def _lead(self, mode: Mode) -> tuple[float, float]:
        """By how much a mode is faster than the one in use, and the standard error of that."""
        lead = self._worth(mode) - self._worth(self._champion)
        return lead, math.hypot(self._error(mode), self._error(self._champion))

    def _worth(self, mode: Mode) -> float:
        return self.rate(mode) if mode == "plain" else self.rate(mode) / MIN_GAIN


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
