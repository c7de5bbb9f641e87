"""The twins of the Triton kernels in torch: the same functions of the same tables, sequence by sequence.

They say what the kernels compute, for tests, and stand in for them where calls on fixed buffers are to be exercised
without a GPU. For speed on a CPU there is `sdpa.py`.

Shapes: `T` packed tokens, `H` query heads, `K` key-value heads, `D` head dimension (that of values may differ), `N`
slots, `Q` queries and `L` keys of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .kernel_interface import Pools
from .partial_attention import attend_part, merge_parts
from .step_tables import StepTables
from .tree_tables import WORD_BITS

if TYPE_CHECKING:
    from .step import Attention


def store(key: torch.Tensor, value: torch.Tensor, pools: Pools, tables: StepTables) -> None:
    """`Kernels.store`."""
    slots = tables.on_device.slots[: key.shape[2]].long()
    is_stored = slots >= 0
    for pool, new in zip(pools, (key, value), strict=True):
        pool[:, :, slots[is_stored]] = new[:, :, : len(slots)][:, :, is_stored]


def move(pools: Sequence[torch.Tensor], source: Sequence[int], target: Sequence[int]) -> None:
    """`Kernels.move`."""
    for pool in pools:
        pool[:, :, list(target)] = pool[:, :, list(source)]


def paged_attention(
    query: torch.Tensor,
    pools: Pools,
    tables: StepTables,
    attention: Attention,
    output: torch.Tensor | None = None,
    num_parts: int | None = None,
) -> torch.Tensor:
    """`Kernels.paged_attention`; `num_parts` has no effect on what is computed."""
    if output is None:
        output = query.new_empty(1, query.shape[2], query.shape[1], pools.values.shape[3])
    starts = tables.on_device.query_starts.tolist()
    for sequence, (start, end) in enumerate(pairwise(starts)):
        if end > start:
            length = int(tables.on_device.lengths[sequence])
            slots = _slots(tables, sequence, length)
            seen = _is_seen(tables, sequence, end - start, length, attention.sliding_window)
            mask = torch.zeros(seen.shape, device=query.device).masked_fill_(~seen, -torch.inf)[None, None]
            k, v = (pool[:, :, slots] for pool in pools)
            part = attend_part(query[:, :, start:end], k, v, mask, attention.scaling, attention.softcap)
            output[:, start:end] = merge_parts([part.transpose(1, 2)], attention.sinks).to(output.dtype)
    return output


def _slots(tables: StepTables, sequence: int, length: int) -> torch.Tensor:
    """Where the tokens of a sequence lie, `(L,)`."""
    places = torch.arange(length, device=tables.on_device.block_tables.device)
    blocks = tables.on_device.block_tables[sequence].long()[places // tables.block_size]
    return blocks * tables.block_size + places % tables.block_size


def _is_seen(tables: StepTables, sequence: int, num_queries: int, length: int, window: int | None) -> torch.Tensor:
    """Which keys each query sees, `(Q, L)`."""
    places = torch.arange(length, device=tables.on_device.trees.device)
    positions, key_positions = places[-num_queries:], places
    seen = torch.zeros(num_queries, length, dtype=torch.bool, device=places.device)
    num_words, base = int(tables.on_device.tree_words[sequence]), int(tables.on_device.bases[sequence])
    if num_words:
        numbers = tables.on_device.trees[int(tables.on_device.tree_starts[sequence]) :]
        rows = numbers[: num_queries * (1 + num_words)].view(num_queries, 1 + num_words)
        positions = rows[:, 0].long()
        bits = (rows[:, 1:, None] >> torch.arange(WORD_BITS, device=rows.device)) & 1
        seen[:, base:] = bits.flatten(1)[:, : length - base].bool()
        key_positions = torch.cat([places[:base], numbers[rows.numel() :][: length - base].long()])
    seen |= (places <= positions[:, None]) & (places < base)
    if window is not None:
        seen &= key_positions > positions[:, None] - window
    return seen
