"""What `PagedPrefixCache` may be made with."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..errors import PearlUnsupportedModelError
from .support import ATTENTION_LAYERS


def check_arguments(config: object, max_blocks: object, block_size: object, eight_bit: object) -> None:
    """Raise `TypeError`, `ValueError` or `PearlUnsupportedModelError`, naming argument, value and cure."""
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"`config` must be a model's config (`model.config`), got a {type(config).__name__}.")
    _check_layers(config.get_text_config())
    if type(block_size) is not int or block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"`block_size` must be a power of two, got {block_size!r}.")
    if max_blocks is not None and (type(max_blocks) is not int or max_blocks < 1):
        raise ValueError(f"`max_blocks` must be a positive int or None, got {max_blocks!r}.")
    if not isinstance(eight_bit, bool):
        raise TypeError(f"`eight_bit` must be True or False, got {eight_bit!r}.")


def _check_layers(config: PreTrainedConfig) -> None:
    kinds = getattr(config, "layer_types", None) or getattr(config, "block_types", None) or ()
    others = sorted(set(kinds) - ATTENTION_LAYERS)
    reason = f"layers of the kind {', '.join(map(repr, others))}" if others else ""
    if getattr(config, "num_attention_heads", None) is None:
        reason = "no attention layers"
    if reason:
        raise PearlUnsupportedModelError(
            f"a model of the type {config.model_type!r} has {reason}, whose state a PagedPrefixCache cannot hold. "
            "Leave out `cache` (`past_key_values`): transformers makes a cache that fits."
        )
