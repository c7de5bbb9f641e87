"""What really ran, from torch's profiler: the attention, whether graphs were replayed, how long the device was busy.

Nothing is asked of the code that is measured, so that it cannot say one thing and do another.

From its first use on, it stays attached to the driver (CUPTI; on torch 2.11 unless TEARDOWN_CUPTI=1). That may make
launches slower (pytorch issue 144455), most of all for who launches every kernel alone: contests come first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ...device_guard import synchronize

# The first that is among the names of what ran: kernels, and operators of torch, which sometimes launch each other.
ATTENTION = {
    "paged_attention_kernel": "triton",
    "scaled_dot_product": "sdpa",
    "varlen_attn": "varlen_attn",
    "flash_fwd": "flash_attn",
    "flash_attn_3": "flash_attn",
}
GRAPH_LAUNCH = "GraphLaunch"


class Observed(NamedTuple):
    """What a call did.

    Attributes
    ----------
    attention : str
        A value of `ATTENTION`, or "unknown".
    uses_graphs : bool
        Whether a CUDA graph was replayed.
    device_seconds : float or None
        Time in which the device computed; None on a CPU.
    """

    attention: str
    uses_graphs: bool
    device_seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return self._asdict()


def observe(call: Callable[[], object], device: torch.device) -> Observed:
    """Watch one call."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    synchronize(device)
    with profile(activities=activities, acc_events=True) as watched:
        call()
        synchronize(device)
    events = watched.key_averages()
    names = [event.key for event in events]
    busy = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
    return Observed(attention_among(names), _is_among(GRAPH_LAUNCH, names), 1e-6 * busy if is_cuda else None)


def attention_among(names: Collection[str]) -> str:
    """Which attention has run, by the names of operators and kernels."""
    return next((attention for part, attention in ATTENTION.items() if _is_among(part, names)), "unknown")


def _is_among(part: str, names: Collection[str]) -> bool:
    return any(part in name for name in names)
