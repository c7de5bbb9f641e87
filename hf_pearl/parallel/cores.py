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


@contextmanager
def leaving_cores(num_cores: int) -> Iterator[None]:
    """Let torch's arithmetic in this process leave `num_cores` cores to others; undone at the end."""
    before = torch.get_num_threads()
    now = max(1, len(available_cores()) - num_cores)
    if num_cores == 0 or now >= before:
        yield
        return
    torch.set_num_threads(now)
    try:
        yield
    finally:
        torch.set_num_threads(before)
