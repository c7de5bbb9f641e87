"""What launches the Triton kernels: checks of dtype, stride and device, sizes of tiles, and how contexts are split.

Nothing here reads a tensor of the device, so that every call may be captured in a CUDA graph.

`kernel_interface.py` says what the functions take and return, and the shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ..device_guard import device_guard
from .kernel_interface import Pools
from .step_tables import Bounds, StepTables
from .triton_attention import Constants
from .triton_kernels import merge_parts_kernel, move_kernel, paged_attention_kernel, store_kernel

if TYPE_CHECKING:
    from .step import Attention

IS_INTERPRETED = isinstance(store_kernel, InterpretedFunction)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, *((torch.float64,) if IS_INTERPRETED else ()))
MAX_HEAD_DIM = 256
MAX_PARTS = 32
MIN_TILE, MAX_ROWS = 16, 64  # what products of matrices take at least; rows of a tile of queries
MAX_FLOAT32_ROWS = 16  # No tensor core multiplies these: more would not fit in registers, and be spilled to memory.
MOVE_TILES = (4, 16, 64)  # tokens that one launch moves: few sizes, since each is compiled
MAX_MOVES = MOVE_TILES[-1]
PROGRAMS_PER_PROCESSOR = 2  # of a GPU, which contexts are split for


def store(key: torch.Tensor, value: torch.Tensor, pools: Pools, tables: StepTables) -> None:
    """`Kernels.store`, by one kernel."""
    key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (key, value))
    _check({"key": key, "value": value, **pools._asdict()}, tables)
    num_tokens = _num_tokens(tables, key)
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    with device_guard(key):
        store_kernel[(num_tokens, key.shape[1])](
            *(key, value, *pools, tables.on_device.slots),
            *(key_dim, value_dim),
            *(each.stride()[1:3] for each in (key, value, *pools)),
            DIM_TILE=triton.next_power_of_2(max(key_dim, value_dim)),
            num_warps=1,
        )


def move(pools: Sequence[torch.Tensor], source: Sequence[int], target: Sequence[int]) -> None:
    """`Kernels.move`, by one kernel for all pools of one shape, and one copy to the device."""
    for alike in (list(group) for _, group in groupby(sorted(pools, key=_layout), key=_layout)):
        for first in range(0, len(source), MAX_MOVES):  # What is written to first is not read later.
            _move(alike, [*source[first : first + MAX_MOVES], *target[first : first + MAX_MOVES]])


def _layout(pool: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(pool.shape), pool.stride()


def _move(pools: Sequence[torch.Tensor], slots: Sequence[int]) -> None:
    pool, num_moves = pools[0], len(slots) // 2
    numbers = torch.tensor([*(each.data_ptr() for each in pools), *slots], device="cpu")
    if pool.device.type == "cuda":
        numbers = numbers.pin_memory().to(pool.device, non_blocking=True)
    with device_guard(pool):
        move_kernel[(len(pools), pool.shape[1])](
            *(numbers, pool),
            *(len(pools), num_moves, pool.shape[3], pool.stride()[1:3]),
            MOVE_TILE=min(tile for tile in MOVE_TILES if tile >= num_moves),
            DIM_TILE=triton.next_power_of_2(pool.shape[3]),
            num_warps=4,
        )


def paged_attention(
    query: torch.Tensor,
    pools: Pools,
    tables: StepTables,
    attention: Attention,
    output: torch.Tensor | None = None,
    num_parts: int | None = None,
) -> torch.Tensor:
    """`Kernels.paged_attention`, by one kernel, or two where contexts are split.

    They are split into `num_parts`, by default as many as keep the device busy.
    """
    query = query if query.stride(-1) == 1 else query.contiguous()
    _check({"query": query, **pools._asdict()}, tables)
    num_tokens, sinks = _num_tokens(tables, query), attention.sinks
    num_heads, num_kv_heads = query.shape[1], pools.keys.shape[1]
    key_dim, value_dim = (pool.shape[3] for pool in pools)
    launch = _launch(
        Heads(num_heads, num_kv_heads, key_dim, value_dim, query.dtype, query.device),
        attention._replace(sinks=None),
        *(sinks is not None, tables.bounds, tables.block_size, num_parts),
    )
    shape = (1, query.shape[2], num_heads, value_dim)
    if output is None:
        output = query.new_empty(shape)
    elif output.shape != shape or output.dtype != query.dtype or not output.is_contiguous():
        raise ValueError(f"`output` must be contiguous, {query.dtype} and of shape {shape}, got {output.shape}.")
    parts = weights = output
    if launch.num_parts > 1:
        rows = shape[1] * num_heads * launch.num_parts
        sums = query.new_empty(rows * (1 + shape[3]), dtype=torch.promote_types(query.dtype, torch.float32))
        parts, weights = sums.split([rows * shape[3], rows])  # so that both begin at multiples of 16 bytes
    sinks = query if sinks is None else sinks
    with device_guard(query):
        paged_attention_kernel[launch.grid](
            *(parts, weights, query, *pools, sinks, tables.on_device),
            *(num_heads, launch.num_parts),
            *(each.stride()[1:3] for each in (query, *pools)),
            tables.on_device.block_tables.stride(0),
            launch.constants,
            num_warps=4,
            num_stages=2,
        )
        if launch.num_parts > 1:
            merge_parts_kernel[(num_tokens, num_heads)](
                *(output, parts, weights, sinks, tables.on_device.query_starts),
                *(tables.limits.num_sequences, num_heads, launch.num_parts),
                *(MAX_PARTS, launch.constants),
            )
    return output


class Heads(NamedTuple):
    """What attention is over."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


