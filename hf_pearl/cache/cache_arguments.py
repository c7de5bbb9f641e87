"""What `PagedPrefixCache` may be made with."""

from __future__ import annotations

from transformers import PreTrainedConfig


def check_arguments(config: object, max_blocks: object, block_size: object, eight_bit: object) -> None:
    """Raise `TypeError` or `ValueError`, naming argument, value and cure."""
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"`config` must be a model's config (`model.config`), got a {type(config).__name__}.")
    if not isinstance(block_size, int) or block_size < 1 or block_size & (block_size - 1):
        raise ValueError(f"`block_size` must be a power of two, got {block_size!r}.")
    if max_blocks is not None and (not isinstance(max_blocks, int) or max_blocks < 1):
        raise ValueError(f"`max_blocks` must be a positive int or None, got {max_blocks!r}.")
    if not isinstance(eight_bit, bool):
        raise TypeError(f"`eight_bit` must be True or False, got {eight_bit!r}.")
