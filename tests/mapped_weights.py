"""Weights in a file without a name, which another process maps: a stand-in for CUDA IPC."""

from __future__ import annotations

import os

import torch

from hf_pearl.parallel.workers.descriptors import anonymous_memory
from hf_pearl.parallel.workers.device_weights import SharedStorage


def map_file(path: str) -> torch.UntypedStorage:
    """What a worker is told to call: the storage that the file is."""
    size = os.stat(path).st_size
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8).untyped_storage()


class MappedWeights:
    """Moves the weights of models into files, and stands in for `device_weights` where these are concerned."""

    def __init__(self) -> None:
        self._files: dict[int, int] = {}  # address -> descriptor
        self.held: list[SharedStorage] = []  # shared, and not yet released

    def move(self, model: torch.nn.Module) -> None:
        """Have all that a model holds lie in files, one for each module."""
        for module in model.modules():
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            sizes = [-(-tensor.nbytes // 64) * 64 for tensor in tensors]
            if not tensors or all(self.can_share(tensor) for tensor in tensors):
                continue
            file = anonymous_memory("test", sum(sizes))
            storage = map_file(f"/proc/self/fd/{file}")
            self._files[storage.data_ptr()] = file
            for tensor, size, end in zip(tensors, sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True):
                offset, layout = (end - size) // tensor.itemsize, (tensor.shape, tensor.contiguous().stride())
                mapped = torch.empty(0, dtype=tensor.dtype).set_(storage, offset, *layout)
                tensor.data = mapped.copy_(tensor.detach())

    def can_share(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in a file."""
        return tensor.untyped_storage().data_ptr() in self._files

    def share(self, storage: torch.UntypedStorage) -> SharedStorage:
        """Say where the file is."""
        self.held.append(SharedStorage(map_file, (f"/proc/{os.getpid()}/fd/{self._files[storage.data_ptr()]}",)))
        return self.held[-1]

    def release(self, shared: list[SharedStorage]) -> None:
        """One by one, and each but once."""
        for each in shared:
            self.held.remove(each)

    def close(self) -> None:
        """Close the files; what is mapped stays."""
        for file in self._files.values():
            os.close(file)
