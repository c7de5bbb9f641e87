"""What torch leaves undone where the capture of a CUDA graph has failed.

`CUDAGraph.capture_end` stops at the error of `cudaStreamEndCapture`. On torch 2.11 that is before the allocator and the
random generator are told that the capture is over, and before the graph counts as a user of its pool that `reset` takes
off again; on torch 2.13 only the last is left undone.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

_failed: list[torch.cuda.CUDAGraph] = []  # The allocator of pinned memory goes on asking them what is for them.


def undo_capture(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device, has_begun: bool) -> None:
    """End what is left of a capture on the current stream, of whichever part has failed, and give its memory back.

    No other capture may begin in `pool` then; graphs that are there may be replayed.

    Parameters
    ----------
    graph : torch.cuda.CUDAGraph
        It is of no use any more.
    pool : Any
        The handle of the memory pool that it was captured into.
    device : torch.device
        The stream's, with its index.
    has_begun : bool
        Whether `graph.capture_begin` has returned.
    """
    if not _has_ended(graph):
        with suppress(RuntimeError):  # The capture is invalid, or has not begun.
            graph.capture_end()
    if _has_ended(graph):
        graph.reset()
        return
    _failed.append(graph)
    with suppress(RuntimeError):  # It has been ended, or has not begun.
        torch._C._cuda_endAllocateToPool(device.index, pool)
        has_begun = True
    if has_begun:
        with suppress(RuntimeError):  # It has no user any more, in a torch that does this itself.
            torch._C._cuda_releasePool(device.index, pool)
    _heal_generator(device)


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether its `reset` will give everything back."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _heal_generator(device: torch.device) -> None:
    """Make and forget another graph: on torch 2.11 no random number can be drawn on the device until a capture ends."""
    try:
        number, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        number.zero_()
        graph.capture_end()
        graph.reset()
    except RuntimeError as error:
        logger.warning(f"After a capture that failed, no other one can be made on {device}: {error}")
