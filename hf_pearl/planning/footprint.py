"""How much memory a model takes beside another, and how much of it a forward reads: from its structure alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..cache.sizing import CacheNeeds
from ..decoding.loop import MAX_TOKENS_PER_FORWARD

GRAPH_TOKENS = 64  # of the largest forward that is worth a CUDA graph
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Footprint(NamedTuple):
    """Bytes of one model.

    Attributes
    ----------
    weights : int
        All weights, tied ones once.
    read : int
        Those that a forward of one token reads: no embeddings but one row, and the experts that it is sent to.
    cache_per_token : int
        Keys and values of one token.
    working : int
        What the largest forward needs beside weights and cache; an estimate.
    graphs : int
        What CUDA graphs keep: the working memory of their largest forward; an estimate.
    num_layers, num_kv_heads : int
        Into how many parts it can be divided, by layers and by heads.
    """

    weights: int
    read: int
    cache_per_token: int
    working: int
    graphs: int
    num_layers: int
    num_kv_heads: int

    @classmethod
    def of(cls, model: PreTrainedModel, weights: int | None = None, eight_bit_cache: bool = False) -> Footprint:
        """That of a model, which may lie on the meta device.

        Parameters
        ----------
        weights : int or None
            Bytes of its weights, where the checkpoint says more of them than the structure does (quantised ones).
        """
        config = model.config.get_text_config()
        found = sum(parameter.nbytes for parameter in model.parameters())  # tied ones come once
        needs = CacheNeeds(model.config, _dtype(model), torch.device("cpu"), eight_bit_cache)
        per_token, logits = _working_per_token(model, config, needs.heads)
        longest = getattr(config, "max_position_embeddings", None) or MAX_TOKENS_PER_FORWARD
        num_tokens = min(longest, MAX_TOKENS_PER_FORWARD)
        mask = num_tokens**2 * _dtype(model).itemsize
        weights = found if weights is None else weights
        return cls(
            weights=weights,
            read=weights * _read(model, config) // max(found, 1),
            cache_per_token=needs.bytes_per_block(1),
            working=num_tokens * per_token + mask + GRAPH_TOKENS * logits,
            graphs=GRAPH_TOKENS * (per_token + logits),
            num_layers=config.num_hidden_layers,
            num_kv_heads=needs.heads[0],
        )


def _dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def _read(model: PreTrainedModel, config: Any) -> int:
    """Bytes of the weights that a forward of one token reads."""
    num_experts = next((getattr(config, name) for name in _EXPERT_COUNTS if getattr(config, name, None)), None)
    num_chosen = getattr(config, "num_experts_per_tok", None)
    share = num_chosen / num_experts if num_experts and num_chosen else 1.0
    read = 0.0
    for name, parameter in model.named_parameters():
        read += parameter.nbytes * (share if ".experts." in name else 1.0)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        read -= embeddings.weight.nbytes
    return int(read)


def _working_per_token(model: PreTrainedModel, config: Any, heads: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes of a token's vectors that exist at once in a layer, and of its logits with what is made of them.

    `heads` are those of its cache.
    """
    hidden = config.hidden_size
    num_kv_heads, key_dim, value_dim = heads
    attention = (key_dim + value_dim) * (config.num_attention_heads + num_kv_heads)
    inner = (getattr(config, "intermediate_size", None) or 4 * hidden) * (
        getattr(config, "num_experts_per_tok", None) or 1
    )
    item = _dtype(model).itemsize
    vocab_size = getattr(config, "vocab_size", hidden)
    return (2 * hidden + max(attention, 3 * inner)) * item, vocab_size * (item + 2 * torch.float32.itemsize)
