"""How many blocks fit into the memory there is."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .paged_prefix_cache import DEFAULT_BLOCK_SIZE

CPU_SHARE = 0.25
CUDA_SHARE = 0.5


def bytes_per_block(model: PreTrainedModel, block_size: int = DEFAULT_BLOCK_SIZE) -> int:
    """Bytes of keys and values that one block of every layer takes."""
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = model.get_input_embeddings().weight.dtype.itemsize
    return 2 * config.num_hidden_layers * num_heads * head_dim * itemsize * block_size


def num_blocks_for(models: Sequence[PreTrainedModel], num_bytes: int | None) -> int:
    """Blocks each lane may have, so that all lanes together stay within `num_bytes` (None: a share of what there is).

    Both lanes hold the same tokens, so that they get the same number of blocks.
    """
    per_block = sum(bytes_per_block(model) for model in models)
    if num_bytes is None:
        num_bytes = _memory_share(models[0].get_input_embeddings().weight.device)
    if num_bytes < per_block:
        raise ValueError(
            f"`cache_memory` of {num_bytes} bytes is less than one block of {DEFAULT_BLOCK_SIZE} tokens takes "
            f"({per_block} bytes for both models). Set `PearlConfig(cache_memory=...)` higher."
        )
    return num_bytes // per_block


def _memory_share(device: torch.device) -> int:
    """The total, not what is free now, so that the number of blocks does not change between calls."""
    if device.type == "cuda":
        return int(CUDA_SHARE * torch.cuda.get_device_properties(device).total_memory)
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return int(CPU_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return 2**30
