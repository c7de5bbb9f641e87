"""How installed libraries compute FlashAttention over the pools: each of them reads other layouts.

`flash_attn_interface` (flash-attn 3): `flash_attn_with_kvcache` takes packed queries and block tables, and says
    "page_block_size can be arbitrary".
`torch.nn.attention.varlen`: `varlen_attn` takes block tables from torch 2.12 on. Its own kernel is FlashAttention 2;
    ours are read where the process has activated another, "FA3" on Hopper or "FA4" on Blackwell, whose wrappers
    (`torch/nn/attention/_fa3.py`, `_fa4.py`) want no `cu_seq_k` beside a block table, and know no soft-cap.
`flash_attn` (flash-attn 2): its block tables are of no use. Like torch's copy of it, it ends with "Paged KV cache block
    size must be divisible by 256" (2.8, `csrc/flash_attn/flash_api.cpp`; flash-attention issues 828 and 1720), where
    our blocks have 16 tokens, so that short prefixes are shared. But a sequence whose blocks are neighbours, as the
    pool places them where it can, is a view that it reads in place, sequence by sequence.

All of them align a window of queries with the end of the keys, as a cache wants it.

Shapes: `T` packed tokens, `S` sequences, `B` blocks of a sequence, `H` query heads, `K` key-value heads, `D` head
dimension, `N` slots, `L` keys of one sequence.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .kernel_interface import Pools
from .step_tables import StepTables

if TYPE_CHECKING:
    from .step import Attention

Attend = Callable[[torch.Tensor, Pools, StepTables, "Attention"], "torch.Tensor | None"]


class Library(NamedTuple):
    """One of them.

    Attributes
    ----------
    name : str
        What users know it as.
    missing : callable
        Why it is not there, and what would help; None: it is.
    attend : callable
        From queries `(T, H, D)` of windows that are plain lines to `(T, H, D)`; None where this step is not for it.
    """

    name: str
    missing: Callable[[], str | None]
    attend: Attend


class Paged(NamedTuple):
    """The tables of a step, cut to its own sizes, as libraries take them, and the pools in their layout."""

    keys: torch.Tensor  # (N / block size, block size, K, D)
    values: torch.Tensor
    query_starts: torch.Tensor  # (S + 1,)
    lengths: torch.Tensor  # (S,)
    block_tables: torch.Tensor  # (S, B)

    @classmethod
    def of(cls, pools: Pools, tables: StepTables) -> Paged:
        """Views, and no copies."""
        count, size, on_device = tables.bounds.num_sequences, tables.block_size, tables.on_device
        keys, values = (pool[0].unflatten(1, (-1, size)).permute(1, 2, 0, 3) for pool in pools)
        block_tables = on_device.block_tables[:count, : -(-tables.bounds.max_keys // size)]
        return cls(keys, values, on_device.query_starts[: count + 1], on_device.lengths[:count], block_tables)


def _by_flash_attn_3(
    query: torch.Tensor, pools: Pools, tables: StepTables, attention: Attention
) -> torch.Tensor | None:
    from flash_attn_interface import flash_attn_with_kvcache

    paged = Paged.of(pools, tables)
    return flash_attn_with_kvcache(
        *(query, paged.keys, paged.values),
        cache_seqlens=paged.lengths,
        page_table=paged.block_tables,
        cu_seqlens_q=paged.query_starts,
        max_seqlen_q=tables.bounds.max_queries,
        **_options(attention),
    )


def _by_varlen_attn(query: torch.Tensor, pools: Pools, tables: StepTables, attention: Attention) -> torch.Tensor | None:
    from torch.nn.attention import varlen

    if attention.softcap is not None:
        return None
    paged = Paged.of(pools, tables)
    result = varlen.varlen_attn(
        *(query, paged.keys, paged.values, paged.query_starts, None),
        *(tables.bounds.max_queries, tables.bounds.max_keys),
        scale=attention.scaling,
        window_size=_window(attention),
        enable_gqa=True,
        seqused_k=paged.lengths,
        block_table=paged.block_tables,
    )
    assert isinstance(result, torch.Tensor)  # No log-sum-exp was asked for.
    return result


def _by_flash_attn_2(
    query: torch.Tensor, pools: Pools, tables: StepTables, attention: Attention
) -> torch.Tensor | None:
    from flash_attn import flash_attn_with_kvcache

    runs = tables.runs()
    if runs is None:
        return None
    outputs = []
    for q, run in zip(query.split(tables.num_new), runs, strict=True):
        keys, values = (pool[:, :, run].transpose(1, 2) for pool in pools)  # (1, L, K, D)
        outputs.append(flash_attn_with_kvcache(q[None], keys, values, **_options(attention))[0])
    return torch.cat(outputs)


def _options(attention: Attention) -> dict[str, object]:
    """What both versions of flash-attn call by one name."""
    return {
        "softmax_scale": attention.scaling,
        "causal": True,
        "window_size": _window(attention),
        "softcap": attention.softcap or 0.0,
    }


def _window(attention: Attention) -> tuple[int, int]:
    """Tokens that a query looks back and ahead, itself not included; -1: all."""
    return (-1 if attention.sliding_window is None else attention.sliding_window - 1), 0


def _is_installed(module: str, cure: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(module) else f"is not installed ({cure})"


def _lacks_block_tables() -> str | None:
    try:
        from torch.nn.attention import current_flash_attention_impl, varlen
    except ImportError:
        return "is not in this torch"
    if "block_table" not in inspect.signature(varlen.varlen_attn).parameters:
        return "takes no block tables before torch 2.12"
    if current_flash_attention_impl() is None:
        return (
            "takes blocks of 256 tokens only, until another kernel is activated "
            '(torch.nn.attention.activate_flash_attention_impl("FA3"), or "FA4")'
        )
    return None


# The first that is there is taken. flash-attn 2 comes last: it is called once per sequence.
LIBRARIES = (
    Library(
        "flash-attn 3",
        _is_installed("flash_attn_interface", "https://github.com/Dao-AILab/flash-attention, folder hopper"),
        _by_flash_attn_3,
    ),
    Library("torch's varlen_attn", _lacks_block_tables, _by_varlen_attn),
    Library("flash-attn 2", _is_installed("flash_attn", "pip install flash-attn"), _by_flash_attn_2),
)
