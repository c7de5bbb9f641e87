"""Triton kernels of the paged cache: store new keys and values, attend to those of every sequence.

What they read of a step lies in `StepTables`. `kernels.py` launches them; their twins in torch are in
`torch_kernels.py`. All run in Triton's interpreter too (`TRITON_INTERPRET=1` before the first import), on the CPU.

The rotary embedding is not fused into the store: transformers' attention layers rotate queries and keys themselves,
before they call the attention function.

Shapes: `S` sequences, `T` packed tokens, `H` query heads, `K` key-value heads, `G = H / K`, `D` head dimension (that of
values may differ), `N` slots, `P` parts of a context. A tile is what a program holds at a time: `R` rows, `L` keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .step_tables import Tables
from .triton_attention import add_sink, attend_part, load_rows


@triton.jit
def store_kernel(
    # pointers
    key: tl.tensor,  # (K, T, D)
    value: tl.tensor,  # (K, T, D)
    key_pool: tl.tensor,  # (K, N, D)
    value_pool: tl.tensor,  # (K, N, D)
    slots: tl.tensor,  # (T,)
    # sizes
    key_dim: tl.tensor,
    value_dim: tl.tensor,
    # strides: of a head, and of a token or slot
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    key_pool_strides: tl.tuple,
    value_pool_strides: tl.tuple,
    # constants
    DIM_TILE: tl.constexpr,
) -> None:
    """Copy one head's key and value of one token to the token's slot; grid `(T, K)`.

    With slots [7, -1], token 0 goes to slot 7 of every head, and token 1, which is padding, nowhere.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    dims = tl.arange(0, DIM_TILE)
    new = tl.load(key + head * key_strides[0] + token * key_strides[1] + dims, mask=dims < key_dim)
    place = key_pool + head * key_pool_strides[0] + slot * key_pool_strides[1]
    tl.store(place + dims, new, mask=dims < key_dim)
    new = tl.load(value + head * value_strides[0] + token * value_strides[1] + dims, mask=dims < value_dim)
    place = value_pool + head * value_pool_strides[0] + slot * value_pool_strides[1]
    tl.store(place + dims, new, mask=dims < value_dim)


@triton.jit(do_not_specialize=["num_pools", "num_moves"])
def move_kernel(
    # pointers
    numbers: tl.tensor,  # (P + 2 M,), int64: addresses of pools, slots to read, slots to write
    pool: tl.tensor,  # (K, N, D): one of them
    # sizes
    num_pools: tl.tensor,
    num_moves: tl.tensor,
    dim: tl.tensor,
    # strides: of a head and of a slot
    strides: tl.tuple,
    # constants
    MOVE_TILE: tl.constexpr,
    DIM_TILE: tl.constexpr,
) -> None:
    """Copy one head's vectors from slots to slots, in one of `P` pools; grid `(P, K)`.

    With slots [5, 9] to read and [4, 5] to write, slot 4 gets what 5 held, and 5 what 9 held.
    """
    address, head = tl.load(numbers + tl.program_id(0)), tl.program_id(1).to(tl.int64)
    head_start = address.to(tl.pointer_type(pool.dtype.element_ty)) + head * strides[0]
    moves, dims = tl.arange(0, MOVE_TILE), tl.arange(0, DIM_TILE)
    is_move = moves < num_moves
    source = tl.load(numbers + num_pools + moves, mask=is_move, other=0)
    target = tl.load(numbers + num_pools + num_moves + moves, mask=is_move, other=0)
    mask = is_move[:, None] & (dims < dim)[None, :]
    held = tl.load(head_start + source[:, None] * strides[1] + dims[None, :], mask=mask)
    tl.debug_barrier()  # A slot may be read by one thread and written to by another.
    tl.store(head_start + target[:, None] * strides[1] + dims[None, :], held, mask=mask)


