"""What the caches of a pair need, and how much of a GPU they may take: what weights and the largest forward leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..cache.sizing import CUDA_SHARE, DEFAULT_BLOCK_SIZE, CacheNeeds, free_cuda_memory, memory_share, num_blocks_for
from ..decoding.loop import MAX_TOKENS_PER_FORWARD
from ..decoding.messages import Window
from ..model_devices import devices_of, input_device
from .ranks.lane import new_cache, new_lane, num_ranks_here
from .ranks.models import rank_model_of
from .tensor_parallel import num_key_value_heads


def cache_needs(model: PreTrainedModel, eight_bit: bool) -> list[CacheNeeds]:
    """What a model's cache needs, by device; nothing of one on GPUs of other processes (`num_blocks`)."""
    elsewhere = rank_model_of(model)
    if elsewhere is not None and torch.device(elsewhere.device).type != "cpu":
        return []
    return CacheNeeds.by_device(model, eight_bit, num_key_value_heads(model)) * num_ranks_here(model)


def num_blocks(model: PreTrainedModel, eight_bit: bool, asked: int) -> int:
    """Blocks for the cache of a draft in a process of its own: as many as are asked for, if its GPU has room."""
    if input_device(model).type != "cuda":
        return asked
    needs = cache_needs(model, eight_bit)
    return min(asked, num_blocks_for(needs, None, lambda device: cache_share(device, [model])))


def cache_share(device: torch.device, models: Sequence[PreTrainedModel]) -> int:
    """Bytes that the caches of `models` may take on a device.

    On a GPU: nine tenths of what is free while the largest forward of every model with layers on it is under way,
    measured by one.
    """
    if device.type != "cuda":
        return memory_share(device)
    here = [model for model in models if device in devices_of(model)]
    peak = sum(_peak_forward_bytes(model, device) for model in here)
    torch.cuda.empty_cache()  # What is kept for the stream of these forwards, no capture on a lane's could take.
    return max(0, int(CUDA_SHARE * (free_cuda_memory(device) - peak)))


def _peak_forward_bytes(model: PreTrainedModel, device: torch.device) -> int:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS_PER_FORWARD
    num_tokens = min(longest, MAX_TOKENS_PER_FORWARD)
    lane = new_lane(model, new_cache(model, -(-num_tokens // DEFAULT_BLOCK_SIZE), device=input_device(model)))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with lane.ready():
        lane.admit(0, (), num_tokens)
        lane.forward([Window(0, (0,) * num_tokens, 1)])
    torch.cuda.synchronize(device)
    held = sum(layer.nbytes for layer in lane.cache.layers if layer.device == device)
    return torch.cuda.max_memory_allocated(device) - before - held
