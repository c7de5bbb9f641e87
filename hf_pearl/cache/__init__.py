"""The paged prefix cache: blocks, the index that finds them again, and attention over them."""

from .paged_prefix_cache import PagedPrefixCache, PagedSequence

__all__ = ["PagedPrefixCache", "PagedSequence"]
