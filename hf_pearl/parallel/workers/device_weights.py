"""Weights on a GPU that a worker maps from the memory of the process that owns them: CUDA IPC, nothing is copied.

torch counts who uses memory that was shared, and keeps it until nobody does, even where the model that held it is gone.
A worker may end at any moment, in which it counts nothing: so it never does, and its owner counts for it when it has
ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

_mapped: list[torch.UntypedStorage] = []  # for as long as this process lives: see above


class SharedPlace(NamedTuple):
    """Where a tensor lies in a GPU's memory; equal as long as it lies there.

    Attributes
    ----------
    storage : int
        Which of the model's shared storages, in the order of their first tensors.
    address : int
        Of the storage.
    offset : int
        Elements before the tensor in it.
    """

    storage: int
    address: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def view(self, storages: Sequence[torch.UntypedStorage]) -> torch.Tensor:
        """The tensor on its storage."""
        storage = storages[self.storage]
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.strides)


class SharedStorage(NamedTuple):
    """What another process maps a storage of this one with, once."""

    map: Callable[..., torch.UntypedStorage]
    arguments: tuple[Any, ...]

    def open(self) -> torch.UntypedStorage:
        """The storage, in the other process."""
        storage = self.map(*self.arguments)
        _mapped.append(storage)
        return storage


def can_share(tensor: torch.Tensor) -> bool:
    """Whether other processes may map a tensor's memory."""
    return tensor.device.type == "cuda"


def share(storage: torch.UntypedStorage) -> SharedStorage:
    """Let one other process map a storage.

    Raises
    ------
    OSError
        The driver, or the allocator as it is set up, does not share memory.
    """
    try:
        return SharedStorage(_map, storage._share_cuda_())
    except RuntimeError as error:
        raise OSError(f"memory of {storage.device} cannot be shared with another process: {error}") from error


def _map(*arguments: Any) -> torch.UntypedStorage:
    torch.cuda.init()
    return torch.UntypedStorage._new_shared_cuda(*arguments)


def release(shared: Iterable[SharedStorage]) -> None:
    """Count for a process that has ended, or never came, that it uses these no more."""
    counters = [each.arguments[4:6] for each in shared]  # the file and the place of each
    for counter in counters:
        torch.UntypedStorage._release_ipc_counter_cuda(*counter)
    if counters:
        torch.cuda.ipc_collect()


def settle(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until what this thread has queued is done: another process is not ordered with its streams."""
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
