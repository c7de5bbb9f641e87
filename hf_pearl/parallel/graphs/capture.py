"""Capturing calls that compute on fixed buffers, to run them again at the cost of one launch.

Two implementations of one interface: CUDA graphs, and a stand-in that calls what was "captured" again. With it all else
about graphs, their buffers, sizes and number, runs on a CPU as it does on a GPU.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .failed_capture import undo_capture

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


@functools.cache
def _capture_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    """Where warm-ups run and captures are made for lanes whose stream is of this priority.

    A graph's kernels have the priority of the stream that they were captured on, not of the one that replays them.
    """
    return torch.cuda.Stream(device, priority=priority)


def stream_priority(device: torch.device) -> int:
    """Of this thread's current stream; what is captured for one is of no use on another."""
    return torch.cuda.current_stream(device).priority if device.type == "cuda" else 0


class CudaCapture:
    """CUDA graphs in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device(device.type, index)  # "cuda" would be another one in another thread.
        self._pool: Any = None

    def capture(self, run: Run) -> Captured:
        """A CUDA graph of `run`, of the current stream's priority. Other threads may use the device, not capture.

        Nor may they draw from the device's default generator (`torch.rand`, `torch.multinomial`, dropout) on torch
        2.11, which raises there meanwhile: it has one flag that says whether anything is being captured. Our own noise
        does not come from that generator.
        """
        lane = torch.cuda.current_stream(self._device)
        stream = _capture_stream(self._device, lane.priority)
        stream.wait_stream(lane)
        try:
            # Not `torch.cuda.graph`: after a failure it leaves its stream the thread's current one.
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    run()
                with _no_collection(), _no_work_spaces():
                    return self._captured(run)
        finally:
            lane.wait_stream(stream)

    def _captured(self, run: Run) -> torch.cuda.CUDAGraph:
        """Capture it on the current stream."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph, has_begun = torch.cuda.CUDAGraph(), False
        try:
            with torch.inference_mode(False):  # The generator makes tensors here that any later capture writes to.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
            has_begun = True
            run()
            graph.capture_end()
        except BaseException:
            undo_capture(graph, self._pool, self._device, has_begun)
            self._pool = None
            raise
        return graph

    def release(self) -> None:
        """Forget the pool, which goes with its last graph."""
        self._pool = None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage inside: among it may be graphs and events, which must not be destroyed during a capture.

    To collect it before, as torch once did, takes its time for each capture, and prevents none during it.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _no_work_spaces() -> Iterator[None]:
    """Have cuBLAS make its work spaces anew inside, in the memory of what is captured, and keep none of them.

    torch holds one per handle and stream for as long as it likes: `torch.compile`'s own graphs have all of them freed,
    and on torch 2.13 so are those of its stream when any graph ends. A graph that had been captured with such a
    one would write to memory that is somebody else's by then. In the graphs' own memory it stays theirs.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


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
