"""All figures of one random model of a real shape: its steps, the bound, and its seconds per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...decoding.chaining import LENGTHS
from .parts import Figures
from .rivals import ENGINE, GENERATE, STATIC, token_seconds
from .shapes import Shape, random_model, step_weights
from .steps import draft_steps, random_rows, target_steps


class Sizes(NamedTuple):
    """How much of a model is measured.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
        Of every row.
    batch_sizes : sequence of int
        The first is 1.
    guesses, tokens : sequence of int
        Of a draft step and of a target forward, of one row.
    batch_tokens : sequence of int
        Of each row's window in a target forward of several.
    num_steps, num_runs : int
        Draft steps, and runs of everything else, that medians are taken of.
    """

    prompt_tokens: int
    new_tokens: int
    batch_sizes: Sequence[int]
    guesses: Sequence[int]
    tokens: Sequence[int]
    batch_tokens: Sequence[int]
    num_steps: int
    num_runs: int


def measure_model(
    shape: Shape, is_draft: bool, sizes: Sizes, device: torch.device, dtype: torch.dtype, bandwidth: float
) -> Figures:
    """Steps of one model, and its seconds per token with `generate` and with our engine.

    Parameters
    ----------
    is_draft : bool
        Whether it drafts; otherwise it verifies.
    bandwidth : float
        Bytes per second; the bound is reading all weights of a step once (keys and values left out).
    """
    model = random_model(shape, device, dtype)
    weight_bytes = step_weights(model) * dtype.itemsize
    batches = [random_rows(size, sizes.prompt_tokens, shape.vocab_size) for size in sizes.batch_sizes]
    figures: Figures = {
        "weight_bytes": weight_bytes,
        "bound_seconds": weight_bytes / bandwidth,
        "prompt_tokens": sizes.prompt_tokens,
        "draft_steps": [],
        "chained_steps": [],
        "target_steps": [],
    }
    if is_draft:
        cases = [(batches[0], num) for num in sizes.guesses] + [(rows, len(rows)) for rows in batches[1:]]
        figures["draft_steps"] = [draft_steps(model, rows, num, sizes.num_steps) for rows, num in cases]
        figures["chained_steps"] = [
            draft_steps(model, rows, num, sizes.num_steps, LENGTHS[0])
            for rows, num in (cases[0], cases[len(sizes.guesses) - 1])
        ]
    for rows in batches:
        tokens = sizes.tokens if len(rows) == 1 else sizes.batch_tokens
        steps, observed = target_steps(model, rows, tokens, sizes.num_runs)
        figures["target_steps"] += steps
        if len(rows) == 1:
            figures["observed"] = observed.as_dict()
    figures["token_seconds"] = [
        token_seconds(model, method, rows, sizes.new_tokens, sizes.num_runs)
        for rows in batches
        for method in (GENERATE, ENGINE)
    ]
    return figures


def measure_rival(shape: Shape, method: str, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Figures:
    """Seconds per token of another method of transformers; for one row only where it would be compiled anew."""
    model = random_model(shape, device, dtype)
    batch_sizes = sizes.batch_sizes[:1] if method == STATIC else sizes.batch_sizes
    rows = [random_rows(size, sizes.prompt_tokens, shape.vocab_size) for size in batch_sizes]
    return {"token_seconds": [token_seconds(model, method, each, sizes.new_tokens, sizes.num_runs) for each in rows]}
