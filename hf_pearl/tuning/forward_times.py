"""How long one model's forwards take by themselves: a short measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from transformers import PreTrainedModel

from ..decoding.messages import Window
from ..decoding.policy import ForwardTimes
from ..device_guard import synchronize
from ..parallel.cores import leaving_cores
from ..parallel.graphs.cuda_graphs import CAPTURED_FROM
from ..parallel.lane import ModelLane, lane_to_measure

SIZES = (1, 2, 4, 8)  # tokens of a forward
NUM_TIMES = 15


def measured_forward_times(model: PreTrainedModel, token_ids: Sequence[int], num_cores_left: int = 0) -> ForwardTimes:
    """Seconds of a forward by its number of tokens, behind a text of about `token_ids`.

    Parameters
    ----------
    num_cores_left : int
        Cores of the CPU that it leaves to others, as a lane does that runs beside another.
    """
    context = tuple(token_ids[: -max(SIZES)]) or tuple(token_ids[:1])
    lane = lane_to_measure(model)
    times = ForwardTimes()
    with leaving_cores() as cores, lane.ready():
        cores.leave(num_cores_left)
        lane.admit(0, context, len(context) + max(SIZES))
        lane.forward([Window(0, context, 1)])
        for size in SIZES:
            window = Window(0, context[-1:] * size, size)
            for _ in range(CAPTURED_FROM):
                _seconds(lane, window, len(context))
            times.record(size, statistics.median(_seconds(lane, window, len(context)) for _ in range(NUM_TIMES)))
    return times


def _seconds(lane: ModelLane, window: Window, length: int) -> float:
    started = time.perf_counter()
    lane.forward([window])
    synchronize(lane.device)
    seconds = time.perf_counter() - started
    lane.rollback(0, length)
    return seconds
