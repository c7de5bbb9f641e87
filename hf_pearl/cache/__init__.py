"""The paged prefix cache: blocks, the index that finds them again, and attention over them."""

from .paged_prefix_cache import PagedPrefixCache
from .paged_sequence import PagedSequence
from .statistics import CacheStatistics

__all__ = ["CacheStatistics", "PagedPrefixCache", "PagedSequence"]
