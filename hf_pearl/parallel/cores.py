"""Which cores of a CPU the lanes take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_for_worker(num_threads: int) -> list[int]:
    """The last cores there are; none to name where nothing would be left for the engine."""
    cores = available_cores()
    return cores[-num_threads:] if len(cores) > num_threads else []


class SharedCores:
    """The cores that torch's arithmetic in this process takes, of which it may leave some to others.

    Parameters
    ----------
    most : int or None
        Threads that it may take: those of one rank, where a model lies on several; None: as many as it takes.
    """

    def __init__(self, most: int | None = None) -> None:
        self._before = self._num_threads = torch.get_num_threads()
        self.num_left = 0
        if most is not None:
            self._num_threads = min(self._before, most)
            self.leave(0)

    def restore(self) -> None:
        """Take what was taken before."""
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)

    def leave(self, num_left: int) -> None:
        """Leave `num_left` cores to others; 0 takes them back."""
        self.num_left = num_left
        most = max(1, len(available_cores()) - num_left) if num_left else self._num_threads
        num_threads = min(self._num_threads, most)
        if num_threads != torch.get_num_threads():
            torch.set_num_threads(num_threads)


@contextmanager
def leaving_cores(most: int | None = None) -> Iterator[SharedCores]:
    """A scope in which cores may be left to others, and at most `most` are taken; they are taken back at its end."""
    cores = SharedCores(most)
    try:
        yield cores
    finally:
        cores.restore()
