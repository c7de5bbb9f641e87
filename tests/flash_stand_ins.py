"""What stands in for FlashAttention where there is no GPU: functions of the libraries' own signatures, in torch.

They refuse what the libraries' C++ code refuses of what we hand over: other dtypes of tables, vectors that are not side
by side, shapes that do not fit. Masks are those of the libraries' documentation: query `i` of `Q` sees key `j` of `L`
if `i + L - Q - left <= j <= i + L - Q + right`, where -1 is no limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

Window = tuple[int, int]


class StandIns:
    """Libraries that are there from now on, and how often each was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, int] = {}
        self._monkeypatch = monkeypatch

    def install(self, name: str) -> None:
        """Have a library of `flash_libraries.LIBRARIES`."""
        {
            "flash-attn 3": lambda: self._module("flash_attn_interface", self._counted(name, with_page_table)),
            "flash-attn 2": lambda: self._module("flash_attn", self._counted(name, with_kvcache)),
            "torch's varlen_attn": lambda: self._varlen(self._counted(name, varlen_attn)),
        }[name]()

    def _counted(self, name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*arguments: Any, **keywords: Any) -> torch.Tensor:
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*arguments, **keywords)

        counted.__wrapped__ = function  # type: ignore[attr-defined]  # for `inspect.signature`
        return counted

    def _module(self, name: str, function: Callable[..., torch.Tensor]) -> None:
        module = ModuleType(name)
        module.__spec__ = sys.__spec__  # What `find_spec` looks at where a module is loaded.
        module.flash_attn_with_kvcache = function  # type: ignore[attr-defined]
        self._monkeypatch.setitem(sys.modules, name, module)

    def _varlen(self, function: Callable[..., torch.Tensor]) -> None:
        from torch.nn import attention
        from torch.nn.attention import varlen

        self._monkeypatch.setattr(varlen, "varlen_attn", function)
        self._monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: "FA3")


def attend(
    q: torch.Tensor,  # (Q, H, D)
    k: torch.Tensor,  # (L, K, D)
    v: torch.Tensor,  # (L, K, D)
    scale: float,
    window: Window,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention in float64, `(Q, H, D)`."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,lhd->hql", q.double(), k.double().repeat_interleave(group, 1)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    left, right = (len(k) if each < 0 else each for each in window)
    scores.masked_fill_((ahead < -left) | (ahead > right), -torch.inf)
    return torch.einsum("hql,lhd->qhd", scores.softmax(-1), v.double().repeat_interleave(group, 1)).to(q.dtype)


def attend_paged(
    q: torch.Tensor,  # (T, H, D)
    keys: torch.Tensor,  # (blocks, block size, K, D)
    values: torch.Tensor,  # (blocks, block size, K, D)
    starts: torch.Tensor,  # (S + 1,)
    lengths: torch.Tensor,  # (S,)
    blocks: torch.Tensor,  # (S, B)
    max_queries: int,
    *options: Any,
) -> torch.Tensor:
    """Attention sequence by sequence, as `attend`; refuses what does not fit."""
    assert all(each.dtype == torch.int32 for each in (starts, lengths, blocks))
    assert starts.is_contiguous() and lengths.is_contiguous() and blocks.stride(-1) == 1
    assert all(each.stride(-1) == 1 for each in (q, keys, values))
    assert len(starts) == len(lengths) + 1 == len(blocks) + 1
    assert keys.shape == values.shape and q.shape[2] == keys.shape[3]
    output = torch.full_like(q, torch.nan)
    for (start, end), length, table in zip(pairwise(starts.tolist()), lengths.tolist(), blocks, strict=True):
        assert 0 < end - start <= max_queries
        used = table[: -(-length // keys.shape[1])].long()
        assert len(used) * keys.shape[1] >= length
        k, v = (pool[used].flatten(0, 1)[:length] for pool in (keys, values))
        output[start:end] = attend(q[start:end], k, v, *options)
    return output


def with_page_table(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: None = None,
    v: None = None,
    qv: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: torch.Tensor | None = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """`flash_attn_with_kvcache` of flash-attn 3, as far as we use it."""
    assert cu_seqlens_q is not None and cache_seqlens is not None and page_table is not None and max_seqlen_q
    assert causal and softmax_scale is not None
    return attend_paged(
        *(q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, page_table, max_seqlen_q),
        *(softmax_scale, (window_size[0], 0), softcap),
    )


def with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: None = None,
    v: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: None = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    """`flash_attn_with_kvcache` of flash-attn 2, as far as we use it."""
    if block_table is not None and k_cache.shape[1] % 256:
        raise RuntimeError("Paged KV cache block size must be divisible by 256")
    assert block_table is None and causal and softmax_scale is not None
    assert all(each.stride(-1) == 1 for each in (q, k_cache, v_cache))
    assert len(q) == len(k_cache) == 1 and k_cache.shape == v_cache.shape
    return attend(q[0], k_cache[0], v_cache[0], softmax_scale, (window_size[0], 0), softcap)[None]


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """torch's from 2.12 on, with FlashAttention 3 behind it."""
    if cu_seq_k is not None:
        raise RuntimeError("If cu_seqlens_k is passed in, then page table is not supported")
    assert seqused_k is not None and block_table is not None and scale is not None
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert max_k >= int(seqused_k.max())
    return attend_paged(query, key, value, cu_seq_q, seqused_k, block_table, max_q, scale, window_size)
