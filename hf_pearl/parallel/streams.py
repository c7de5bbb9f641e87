"""Which CUDA stream a lane computes on. Elsewhere than on CUDA, nothing here does anything.

Each lane has a stream of its own per device, so that both run at the same time on one GPU. The draft's is of high
priority: its small kernels go before the blocks of the target's large ones that wait. Lanes exchange token ids through
the host, and so no lane's stream ever waits for the other's; they are ordered with the caller's by events alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from ..decoding.messages import Window

_NO_RANGE: AbstractContextManager[None] = nullcontext()


@functools.cache
def _stream(device: torch.device, is_urgent: bool) -> torch.cuda.Stream:
    """One stream per lane and device for all calls: the allocator keeps freed memory by stream."""
    return torch.cuda.Stream(device, priority=-1 if is_urgent else 0)


class LaneStream:
    """The stream of a lane in one call. What its maker has queued before comes first.

    Parameters
    ----------
    is_urgent : bool
        Whether its kernels go before those of other lanes.
    """

    def __init__(self, device: torch.device, is_urgent: bool = False) -> None:
        self._device = device
        self._stream = _stream(device, is_urgent) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def running(self) -> Iterator[None]:
        """What this thread queues inside goes to the stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What this thread queues from now on waits for the lane."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


@contextmanager
def on_lane_stream(device: torch.device) -> Iterator[None]:
    """Run a lane in the caller's thread, between what the caller has queued and what it queues afterwards."""
    stream = LaneStream(device)
    try:
        with stream.running():
            yield
    finally:
        stream.join()


def nvtx_range(device: torch.device, what: str, windows: Sequence[Window]) -> AbstractContextManager[None]:
    """A range that profilers of NVIDIA show, "target: 9 tokens"."""
    if device.type != "cuda":
        return _NO_RANGE
    num_tokens = sum(len(window.token_ids) for window in windows)
    return torch.cuda.nvtx.range(f"{what}: {num_tokens} tokens")
