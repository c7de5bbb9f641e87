"""How many draft steps go into one launch, where the lane can chain them.

A chain saves the host's part of all its steps but one. It costs what comes of hearing verdicts later: while it runs,
guesses are computed behind a token that has been refused meanwhile, and what it found is published at its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable

LENGTHS = (4, 2)  # that are captured; what is between them is made of several
MOST_OF_A_CYCLE = 0.5  # of the time between two verdicts: a chain ends before the target needs what it finds


def chain_length(num_steps: int) -> int:
    """The longest chain of no more than `num_steps`; 1: none."""
    return next((length for length in LENGTHS if length <= num_steps), 1)


class VerdictTimes:
    """How long the target takes from one verdict of a request to the next, as the draft hears them.

    Parameters
    ----------
    clock : callable
        Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._heard: dict[int, float] = {}
        self._seconds: float | None = None

    def hear(self, request_id: int) -> None:
        """A verdict has come."""
        now, before = self._clock(), self._heard.get(request_id)
        self._heard[request_id] = now
        if before is not None:
            known = self._seconds
            self._seconds = now - before if known is None else known + 0.1 * (now - before - known)

    def forget(self, request_id: int) -> None:
        """A request has ended."""
        self._heard.pop(request_id, None)

    def num_steps(self, step_seconds: float) -> int:
        """How many draft steps may be made without hearing a verdict; 1 while times are unknown."""
        if self._seconds is None or step_seconds <= 0.0:
            return 1
        return max(1, int(MOST_OF_A_CYCLE * self._seconds / step_seconds))
