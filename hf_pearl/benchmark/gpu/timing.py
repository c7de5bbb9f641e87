"""How long something takes on a device, and how fast its memory is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

NUM_WARM_UPS = 3


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    call: Callable[[], object], device: torch.device, num_runs: int, num_warm_ups: int = NUM_WARM_UPS
) -> float:
    """Median wall time of a call, to the moment when the device has done its work."""
    for _ in range(num_warm_ups):
        call()
    runs = []
    for _ in range(num_runs):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        runs.append(time.perf_counter() - started)
    return statistics.median(runs)


def copy_bandwidth(device: torch.device, num_bytes: int, num_runs: int) -> float:
    """Bytes per second that a device reads and writes while it copies a tensor, both counted."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(lambda: copy.copy_(source), device, num_runs)
