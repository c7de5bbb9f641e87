"""Calls that nobody times, until an engine captures no more CUDA graphs.

A size is captured in its second step, which takes as long as several eager ones. Of a text as short as a benchmark's
that is a large part; of what a server writes, it is none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .completion import Workload, complete
from .methods import Setting

MOST_ROUNDS = 6  # of each setting
MOST_SECONDS = 15.0  # of all


def warm_graphs(workload: Workload, settings: Sequence[Setting]) -> None:
    """Call `generate` on every batch with each setting of our engine, until a round of them captures nothing.

    What is still captured later shows in `PearlStats.warm_up_steps`.
    """
    deadline = time.monotonic() + MOST_SECONDS
    for setting in settings:
        for _ in range(MOST_ROUNDS):
            if not _round(workload, setting, deadline):
                break


def _round(workload: Workload, setting: Setting, deadline: float) -> int:
    """Generate every batch for which there is time; how often something was captured."""
    num_captures = 0
    for batch in workload.batches:
        if time.monotonic() > deadline:
            return 0
        stats = complete(workload, setting, batch).stats
        num_captures += 0 if stats is None else stats.warm_up_steps
    return num_captures
