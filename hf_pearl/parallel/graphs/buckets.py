"""Sizes that forwards are captured for: a step runs in the smallest that holds it, the rest of which is padding."""

from __future__ import annotations

from bisect import bisect_left

from ...cache.step_tables import Bounds, Limits
from ...cache.tree_tables import WORD_BITS

# Up to 16 tokens a forward costs the same; beyond, half as much again costs less than double.
NUM_TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MIN_KEYS, KEYS_FACTOR = 1024, 4  # Contexts of one size are split alike; a size serves four times the last one's.
MAX_TREE_WORDS = 8  # A tree's places, 256 of them, that a new token may see.


def bucket_of(step: Bounds, limits: Limits, block_size: int) -> Bounds | None:
    """The bounds of the captured forward that serves a step; None: it is too large, or its trees are.

    Parameters
    ----------
    step, limits : Bounds, Limits
        What the step needs.

    A step of 3 sequences with 9 new tokens in all, 5 at most, runs in one for 4 sequences and 16 tokens.
    """
    if step.num_tokens > NUM_TOKENS[-1]:
        return None
    num_tokens = NUM_TOKENS[bisect_left(NUM_TOKENS, step.num_tokens)]
    is_single = step.max_queries == 1
    bucket = Bounds(
        num_sequences=num_tokens if is_single else min(num_tokens, _power_of_two(step.num_sequences)),
        num_tokens=num_tokens,
        max_queries=1 if is_single else num_tokens,
        max_keys=_num_keys(max(step.max_keys, limits.num_blocks * block_size)),
        has_trees=step.has_trees,
    )
    return bucket if limits_of(bucket, block_size).holds(limits) else None


def limits_of(bucket: Bounds, block_size: int) -> Limits:
    """Room that the tables of a captured forward have."""
    s, t = bucket.num_sequences, bucket.num_tokens
    num_tree_numbers = t * (1 + MAX_TREE_WORDS) + s * WORD_BITS * MAX_TREE_WORDS if bucket.has_trees else 0
    return Limits(s, t, -(-bucket.max_keys // block_size), num_tree_numbers)


def largest_like(bucket: Bounds, num_tokens: int) -> Bounds:
    """The bucket of the same kind for at least `num_tokens`."""
    num_tokens = max(bucket.num_tokens, num_tokens)
    is_single = bucket.max_queries == 1
    return bucket._replace(
        num_sequences=num_tokens if is_single else bucket.num_sequences,
        num_tokens=num_tokens,
        max_queries=1 if is_single else num_tokens,
    )


def _num_keys(needed: int) -> int:
    num_keys = MIN_KEYS
    while num_keys < needed:
        num_keys *= KEYS_FACTOR
    return num_keys


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
