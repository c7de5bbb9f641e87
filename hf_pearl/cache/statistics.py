"""What happened in a paged cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CacheStatistics:
    """Counts since the cache was made.

    Attributes
    ----------
    queried_tokens, hit_tokens : int
        Prompt tokens that were looked up, and those whose keys and values were there.
    evicted_blocks, copied_blocks : int
        Cached blocks given up for their memory, and blocks copied, on write or for a part of them.
    computed_layers : int
        Attention layers of all forwards: it grows while a forward goes on, so that others see that it does.
    """

    queried_tokens: int = 0
    hit_tokens: int = 0
    evicted_blocks: int = 0
    copied_blocks: int = 0
    computed_layers: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens whose keys and values were there."""
        return self.hit_tokens / self.queried_tokens if self.queried_tokens else 0.0
