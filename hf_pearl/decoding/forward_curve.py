"""What target forwards take by their number of tokens: measured, whatever shape that has.

A forward takes about the same time whatever its tokens, until it does not: memory bandwidth hides them, then they cost,
on tiles of a GPU in steps. A line through all sizes charges for tokens that are free, or gives away those that cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MEMORY = 256.0  # forwards, after which one counts half
NEIGHBOURS = 0.06  # sizes that differ by this share tell of each other
MIN_WEIGHT = 0.5  # forwards near a size from which it is known
MAX_TOKENS = 1024
REFRESH = 8  # forwards between two looks at all of it
MIN_GAIN = 0.1  # of a forward's yield, from which fewer guesses are better: below it is noise


class ForwardCurve:
    """Mean seconds of forwards near every size; old ones are forgotten slowly."""

    def __init__(self) -> None:
        self._keep = 0.5 ** (1.0 / MEMORY)
        self._weights = np.zeros(MAX_TOKENS + 1)
        self._seconds = np.zeros(MAX_TOKENS + 1)
        self._new: list[tuple[int, float]] = []  # tokens and seconds of those that are not in the arrays yet
        self._since = 0
        self._curve = [math.nan] * (MAX_TOKENS + 1)

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from one forward over `num_tokens` tokens."""
        if num_tokens > MAX_TOKENS:
            return
        self._new.append((num_tokens, seconds))
        self._since = 0 if math.isnan(self._curve[num_tokens]) else self._since - 1
        if len(self._new) >= REFRESH:
            self._take_in()

    def _take_in(self) -> None:
        for num_tokens, seconds in self._new:
            self._weights *= self._keep
            self._seconds *= self._keep
            self._weights[num_tokens] += 1.0
            self._seconds[num_tokens] += seconds
        self._new.clear()

    def seconds(self, first: int, last: int) -> list[float]:
        """Expected seconds of forwards over `first` to `last` tokens; NaN where none of about that size was seen.

        Of more than `MAX_TOKENS`, which no tree of guesses makes, none is expected: fewer are returned.
        """
        if self._since <= 0:
            self._take_in()
            self._since, self._curve = REFRESH, self._smooth().tolist()
        return self._curve[first : last + 1]

    def _smooth(self) -> np.ndarray:
        sizes = np.flatnonzero(self._weights > 1e-3)
        curve = np.full(MAX_TOKENS + 1, np.nan)
        if not len(sizes):
            return curve
        asked = np.arange(sizes[0], sizes[-1] + 1)
        width = np.maximum(0.5, NEIGHBOURS * asked)[:, None]
        kernel = np.exp(-0.5 * ((asked[:, None] - sizes) / width) ** 2)
        weight = kernel @ self._weights[sizes]
        mean = kernel @ self._seconds[sizes] / np.maximum(weight, 1e-9)
        curve[asked] = np.where(weight >= MIN_WEIGHT, mean, np.nan)
        return curve


class Best(NamedTuple):
    """How many of the likeliest guesses a forward should verify, and how many tokens that gains, its time paid for."""

    num_guesses: int
    gain: float


def best_count(num_rows: int, chances: Sequence[float], seconds: Sequence[float], rate: float) -> Best | None:
    """Which forward yields most: over the last verified tokens of all rows, and none, some or all of their guesses.

    A size that was not seen takes at least as long as the next smaller one that was. It is taken to be no slower, so
    that it is tried, and found out; but none beyond twice of what was seen.

    Parameters
    ----------
    num_rows : int
        Tokens of a forward without guesses.
    chances : sequence of float
        Of all guesses, the likeliest first.
    seconds : sequence of float
        Of a forward without guesses, with one, ... and with all of them; NaN where unknown.
    rate : float
        Tokens per second that decoding yields.

    Returns
    -------
    Best or None
        None: nothing is known of such sizes.
    """
    known = [count for count, each in enumerate(seconds) if not math.isnan(each)]
    if not known:
        return None
    most = min(len(chances), num_rows + 2 * known[-1], len(seconds) - 1)
    first = last = seconds[0] if known[0] == 0 else 0.0
    best, best_gain, gain, expected = 0, 0.0, 0.0, 0.0
    for count in range(1, most + 1):
        expected += chances[count - 1]
        last = last if math.isnan(seconds[count]) else seconds[count]
        gain = expected - rate * (last - first)
        if gain > best_gain:
            best, best_gain = count, gain
    if best_gain <= gain + MIN_GAIN * rate * last:
        best, best_gain = most, gain
    return Best(best, best_gain)
