"""How much of a GPU the caches of a pair may take: what is left beside the weights and the largest forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..cache.sizing import DEFAULT_BLOCK_SIZE, free_cuda_memory, memory_share
from ..decoding.loop import MAX_TOKENS_PER_FORWARD
from ..decoding.messages import Window
from ..model_devices import devices_of, input_device
from .ranks.lane import new_cache, new_lane

CUDA_SHARE = 0.9


def cache_share(device: torch.device, models: Sequence[PreTrainedModel]) -> int:
    """Bytes that the caches of `models` may take on a device.

    On a GPU: nine tenths of what is free while the largest forward of every model with layers on it is under way,
    measured by one.
    """
    if device.type != "cuda":
        return memory_share(device)
    here = [model for model in models if device in devices_of(model)]
    peak = sum(_peak_forward_bytes(model, device) for model in here)
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
