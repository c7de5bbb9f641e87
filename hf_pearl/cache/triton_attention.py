"""The inner loop of the attention kernel: a tile of queries over one part of a sequence's keys.

The softmax is taken as the keys come, with the largest score so far (Milakov and Gimelshein 2018, arXiv 1805.02867;
Dao et al. 2022, "FlashAttention", arXiv 2205.14135).

Shapes: `S` sequences, `T` packed tokens, `H` query heads, `K` key-value heads, `G = H / K`, `D` head dimension, `N`
slots, `P` parts of a context, `B` blocks of a sequence. A tile is what a program holds at a time: `R` rows, `L` keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .step_tables import Tables


class Constants(NamedTuple):
    """What attention kernels are compiled for."""

    scaling: float
    softcap: float  # 0: none
    window: int  # tokens that a query looks back, itself included; 0: all
    has_sinks: bool
    has_trees: bool
    is_split: bool  # whether contexts come in several parts
    group: int  # query heads of a key-value head
    block_size: int
    key_dim: int
    value_dim: int
    row_tile: int
    key_tile: int
    key_dim_tile: int  # powers of two, as all tiles
    value_dim_tile: int
    factor_dtype: Any  # of what is multiplied: the pools' own, or float32 in the interpreter, which has no bfloat16
    sum_dtype: Any


@triton.jit
def load_rows(
    pointer: tl.tensor, offsets: tl.tensor, is_row: tl.tensor, dim: tl.constexpr, C: tl.constexpr
) -> tl.tensor:
    """Vectors of queries or keys `(rows, key_dim_tile)`, of one tile; 0 where there are none."""
    dims = tl.arange(0, C.key_dim_tile)
    mask = is_row[:, None] & (dims < dim)[None, :]
    return tl.load(pointer + offsets[:, None] + dims[None, :], mask=mask, other=0.0).to(C.factor_dtype)


@triton.jit
def attend_part(
    q: tl.tensor,  # (R, D)
    queries: tl.tensor,  # (R,): which of the sequence's queries each row is
    is_row: tl.tensor,  # (R,)
    num_queries: tl.tensor,
    keys: tl.tensor,  # (N, D)
    values: tl.tensor,  # (N, D)
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    tables: Tables,
    sequence: tl.tensor,
    block_table: tl.tensor,  # (B,)
    part: tl.tensor,
    num_parts: tl.tensor,
    C: tl.constexpr,
) -> tl.tuple:
    """Per row the largest score, the sum of the exponentials of scores less the largest, and so weighted values."""
    length, base = tl.load(tables.lengths + sequence), tl.load(tables.bases + sequence)
    places_of_rows = length - num_queries + queries
    positions, masks, tree_positions, num_words = _tree(tables, sequence, queries, num_queries, places_of_rows, is_row)
    start, end = _part(places_of_rows, positions, is_row, length, part, num_parts, C)

    largest = tl.full((C.row_tile,), float("-inf"), C.sum_dtype)
    total = tl.full((C.row_tile,), 0.0, C.sum_dtype)
    weighted = tl.full((C.row_tile, C.value_dim_tile), 0.0, C.sum_dtype)
    value_dims = tl.arange(0, C.value_dim_tile)
    for tile_start in range(start, end, C.key_tile):
        places = tile_start + tl.arange(0, C.key_tile)
        is_key = places < end
        blocks = tl.load(block_table + places // C.block_size, mask=is_key, other=0).to(tl.int64)
        slots = blocks * C.block_size + places % C.block_size
        k = load_rows(keys, slots * key_stride, is_key, C.key_dim, C)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=C.sum_dtype) * C.scaling
        if C.softcap > 0.0:
            scores = _softcap(scores, C.softcap)
        is_seen = _is_seen(tile_start, end, base, positions, is_row, masks, tree_positions, num_words, C)
        scores = tl.where(is_seen, scores, float("-inf"))

        before, largest = largest, tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # of a row that has seen no key so far
        shares, shrinking = tl.exp(scores - shift[:, None]), tl.exp(before - shift)
        is_value = is_key[:, None] & (value_dims < C.value_dim)[None, :]
        v = tl.load(values + (slots * value_stride)[:, None] + value_dims[None, :], mask=is_value, other=0.0)
        shares_of_dtype = shares.to(v.dtype).to(C.factor_dtype)
        new = tl.dot(shares_of_dtype, v.to(C.factor_dtype), input_precision="ieee", out_dtype=C.sum_dtype)
        weighted = weighted * shrinking[:, None] + new
        total = total * shrinking + tl.sum(shares, axis=1)
    return largest, total, weighted


@triton.jit
def _is_seen(
    tile_start: tl.tensor,
    end: tl.tensor,
    base: tl.tensor,
    positions: tl.tensor,
    is_row: tl.tensor,
    masks: tl.tensor,
    tree_positions: tl.tensor,
    num_words: tl.tensor,
    C: tl.constexpr,
) -> tl.tensor:
    """Which of the keys of a tile, up to `end`, each row sees, `(R, L)`."""
    places = tile_start + tl.arange(0, C.key_tile)
    is_key = places < end
    is_seen = places[None, :] < tl.minimum(positions + 1, base)[:, None]
    key_positions = places
    if C.has_trees:
        offsets = places - base
        in_tree = is_key & (offsets >= 0) & (offsets < num_words * 32)
        is_read = is_row[:, None] & in_tree[None, :]
        words = tl.load(masks[:, None] + (offsets // 32)[None, :], mask=is_read, other=0)
        is_seen = is_seen | (((words >> (offsets % 32)[None, :]) & 1) != 0)
        if C.window:
            key_positions = tl.load(tree_positions + offsets, mask=in_tree, other=places)
    if C.window:
        is_seen = is_seen & (key_positions[None, :] > positions[:, None] - C.window)
    return is_seen & is_key[None, :]


@triton.jit
def _tree(
    tables: Tables,
    sequence: tl.tensor,
    queries: tl.tensor,
    num_queries: tl.tensor,
    places: tl.tensor,
    is_row: tl.tensor,
) -> tl.tuple:
    """Of every row its position and where its mask lies, and where the positions of the tree's places do.

    `StepTables` says what they are; a sequence without a tree has masks of 0 words, and positions are places.
    """
    num_words = tl.load(tables.tree_words + sequence)
    tree = tables.trees + tl.load(tables.tree_starts + sequence)
    rows = tree + queries * (1 + num_words)
    has_row = is_row & (queries < num_queries * num_words)  # No row has one where there are no words.
    positions = tl.load(rows, mask=has_row, other=places)
    return positions, rows + 1, tree + num_queries * (1 + num_words), num_words


@triton.jit
def _part(
    places: tl.tensor,
    positions: tl.tensor,
    is_row: tl.tensor,
    length: tl.tensor,
    part: tl.tensor,
    num_parts: tl.tensor,
    C: tl.constexpr,
) -> tl.tuple:
    """Where the keys of a part begin and end: of those that any row sees, an equal number of tiles each."""
    first = 0
    if C.window:
        first = tl.min(tl.where(is_row, positions, length)) - C.window + 1
        first = tl.maximum(first, 0) // C.key_tile * C.key_tile
    end = tl.max(tl.where(is_row, places + 1, 0))
    num_keys = tl.cdiv(tl.cdiv(end - first, C.key_tile), num_parts) * C.key_tile
    start = first + part * num_keys
    return start, tl.minimum(start + num_keys, end)


@triton.jit
def _softcap(scores: tl.tensor, cap: tl.constexpr) -> tl.tensor:
    """`cap * tanh(scores / cap)`, by the exponential of what is never positive, which does not overflow."""
    shrunk = tl.exp(-2.0 * tl.abs(scores) / cap)
    capped = cap * (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(scores < 0, -capped, capped)


@triton.jit
def add_sink(sink: tl.tensor, largest: tl.tensor, total: tl.tensor, weighted: tl.tensor) -> tl.tuple:
    """The sum of the exponentials and the weighted values, with a score per row that brings no value."""
    now = tl.maximum(largest, sink)
    shrinking = tl.exp(largest - now)
    return total * shrinking + tl.exp(sink - now), weighted * shrinking[:, None]