@triton.jit(do_not_specialize=["num_parts", "block_table_stride"])
def paged_attention_kernel(
    # pointers
    output: tl.tensor,  # (T, H, P, D of values)
    weights: tl.tensor,  # (T, H, P): log of the sum of the exponentials of a part's scores; not used where P = 1
    query: tl.tensor,  # (H, T, D)
    keys: tl.tensor,  # (K, N, D)
    values: tl.tensor,  # (K, N, D)
    sinks: tl.tensor,  # (H,)
    tables: Tables,
    # sizes
    num_heads: tl.tensor,
    num_parts: tl.tensor,
    # strides: of a head, and of a token or slot; of a sequence's blocks
    query_strides: tl.tuple,
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    block_table_stride: tl.tensor,
    # constants
    C: tl.constexpr,
) -> None:
    """Attention of a tile of one sequence's queries, for all heads of a key-value head, over one part of the context.

    Grid: `(S, tiles of the longest window, K * P)`; what has no queries ends at once. The rows of a tile are queries
    times heads: with a row_tile of 16 and a group of 3, it holds 5 queries; row 7 is query 2 and head 1, row 15 none.

    A sequence of 70 tokens in blocks of 16, the last 2 of them new, in 2 parts: its queries are at positions 68 and 69.
    The keys are 2 tiles of 64, one a part; the second is the places 64 to 69, 69 not seen by the first query.
    """
    sequence, tile = tl.program_id(0), tl.program_id(1)
    kv_head, part = tl.program_id(2) // num_parts, tl.program_id(2) % num_parts
    start = tl.load(tables.query_starts + sequence)
    num_queries = tl.load(tables.query_starts + sequence + 1) - start
    num_in_tile: tl.constexpr = C.row_tile // C.group
    if tile * num_in_tile >= num_queries:
        return
    rows = tl.arange(0, C.row_tile)
    queries = tile * num_in_tile + rows // C.group
    heads = kv_head * C.group + rows % C.group
    is_row = (rows < num_in_tile * C.group) & (queries < num_queries)
    tokens = (start + queries).to(tl.int64)
    q = load_rows(query, heads.to(tl.int64) * query_strides[0] + tokens * query_strides[1], is_row, C.key_dim, C)
    keys += kv_head.to(tl.int64) * key_strides[0]
    values += kv_head.to(tl.int64) * value_strides[0]
    blocks = tables.block_tables + sequence.to(tl.int64) * block_table_stride
    largest, total, weighted = attend_part(
        q, queries, is_row, num_queries, keys, values, key_strides[1], value_strides[1], tables, sequence, blocks, part,
        num_parts, C,
    )  # fmt: skip
    if C.has_sinks and not C.is_split:
        sink = tl.load(sinks + heads, mask=is_row, other=0.0).to(C.sum_dtype)
        total, weighted = add_sink(sink, largest, total, weighted)
    divisor = tl.where(total > 0, total, 1.0)  # 0 where nothing is seen
    rows_out = (tokens * num_heads + heads) * num_parts + part
    dims = tl.arange(0, C.value_dim_tile)
    is_value = is_row[:, None] & (dims < C.value_dim)[None, :]
    result = (weighted / divisor[:, None]).to(output.dtype.element_ty)
    tl.store(output + rows_out[:, None] * C.value_dim + dims[None, :], result, mask=is_value)
    if C.is_split:
        weight = tl.where(total > 0, largest + tl.log(divisor), float("-inf"))
        tl.store(weights + rows_out, weight, mask=is_row)


@triton.jit(do_not_specialize=["num_parts"])
def merge_parts_kernel(
    # pointers
    output: tl.tensor,  # (T, H, D)
    parts: tl.tensor,  # (T, H, P, D)
    weights: tl.tensor,  # (T, H, P)
    sinks: tl.tensor,  # (H,)
    query_starts: tl.tensor,  # (S + 1,)
    # sizes
    num_sequences: tl.tensor,
    num_heads: tl.tensor,
    num_parts: tl.tensor,
    # constants
    PART_TILE: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Put the parts of one token's and head's context together; grid `(T, H)`.

    Two parts whose softmax had sums of 1 and 3, and so the weights log 1 and log 3, count 1/4 and 3/4; with a sink of
    log 4, 1/8 and 3/8. A part of which nothing is seen has weight minus infinity and is not read.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(query_starts + num_sequences):
        return
    row = token * num_heads + head
    part, dims = tl.arange(0, PART_TILE), tl.arange(0, C.value_dim_tile)
    weight = tl.load(weights + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    largest = tl.max(weight, axis=0)
    if C.has_sinks:
        sink = tl.load(sinks + head).to(C.sum_dtype)
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    shares = tl.exp(weight - largest)
    total = tl.sum(shares, axis=0)
    if C.has_sinks:
        total += tl.exp(sink - largest)
    is_read = (weight > float("-inf"))[:, None] & (dims < C.value_dim)[None, :]
    places = (row * num_parts + part)[:, None] * C.value_dim + dims[None, :]
    summed = tl.sum(tl.load(parts + places, mask=is_read, other=0.0) * shares[:, None], axis=0)
    result = (summed / tl.where(total > 0, total, 1.0)).to(output.dtype.element_ty)
    tl.store(output + row * C.value_dim + dims, result, mask=dims < C.value_dim)
