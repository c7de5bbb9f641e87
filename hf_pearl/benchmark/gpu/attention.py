"""Attention of a decode step over the paged cache, beside torch's SDPA over contiguous keys and the bandwidth bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right

from ...cache import PagedPrefixCache
from ...cache.attention import register
from ...cache.sizing import DEFAULT_BLOCK_SIZE
from ...cache.step import Attention, PagedStep
from .observing import observe
from .parts import Attempts, Figures
from .shapes import Shape, shape_config
from .timing import seconds_of


class Case(NamedTuple):
    """What attends to what: in every row, `num_new` queries to themselves and to what lies before them."""

    num_rows: int
    context: int
    num_new: int

    @property
    def length(self) -> int:
        """Keys of a row."""
        return self.context + self.num_new


def attention_figures(
    shape: Shape,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    num_runs: int,
    attempt: Attempts,
) -> Figures:
    """Seconds of a layer's attention: all layers of a step are run, each with keys and values of its own, over their
    number, so that what a step prepares once counts once, and no layer's keys wait in the device's cache.

    Parameters
    ----------
    bandwidth : float
        Bytes per second; the bound is reading all keys and values once.
    """
    name = f"{case.num_rows} rows, {case.num_new} queries behind {case.context}"
    paged = attempt(f"paged, {name}", partial(_paged_figures, shape, case, device, dtype, num_runs))
    sdpa = attempt(f"SDPA, {name}", partial(_sdpa_seconds, shape, case, device, dtype, num_runs))
    num_bytes = 2 * case.num_rows * case.length * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    missing = {"attention": "-", "paged_seconds": None, "paged_device_seconds": None}
    return {
        **case._asdict(),
        **(paged or missing),
        "sdpa_seconds": sdpa,
        "bound_seconds": num_bytes / bandwidth,
    }


def _paged_figures(shape: Shape, case: Case, device: torch.device, dtype: torch.dtype, num_runs: int) -> Figures:
    paged = _paged(shape, case, device, dtype)
    observed = observe(paged, device)
    busy = observed.device_seconds
    return {
        "attention": observed.attention,
        "paged_seconds": seconds_of(paged, device, num_runs) / shape.num_layers,
        "paged_device_seconds": None if busy is None else busy / shape.num_layers,
    }


def _sdpa_seconds(shape: Shape, case: Case, device: torch.device, dtype: torch.dtype, num_runs: int) -> float:
    return seconds_of(_sdpa(shape, case, device, dtype), device, num_runs) / shape.num_layers


def _paged(shape: Shape, case: Case, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    register()
    num_blocks = case.num_rows * (1 + -(-case.length // DEFAULT_BLOCK_SIZE))
    cache = PagedPrefixCache(shape_config(shape), num_blocks, device=device)
    sequences = [cache.allocate((), "", case.length) for _ in range(case.num_rows)]
    for sequence in sequences:
        cache.append(sequence, case.length)
    num_tokens, attention = case.num_rows * case.num_new, Attention(shape.head_dim**-0.5)
    query, key, value = (
        torch.randn(1, heads, num_tokens, shape.head_dim, device=device, dtype=dtype)
        for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    )

    def run() -> None:
        step = PagedStep(cache, sequences, [case.num_new] * case.num_rows)
        with torch.inference_mode():
            for layer_index in range(shape.num_layers):
                step.attend(layer_index, query, key, value, attention)

    return run


def _sdpa(shape: Shape, case: Case, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    def made(heads: int, length: int) -> torch.Tensor:
        return torch.randn(case.num_rows, heads, length, shape.head_dim, device=device, dtype=dtype)

    query = made(shape.num_heads, case.num_new)
    layers = [
        (made(shape.num_kv_heads, case.length), made(shape.num_kv_heads, case.length)) for _ in range(shape.num_layers)
    ]
    mask = None if case.num_new == 1 else _causal(case, device)

    def run() -> None:
        with torch.inference_mode():
            for key, value in layers:
                torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    return run


def _causal(case: Case, device: torch.device) -> torch.Tensor:
    """That queries see no later ones: not written out on CUDA, where no flash kernel takes such a mask."""
    if device.type == "cuda":
        return causal_lower_right(case.num_new, case.length)
    return torch.ones(case.num_new, case.length, dtype=torch.bool, device=device).tril(case.context)
