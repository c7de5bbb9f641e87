"""Scores plus the noise of their positions: by one kernel on CUDA, elsewhere from noise that is computed ahead.

Shapes: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from itertools import groupby
from types import ModuleType
from typing import NamedTuple

import torch
from transformers.utils import logging

from .noise import NoiseSource, noise_of_rows

logger = logging.get_logger(__name__)


class Draw(NamedTuple):
    """Which noise a row gets: a request's at a position; that of no source is 0."""

    source: NoiseSource | None
    position: int = 0


def noisy_max(scores: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of scores plus noise in every row of `(N, V)`, float32, and the lowest id that has it: `(N,)` each.

    NaN counts as the largest.
    """
    kernels = _kernels(scores, draws)
    if kernels is not None:
        return kernels.noisy_max(scores, _rows(draws, scores.device))
    best = (scores + _noise(draws, scores)).max(dim=-1)
    return best.values, best.indices


def noisy_scores(scores: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Scores plus noise, `(N, V)`, float32."""
    kernels = _kernels(scores, draws)
    if kernels is not None:
        return kernels.noisy_scores(scores, _rows(draws, scores.device))
    return scores + _noise(draws, scores)


def add_noise(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores plus noise, `(N, V)`, float32; `rows` `(N, 4)`, int64, on their device, are those of `NoiseSource.row`."""
    kernels = load_kernels(scores.device) if scores.device.type == "cuda" and scores.stride(-1) == 1 else None
    return scores + noise_of_rows(rows, scores.shape[1]) if kernels is None else kernels.noisy_scores(scores, rows)


def _kernels(scores: torch.Tensor, draws: Sequence[Draw]) -> ModuleType | None:
    """The kernels where they may be used; those of a finished row, which has no noise, are not worth a case."""
    is_plain = scores.dtype == torch.float32 and scores.stride(-1) == 1
    if scores.device.type != "cuda" or not is_plain or any(draw.source is None for draw in draws):
        return None
    return load_kernels(scores.device)


@functools.cache
def load_kernels(device: torch.device) -> ModuleType | None:
    """The module of the Triton kernels, tried once on a device; None where Triton is missing, or fails there."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import noise_kernels

        noise_kernels.noisy_max(torch.zeros(1, 4, device=device), torch.zeros(1, 4, dtype=torch.long, device=device))
    except Exception as error:  # Whatever it is, torch can do it.
        logger.info_once(f"Noise on {device} is added without Triton, which fails: {type(error).__name__}: {error}")
        return None
    return noise_kernels


def _rows(draws: Sequence[Draw], device: torch.device) -> torch.Tensor:
    """What the kernels want of every row, `(N, 4)`, in one copy to the device."""
    rows = torch.tensor([draw.source.row(draw.position) for draw in draws if draw.source is not None], device="cpu")
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows


def _noise(draws: Sequence[Draw], like: torch.Tensor) -> torch.Tensor:
    """Noise `(N, V)`; neighbouring rows of one source are asked for together."""
    parts = []
    for source, group in groupby(draws, key=lambda draw: draw.source):
        positions = [draw.position for draw in group]
        if source is None:
            parts.append(like.new_zeros(len(positions), like.shape[1]))
            continue
        first, num_positions = min(positions), max(positions) - min(positions) + 1
        noise = source.rows(first, num_positions)
        is_range = positions == list(range(first, first + num_positions))
        parts.append(noise if is_range else noise[[position - first for position in positions]])
    return parts[0] if len(parts) == 1 else torch.cat(parts)
