"""Capturing calls that compute on fixed buffers, to run them again at the cost of one launch.

Two implementations of one interface: CUDA graphs, and a stand-in that calls what was "captured" again. With it all else
about graphs, their buffers, sizes and number, runs on a CPU as it does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

_failed: list[torch.cuda.CUDAGraph] = []
NUM_WARM_UPS = 2  # Before a capture libraries choose their algorithms and make work spaces, and Triton compiles.

Run = Callable[[], None]


class Captured(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Queue all of it again, on the current stream."""

    def reset(self) -> None:
        """Give back what it holds; it cannot be replayed any more."""


class Capture(Protocol):
    """Captures calls, whose intermediate results share memory: of one `Capture`, only one runs at a time."""

    def capture(self, run: Run) -> Captured:
        """Capture the work of a call that reads and writes fixed buffers. It may run it, too.

        Raises
        ------
        RuntimeError
            `run` does what cannot be captured: it waits for the device, or reads from it.
        """

    def release(self) -> None:
        """Give back the shared memory; all that was captured must have been reset."""


class CudaCapture:
    """CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def capture(self, run: Run) -> Captured:
        """A CUDA graph of `run`. Other threads may use the device meanwhile, but not capture."""
        for _ in range(NUM_WARM_UPS):
            run()
        if self._pool is None or self._stream is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Not `torch.cuda.graph`: after a failure it leaves its stream the thread's current one.
            with torch.cuda.stream(self._stream):
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        except BaseException:
            self._end_allocation(graph)
            raise
        return graph

    def _end_allocation(self, graph: torch.cuda.CUDAGraph) -> None:
        """What torch leaves undone where a capture has failed: the allocator still asks the graph what is for it."""
        _failed.append(graph)
        with suppress(RuntimeError, AttributeError):  # It was done, or is called otherwise.
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)

    def release(self) -> None:
        """Forget the pool, which goes with its last graph."""
        self._pool = None


class _Rerun:
    """A call, to be made again."""

    def __init__(self, run: Run) -> None:
        self._run: Run | None = run

    def replay(self) -> None:
        """Make it."""
        assert self._run is not None
        self._run()

    def reset(self) -> None:
        """Forget it."""
        self._run = None


class RerunCapture:
    """The stand-in, for any device: a replay makes the call again. For tests; it saves no time."""

    def capture(self, run: Run) -> Captured:
        """Keep `run`; like a capture, this computes nothing."""
        return _Rerun(run)

    def release(self) -> None:
        """There is nothing to give back."""


def capture_for(device: torch.device) -> Capture | None:
    """What captures on a device; None where nothing does."""
    return CudaCapture(device) if device.type == "cuda" else None
