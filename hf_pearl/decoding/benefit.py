"""Does the draft pay? Found out while decoding: cycles with a draft beside cycles without one.

A cycle is what passes from the wish for a forward to its verdict. A draft costs more than its own time: a core that the
target then lacks, memory bandwidth, wider windows. So what is compared is what users see, how long a text takes. It is
counted in the forwards that it would have taken without a draft (`undrafted.py`).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Literal

from .beginnings import Beginnings
from .policy import Pace

Mode = Literal["plain", "drafted"]  # the draft rests, or works
MODES: tuple[Mode, ...] = ("plain", "drafted")

NUM_PLAIN, NUM_BLOCK = 6, 12  # cycles without, with a draft before it is the other mode's turn, in a contest
MIN_GAIN = 1.01  # times as fast, or the draft rests
NUM_CLEAR, CLEAR = 24, 2.0  # cycles of one from which a lead may be clear; standard errors by which it is
FAR_BEHIND = 0.8  # times as fast, and the challenger has lost, as soon as that is no chance
NUM_CONTEST = 96  # cycles of one after which a lead counts that is not clear
STRAY = 3.0  # times the median of its mode's cycles: one that takes longer says nothing of the mode
MIN_PATIENCE, MAX_PATIENCE = 256, 16384  # cycles until a mode that was slower is tried again
MAX_COST = 0.005  # part of its time that the faster mode may lose to contests


class Benefit:
    """Whether the draft should take part, for calls of one kind.

    The mode in use is left for the other one if that has won a contest. In a contest the two take turns every few
    cycles, so that both decode the same text: how much of it can be guessed differs more between texts than between
    modes. It ends as soon as one is clearly ahead, or after so many cycles that it hardly matters which. The first one
    begins with the first cycle, without the draft.

    Attributes
    ----------
    mode : Mode
        That of the next cycle.
    is_decided : bool
        Whether a contest has ended.
    found : dict of Mode to float
        Rates of both at the end of the last contest.
    """

    def __init__(self) -> None:
        self._cycles: dict[Mode, deque[tuple[float, float]]] = {}  # text per row, seconds
        for mode in MODES:
            self._cycles[mode] = deque(maxlen=2 * NUM_CONTEST)
        self._catching_up: list[tuple[float, float]] = []  # cycles of neither mode in a contest
        self.found: dict[Mode, float] = dict.fromkeys(MODES, 0.0)
        self._patience: float = MIN_PATIENCE
        self._age = 0  # cycles since the last contest
        self._champion: Mode = "drafted"
        self._is_contest = True
        self.is_decided = False
        self.mode: Mode = "plain"
        self._left = NUM_PLAIN

    def for_others(self) -> Benefit:
        """One for calls of another kind, which begin with what has been found here."""
        other = Benefit()
        if self.is_decided:
            other.found = dict(self.found)
            other._begin_reign(self._champion)
        return other

    @property
    def rests(self) -> bool:
        """Whether decoding goes on without the draft because that has been found to be faster."""
        return self._champion == "plain"

    def rate(self, mode: Mode) -> float:
        """Text per second and row; 0.0 while unknown."""
        return _rate(self._typical(mode))

    def _typical(self, mode: Mode) -> list[tuple[float, float]]:
        """The cycles of a mode without strays."""
        cycles = self._cycles[mode]
        if not cycles:
            return []
        longest = STRAY * statistics.median(seconds for _, seconds in cycles)
        return [cycle for cycle in cycles if cycle[1] <= longest]

    def _error(self, mode: Mode) -> float:
        """Standard error of a rate, a ratio of means."""
        cycles = self._typical(mode)
        rate = _rate(cycles)
        if len(cycles) < 2 or not rate:
            return 0.0
        deviation = statistics.stdev(text - rate * seconds for text, seconds in cycles)
        return deviation / math.sqrt(len(cycles)) / statistics.mean(seconds for _, seconds in cycles)

    def record(self, text: float, seconds: float) -> None:
        """Learn from a cycle in the present mode.

        Parameters
        ----------
        text : float
            What it verified, per row: the forwards that this would have taken without a draft.
        """
        self._cycles[self.mode].append((text, seconds))
        self._age += 1
        self._left -= 1
        if self._left > 0:
            return
        if not self._is_contest:
            self._look_around()
        elif self.mode == self._champion and self._is_over():
            self._end_contest()
        else:
            self._turn(self._challenger if self.mode == self._champion else self._champion)

    def record_catching_up(self, text: float, seconds: float) -> None:
        """Learn from a cycle in which the draft read what had been decoded without it: it is a cost of a contest."""
        if self._is_contest:
            self._catching_up.append((text, seconds))

    @property
    def _challenger(self) -> Mode:
        return "plain" if self._champion == "drafted" else "drafted"

    def _turn(self, mode: Mode) -> None:
        self.mode, self._left = mode, NUM_PLAIN if mode == "plain" else NUM_BLOCK

    def _is_over(self) -> bool:
        if self.rate(self._challenger) < FAR_BEHIND * self.rate(self._champion) and -self._lead > self._chance:
            return True
        # Where neither is clear the two are nearly alike, and to go on costs little.
        return self._is_clear or self._is_clearly_behind or self._num_cycles >= NUM_CONTEST

    @property
    def _num_cycles(self) -> int:
        return max(map(len, self._cycles.values()))

    def _end_contest(self) -> None:
        self.found = {mode: self.rate(mode) for mode in MODES}
        if self._is_clear or (self._lead > 0.0 and self._num_cycles >= NUM_CONTEST):
            self._champion, patience = self._challenger, float(MIN_PATIENCE)
        else:
            is_known = self._is_clearly_behind or self._num_cycles < NUM_CONTEST
            patience = self._patience * (2 if is_known else 1)
        self._patience = min(max(patience, self._cost / MAX_COST), MAX_PATIENCE)
        self._begin_reign(self._champion)

    def _begin_reign(self, champion: Mode) -> None:
        self._champion, self.is_decided = champion, True
        self._is_contest, self._age = False, 0
        self.mode, self._left = champion, NUM_CLEAR

    @property
    def _cost(self) -> float:
        """How much longer the contest took than the mode in use would have, in cycles of that one."""
        tried = self._typical(self._challenger) + self._catching_up
        typical, rate = self._typical(self._champion), self.rate(self._champion)
        if not tried or not rate:
            return 0.0
        lost = sum(seconds - text / rate for text, seconds in tried)
        return max(0.0, lost / statistics.mean(seconds for _, seconds in typical))

    def _look_around(self) -> None:
        """Stay in the mode in use, or begin a contest: the other one seems to be faster, or was not tried for long."""
        self._left = NUM_CLEAR
        if self._is_clear or self._age > self._patience:
            self._is_contest = True
            for cycles in (*self._cycles.values(), self._catching_up):
                cycles.clear()
            self._turn(self._challenger)

    @property
    def _lead(self) -> float:
        """By how much the other mode is faster than the one in use; the draft has to be somewhat faster."""
        lead = self.rate("plain") - self.rate("drafted") / MIN_GAIN
        return lead if self._champion == "drafted" else -lead

    @property
    def _is_clear(self) -> bool:
        """Whether the other mode is ahead by more than chance gives."""
        return self._lead > self._uncertainty

    @property
    def _is_clearly_behind(self) -> bool:
        return -self._lead > self._uncertainty

    @property
    def _uncertainty(self) -> float:
        return self._chance if self._num_cycles >= NUM_CLEAR else math.inf

    @property
    def _chance(self) -> float:
        """What chance may give, as far as the cycles so far can tell."""
        return CLEAR * math.hypot(self._error("plain"), self._error("drafted"))


def _rate(cycles: Sequence[tuple[float, float]]) -> float:
    """Text per second of some cycles."""
    seconds = sum(seconds for _, seconds in cycles)
    return sum(text for text, _ in cycles) / seconds if seconds > 0.0 else 0.0


class Benefits:
    """One `Benefit` per number of rows, in powers of two: more rows leave less to gain.

    Attributes
    ----------
    plain_pace : Pace
        Of decoding while the draft rests.
    beginnings : Beginnings
        What calls take before they decode.
    """

    def __init__(self) -> None:
        self.plain_pace = Pace()
        self.beginnings = Beginnings()
        self._by_rows: dict[int, Benefit] = {}

    def of(self, num_rows: int) -> Benefit:
        """The one for `num_rows` rows; until it is decided, what is known of the number of rows that is nearest counts.

        A batch whose rows end one after the other has few cycles of each number: a contest in all of them would cost
        more than it finds.
        """
        size = num_rows.bit_length()
        known = self._by_rows.get(size)
        if known is None:
            known = self._by_rows[size] = Benefit()
        if not known.is_decided:
            decided = [each for each in self._by_rows if self._by_rows[each].is_decided]
            if decided:
                nearest = min(decided, key=lambda each: abs(each - size))
                self._by_rows[size] = known = self._by_rows[nearest].for_others()
        return known

    @property
    def all(self) -> list[Benefit]:
        """All there are."""
        return list(self._by_rows.values())
