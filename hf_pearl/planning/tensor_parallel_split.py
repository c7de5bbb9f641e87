"""How many devices the tensor-parallel lanes of a pair get: the split that yields the most tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..cache.sizing import CUDA_SHARE
from .footprint import Footprint
from .planner import ALL_REDUCE_SECONDS, ASSUMED_ACCEPTANCE, ASSUMED_BANDWIDTH, expected_tokens, forward_seconds
from .topology import Device

WORTH_IT = 1.01  # What more devices have to bring; less is lost in what is not estimated.


class TensorParallelSplit(NamedTuple):
    """Sizes of both lanes, and what is expected of them.

    Attributes
    ----------
    target_tp, draft_tp : int
        Devices of each.
    target_bytes, draft_bytes : int
        On one of its devices, the cache not counted.
    num_tokens : int
        For which the caches have room.
    target_seconds, draft_seconds : float
        Of a forward of one token.
    tokens_per_second : float
        Of one sequence, if nothing but the models took time.
    """

    target_tp: int
    draft_tp: int
    target_bytes: int
    draft_bytes: int
    num_tokens: int
    target_seconds: float
    draft_seconds: float
    tokens_per_second: float


def tensor_parallel_split(
    devices: Sequence[Device],
    target: Footprint,
    draft: Footprint,
    min_tokens: int,
    acceptance: float = ASSUMED_ACCEPTANCE,
    measured_seconds: tuple[float, float] | None = None,
) -> TensorParallelSplit | None:
    """The best sizes; None where no split holds the pair. Of those within 1% of the best, the fewest devices.

    While the target computes one forward, the draft writes `c` tokens, `c` being the ratio of their times. Of these and
    the target's own `(1 - a ** (c + 1)) / (1 - a)` stand on average if each stands with the chance `a` (Leviathan et
    al. 2023, arXiv 2211.17192). More devices for the target make forwards shorter, more for the draft make them yield
    more.

    Parameters
    ----------
    acceptance : float
        That chance, below 1.
    measured_seconds : tuple of float or None
        Of a forward of the target and of a step of the draft, each on one device; None: estimated.
    """
    memory = min(device.memory for device in devices)
    bandwidth = min(device.bandwidth or ASSUMED_BANDWIDTH for device in devices)
    measured = measured_seconds or (None, None)
    found: list[TensorParallelSplit] = []
    for used in range(2, len(devices) + 1):
        for target_tp in range(used - 1, 0, -1):
            sizes = target_tp, used - target_tp
            lanes = list(zip((target, draft), sizes, strict=True))
            num_tokens = min(_num_tokens(memory, lane, size) for lane, size in lanes)
            if num_tokens < min_tokens:
                continue
            times = [_seconds(lane, size, bandwidth, seen) for (lane, size), seen in zip(lanes, measured, strict=True)]
            rate = expected_tokens(times[0] / times[1], acceptance) / times[0]
            held = [_bytes(lane, size) for lane, size in lanes]
            found.append(TensorParallelSplit(*sizes, held[0], held[1], num_tokens, times[0], times[1], rate))
    best = max((each.tokens_per_second for each in found), default=0.0)
    good = [each for each in found if WORTH_IT * each.tokens_per_second >= best]
    return min(good, key=lambda each: (each.target_tp + each.draft_tp, -each.tokens_per_second), default=None)


def _seconds(lane: Footprint, size: int, bandwidth: float, measured: float | None) -> float:
    if measured is None:
        return forward_seconds(lane, size, bandwidth)
    return measured / size + (2 * ALL_REDUCE_SECONDS * lane.num_layers if size > 1 else 0.0)


def _bytes(lane: Footprint, size: int) -> int:
    return lane.weights // size + lane.working + lane.graphs


def _num_tokens(memory: int, lane: Footprint, size: int) -> int:
    heads = (
        -(-lane.num_kv_heads // size) / lane.num_kv_heads
    )  # Heads are not divided; some devices may hold a zero one.
    return int(CUDA_SHARE * (memory - _bytes(lane, size)) / (lane.cache_per_token * heads))
