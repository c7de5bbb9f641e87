"""How many blocks fit into the memory there is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..model_devices import input_device, is_dispatched, layer_devices
from .paged_layer import Held

# Measured (docs/cache.md): blocks in runs cost the same at any size; smaller ones share and waste less memory.
DEFAULT_BLOCK_SIZE = 16
CPU_SHARE = 0.25  # of all memory
CUDA_SHARE = 0.9  # of what weights and the largest forward leave
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class CacheNeeds(NamedTuple):
    """What decides how large a block is, and where it lies.

    Attributes
    ----------
    config : PreTrainedConfig
        The model's.
    dtype : torch.dtype
        Of keys and values, unless they are kept in 8 bits.
    device : torch.device
        Where the layers compute.
    eight_bit : bool
        Whether they are: a byte a value, and a float32 scale per token and head.
    num_layers : int or None
        Those on this device; None: all of the model.
    num_heads : int, optional
        Key-value heads of a layer here, where the model is a part of the configured one.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    eight_bit: bool = False
    num_layers: int | None = None
    num_heads: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, eight_bit: bool = False, num_heads: int | None = None) -> CacheNeeds:
        """Those of a model on one device."""
        dtype = model.get_input_embeddings().weight.dtype
        return cls(model.config, dtype, input_device(model), eight_bit, None, num_heads)

    @classmethod
    def by_device(
        cls, model: PreTrainedModel, eight_bit: bool = False, num_heads: int | None = None
    ) -> list[CacheNeeds]:
        """Those of a model, for every device that has layers of it."""
        whole = cls.of(model, eight_bit, num_heads)
        if not is_dispatched(model):
            return [whole]
        on = Counter(layer_devices(model))
        return [whole._replace(device=device, num_layers=num_layers) for device, num_layers in on.items()]

    def bytes_per_block(self, block_size: int = DEFAULT_BLOCK_SIZE) -> int:
        """Bytes of keys and values that one block of every layer takes."""
        num_heads, *head_dims = self.heads
        per_head = sum(dim + 4 if self.eight_bit else dim * self.dtype.itemsize for dim in head_dims)
        num_layers = self.num_layers
        if num_layers is None:
            num_layers = self.config.get_text_config().num_hidden_layers
        return num_layers * num_heads * per_head * block_size

    @property
    def heads(self) -> tuple[int, int, int]:
        """How many heads a layer keeps, and the dimensions of their keys and of their values."""
        config = self.config.get_text_config()
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        key_dim = value_dim = head_dim
        if getattr(config, "kv_lora_rank", None):  # Latent attention is kept expanded.
            num_heads = config.num_attention_heads
            key_dim, value_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        elif getattr(config, "multi_query", False):
            num_heads = 1
        return self.num_heads or num_heads, key_dim, value_dim

    @property
    def held(self) -> Held:
        """What the layers' pools will hold."""
        return Held(self.device, self.dtype, max(self.heads[1:]), self.eight_bit)


def num_blocks_for(
    needs: Sequence[CacheNeeds],
    num_bytes: int | None,
    share_of: Callable[[torch.device], int],
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> int:
    """Blocks that each lane may have. Both hold the same tokens, so that they get the same number of blocks.

    Parameters
    ----------
    num_bytes : int or None
        What all lanes may take together; None: what `share_of` says for their devices.
    """
    if num_bytes is not None:
        return _blocks_within(num_bytes, needs, block_size)
    devices = {each.device for each in needs}
    by_device = {device: [each for each in needs if each.device == device] for device in devices}
    return min(_blocks_within(share_of(device), each, block_size) for device, each in by_device.items())


def _blocks_within(num_bytes: int, needs: Sequence[CacheNeeds], block_size: int) -> int:
    if num_bytes > 2**50:
        raise ValueError(f"`cache_memory` of {num_bytes} bytes is more than a machine has. Set it lower.")
    per_block = sum(each.bytes_per_block(block_size) for each in needs)
    if num_bytes < per_block:
        raise ValueError(
            f"`cache_memory` of {num_bytes} bytes is less than one block of {block_size} tokens takes "
            f"({per_block} bytes for all models together). Set `PearlConfig(cache_memory=...)` higher."
        )
    return num_bytes // per_block


def memory_share(device: torch.device) -> int:
    """Bytes that the caches on a device take at most unless told otherwise.

    On a CPU a share of all memory, not of what is free now; elsewhere half of what is free now.
    """
    if device.type == "cuda":
        return free_cuda_memory(device) // 2
    return int(CPU_SHARE * main_memory())


def free_cuda_memory(device: torch.device) -> int:
    """Bytes that the device has left, those that torch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def main_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in _CGROUP_LIMITS:
        try:
            limits.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits, default=2**32)