class Launch(NamedTuple):
    """How the attention kernel is launched."""

    grid: tuple[int, int, int]
    num_parts: int
    constants: Constants


@functools.lru_cache(maxsize=4096)  # asked for by every layer
def _launch(
    heads: Heads, attention: Attention, has_sinks: bool, bounds: Bounds, block_size: int, num_parts: int | None
) -> Launch:
    if heads.num_heads % heads.num_kv_heads:
        raise ValueError(f"{heads.num_heads} query heads cannot share {heads.num_kv_heads} key-value heads evenly.")
    group = heads.num_heads // heads.num_kv_heads
    dim_tiles = [max(MIN_TILE, triton.next_power_of_2(dim)) for dim in (heads.key_dim, heads.value_dim)]
    num_bytes = sum(dim_tiles) * heads.dtype.itemsize  # of a key and its value; a tile lies in the shared memory twice
    num_rows = bounds.max_queries * group
    max_rows = MAX_FLOAT32_ROWS if heads.dtype == torch.float32 else MAX_ROWS
    row_tile = max(MIN_TILE if num_rows <= MIN_TILE else max_rows, triton.next_power_of_2(group))
    constants = Constants(
        scaling=float(attention.scaling),
        softcap=float(attention.softcap or 0.0),
        window=attention.sliding_window or 0,
        has_sinks=has_sinks,
        has_trees=bounds.has_trees,
        is_split=False,
        group=group,
        block_size=block_size,
        key_dim=heads.key_dim,
        value_dim=heads.value_dim,
        row_tile=row_tile,
        key_tile=64 if num_bytes <= 512 else 32 if num_bytes <= 1024 else MIN_TILE,
        key_dim_tile=dim_tiles[0],
        value_dim_tile=dim_tiles[1],
        factor_dtype=_factor_dtype(heads.dtype),
        sum_dtype=tl.float64 if heads.dtype == torch.float64 else tl.float32,
    )
    num_tiles = triton.cdiv(bounds.max_queries, row_tile // group)
    if num_parts is None:
        num_keys = bounds.max_keys
        if constants.window:
            num_keys = min(num_keys, constants.window + bounds.max_queries)
        num_programs = bounds.num_sequences * num_tiles * heads.num_kv_heads
        num_parts = _num_parts(num_programs, num_keys // constants.key_tile, heads.device)
    grid = bounds.num_sequences, num_tiles, heads.num_kv_heads * num_parts
    return Launch(grid, num_parts, constants._replace(is_split=num_parts > 1))


def _num_parts(num_programs: int, num_key_tiles: int, device: torch.device) -> int:
    """Parts of a context: as many as keep the device busy, and at least two tiles of keys each."""
    if device.type != "cuda":
        return 1
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = num_processors * PROGRAMS_PER_PROCESSOR // num_programs
    return max(1, min(wanted, num_key_tiles // 2, MAX_PARTS))


def _factor_dtype(dtype: torch.dtype) -> tl.dtype:
    if IS_INTERPRETED and dtype != torch.float64:
        return tl.float32
    return getattr(tl, str(dtype).removeprefix("torch."))


def _num_tokens(tables: StepTables, packed: torch.Tensor) -> int:
    """Tokens that kernels are launched for."""
    num_tokens = tables.bounds.num_tokens
    if num_tokens > packed.shape[2]:
        raise ValueError(f"the step has up to {num_tokens} tokens, got {packed.shape[2]} packed ones.")
    return num_tokens


def _check(tensors: dict[str, torch.Tensor], tables: StepTables) -> None:
    """Refuse what the kernels would misread."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if len(set(dtypes.values())) > 1:
        raise ValueError(f"queries, keys, values and pools must be of one dtype, got {dtypes}.")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"`{name}` must be of one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}.")
        if tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.stride(-1) != 1:
            raise ValueError(
                f"`{name}` must be (1, heads, tokens, head dim) with a head's numbers side by side, got the shape "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}."
            )
        if tensor.shape[-1] > MAX_HEAD_DIM:
            raise ValueError(f"heads of `{name}` have {tensor.shape[-1]} dimensions; there may be {MAX_HEAD_DIM}.")
        if tensor.device != tables.device and not IS_INTERPRETED:
            raise ValueError(f"`{name}` is on {tensor.device}, the tables of the step are on {tables.device}.")
