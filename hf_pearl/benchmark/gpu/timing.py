"""How long something takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ...device_guard import synchronize

NUM_WARM_UPS = 3


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
