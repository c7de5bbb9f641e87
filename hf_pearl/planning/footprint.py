"""How much memory a model takes beside another, and how much of it a forward reads: from its structure alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..cache.sizing import CacheNeeds
from ..decoding.loop import MAX_TOKENS_PER_FORWARD
from .parts import Part, parts_of

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
        Into how many pieces it can be divided, by layers and by heads.
    parts : tuple of Part
        What its weights are made of, in its order.
    """

    weights: int
    read: int
    cache_per_token: int
    working: int
    graphs: int
    num_layers: int
    num_kv_heads: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, weights: int | None = None, eight_bit_cache: bool = False) -> Footprint:
        """That of a model, which may lie on the meta device.

        Parameters
        ----------
        weights : int or None
            Bytes of its weights, where the checkpoint says more of them than the structure does (quantised ones).
        """
        config = model.config.get_text_config()
        parts = parts_of(model)
        found = sum(part.weights for part in parts)
        needs = CacheNeeds(model.config, _dtype(model), torch.device("cpu"), eight_bit_cache)
        per_token, logits = _working_per_token(model, config, needs.heads)
        longest = getattr(config, "max_position_embeddings", None) or MAX_TOKENS_PER_FORWARD
        num_tokens = min(longest, MAX_TOKENS_PER_FORWARD)
        mask = num_tokens**2 * _dtype(model).itemsize
        if weights is not None:
            parts = _scaled(parts, weights)
        weights = sum(part.weights for part in parts)
        return cls(
            weights=weights,
            read=weights * _read(model, config, found) // max(found, 1),
            cache_per_token=needs.bytes_per_block(1),
            working=num_tokens * per_token + mask + GRAPH_TOKENS * logits,
            graphs=GRAPH_TOKENS * (per_token + logits),
            num_layers=config.num_hidden_layers,
            num_kv_heads=needs.heads[0],
            parts=parts,
        )

    def without(self, common: int) -> Footprint:
        """That of a model of whose weights so many bytes are counted elsewhere; of which part they are is not known."""
        return self._replace(weights=self.weights - common, parts=_scaled(self.parts, self.weights - common))


def _dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def _scaled(parts: Sequence[Part], weights: int) -> tuple[Part, ...]:
    """Parts of so many bytes together: layers are what is quantised, embeddings and heads are not as a rule."""
    kept = sum(part.weights for part in parts if not part.num_layers)
    layers = sum(part.weights for part in parts) - kept
    if kept >= weights or not layers:
        kept, layers = 0, kept + layers
    scaled, before, seen = [], 0, 0  # What is rounded off one part falls to the next.
    for part in parts:
        if kept and not part.num_layers:
            scaled.append(part)
            continue
        seen += part.weights
        until = (weights - kept) * seen // max(layers, 1)
        scaled.append(part._replace(weights=until - before))
        before = until
    return tuple(scaled)


def _read(model: PreTrainedModel, config: Any, found: int) -> int:
    """Bytes of the weights, `found` in all, that a forward of one token reads."""
    num_experts = next((getattr(config, name) for name in _EXPERT_COUNTS if getattr(config, name, None)), None)
    num_chosen = getattr(config, "num_experts_per_tok", None)
    share = num_chosen / num_experts if num_experts and num_chosen else 1.0
    read = float(found)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            read -= parameter.nbytes * (1.0 - share)
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
