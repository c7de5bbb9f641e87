"""Signs of life of a lane's processes, and how they are watched.

Slow work must not be taken for a lane that stands still, so there are two signs, both of them counters:

| sign     | counts                                   | stops in                                    | given up after   |
|----------|------------------------------------------|---------------------------------------------|------------------|
| beats    | rounds of a thread of the worker's own   | a stopped process, or one whose interpreter | `SILENT_SECONDS` |
|          |                                          | is held by one endless call                 |                  |
| progress | layers computed, looks for a message,    | an endless loop, a deadlock, a sleep        | `STUCK_SECONDS`  |
|          | pieces of a model compiled               |                                             |                  |

The longest forward makes progress with every layer, and a lane that waits for messages looks for them all the time. A
rank that follows another is only watched while that one waits for it: there, progress is layers and sums over ranks.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .workers.child_process import Parent

LOOK_SECONDS = 0.5  # between two looks for a message, while none comes
BEAT_SECONDS = 0.2
SILENT_SECONDS = 5.0
STUCK_SECONDS = 60.0
CONFIRM_SECONDS = 1.0
BEATS, PROGRESS = 1, 2  # places in the control words of the shared memory
NUM_WORDS = 8  # of a rank's control words: a line of the processor's cache, which nobody else writes to


def stands_still() -> str:
    """What is said of a lane without progress."""
    return f"stands still: no layer computed, and nothing else done, in {STUCK_SECONDS:g} s"


class Watch:
    """Tells when a counter has stood still for too long.

    A counter that seems to have stopped is looked at again `CONFIRM_SECONDS` later: where the machine or a container
    was frozen as a whole, both sides wake at once, and the counter has moved by then.

    Parameters
    ----------
    clock : callable
        Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._value: int | None = None
        self._since = 0.0
        self._suspected: float | None = None

    def stands_still(self, value: int, limit: float) -> bool:
        """Whether the counter, which is at `value` now, has not moved for `limit` seconds."""
        now = self._clock()
        if value != self._value:
            self._value, self._since, self._suspected = value, now, None
        if now - self._since < limit:
            return False
        if self._suspected is None:
            self._suspected = now
        return now - self._suspected >= CONFIRM_SECONDS

    @property
    def seconds_still(self) -> float:
        """Since when the counter has been seen where it was at the last look."""
        return self._clock() - self._since


class Signs:
    """Both signs of one process, as another one watches them.

    Parameters
    ----------
    clock : callable
        Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._beats, self._progress = Watch(clock), Watch(clock)
        self._num_runs = 0

    def missing_at_start(self, process_id: int) -> str:
        """Why a process that has not given its first sign is to be given up now; empty while it runs.

        Imports and weights take as long as they take. But it does not come if the system holds it back.
        """
        self._num_runs += not _is_stopped(process_id)
        if self._beats.stands_still(self._num_runs, SILENT_SECONDS):
            return f"its process has been stopped for {SILENT_SECONDS:g} s while it started"
        return ""

    def missing(self, control: memoryview, num_waits: int = 0) -> str:
        """Why the process is to be given up now; empty while it lives.

        Parameters
        ----------
        control : memoryview
            Its control words.
        num_waits : int
            How often it has been waited for: what it did not do before a wait is not held against it.
        """
        if self._beats.stands_still(control[BEATS], SILENT_SECONDS):
            return f"no sign of life for {SILENT_SECONDS:g} s: its process is stopped, or never runs"
        if self._progress.stands_still(control[PROGRESS] + num_waits, STUCK_SECONDS):
            return f"it {stands_still()}"
        return ""

    @property
    def is_silent(self) -> bool:
        """Whether some beats have been missed: soon it beats again, or is given up."""
        return self._beats.seconds_still > 5 * BEAT_SECONDS


def _is_stopped(process_id: int) -> bool:
    """Whether the system holds a process back: after SIGSTOP, or for a debugger."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return False
    return state in (b"T", b"t")


class Pulse(threading.Thread):
    """A worker's thread that gives both signs, whatever its main thread does, and ends the worker with its parent.

    Parameters
    ----------
    control : memoryview
        The control words of the shared memory.
    lifeline : int
        Descriptor of a socket whose other end the parent closes in the end.
    parent : Parent
        Whose end ends this process: a forked child of it may hold the other end of the lifeline open.

    Attributes
    ----------
    progress : callable
        What has been done so far.
    """

    def __init__(self, control: memoryview, lifeline: int, parent: Parent) -> None:
        super().__init__(name="hf_pearl pulse", daemon=True)
        self.progress: Callable[[], int] = int
        self._control, self._parent = control, parent
        self._end = select.poll()
        self._end.register(lifeline, select.POLLRDHUP)

    def run(self) -> None:
        """Beat until the parent has ended, or has given the worker up."""
        while not self._end.poll(1000 * BEAT_SECONDS) and os.getppid() == self._parent.process_id:
            self._control[BEATS] += 1
            self._control[PROGRESS] = self.progress()
        os._exit(0)  # The main thread may stand still.
