"""One model over several ranks: what of it each holds, and how a rank reads only that."""

from .checkpoint import find_folder
from .loading import load_shard
from .sharding import Part, num_key_value_heads, part_of, shard

__all__ = ["Part", "find_folder", "load_shard", "num_key_value_heads", "part_of", "shard"]
