"""On which device kernels are launched, and waiting until they are done."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NO_GUARD: AbstractContextManager[None] = nullcontext()


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the thread's current device: inside, that is the one of `tensor`, if it is on CUDA."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _NO_GUARD


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
