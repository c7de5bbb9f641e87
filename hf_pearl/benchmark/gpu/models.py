"""All figures of one random model of a real shape: its steps, the bound, and its seconds per token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ...decoding.chaining import LENGTHS
from .parts import Attempts, Figures
from .rivals import ENGINE, GENERATE, STATIC, token_seconds
from .shapes import Shape, random_model, step_weights
from .steps import Rows, draft_steps, random_rows, target_steps


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
    shape: Shape,
    is_draft: bool,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    attempt: Attempts,
    compiles: bool = False,
) -> Figures:
    """Steps of one model, and its seconds per token with `generate` and with our engine.

    Parameters
    ----------
    is_draft : bool
        Whether it drafts; otherwise it verifies.
    bandwidth : float
        Bytes per second; the bound is reading all weights of a step once (keys and values left out).
    compiles : bool
        Whether what is captured is compiled; then there are the steps only.
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
        figures |= _draft_figures(model, batches, sizes, attempt, compiles)
    for rows in batches:
        tokens = sizes.tokens if len(rows) == 1 else sizes.batch_tokens
        steps = partial(target_steps, model, rows, tokens, sizes.num_runs, attempt, compiles)
        made, observed = attempt(f"target steps, batch {len(rows)}", steps) or ([], None)
        figures["target_steps"] += made
        if len(rows) == 1 and observed is not None:
            figures["observed"] = observed.as_dict()
    figures["token_seconds"] = [
        each
        for rows in batches
        for method in (() if compiles else (GENERATE, ENGINE))
        for each in _token_seconds(model, method, rows, sizes, attempt)
    ]
    return figures


def _draft_figures(
    model: PreTrainedModel, batches: Sequence[Rows], sizes: Sizes, attempt: Attempts, compiles: bool
) -> Figures:
    """Draft steps, one by one; of one row launched together, too."""

    def made(rows: Rows, num_guesses: int, per_launch: int) -> Figures | None:
        name = f"draft step, batch {len(rows)}, {num_guesses} guesses, {per_launch} to a launch"
        return attempt(name, partial(draft_steps, model, rows, num_guesses, sizes.num_steps, per_launch, compiles))

    cases = [(batches[0], num) for num in sizes.guesses] + [(rows, len(rows)) for rows in batches[1:]]
    single = [made(rows, num, 1) for rows, num in cases]
    chained = [made(batches[0], num, LENGTHS[0]) for num in sizes.guesses]
    return {"draft_steps": [*filter(None, single)], "chained_steps": [*filter(None, chained)]}


def _token_seconds(model: PreTrainedModel, method: str, rows: Rows, sizes: Sizes, attempt: Attempts) -> list[Figures]:
    call = partial(token_seconds, model, method, rows, sizes.new_tokens, sizes.num_runs)
    return [*filter(None, [attempt(f"{method}, batch {len(rows)}", call)])]


def measure_rival(
    shape: Shape, method: str, sizes: Sizes, device: torch.device, dtype: torch.dtype, attempt: Attempts
) -> Figures:
    """Seconds per token of another method of transformers; for one row only where it would be compiled anew."""
    model = random_model(shape, device, dtype)
    batch_sizes = sizes.batch_sizes[:1] if method == STATIC else sizes.batch_sizes
    rows = [random_rows(size, sizes.prompt_tokens, shape.vocab_size) for size in batch_sizes]
    found = [_token_seconds(model, method, each, sizes, attempt) for each in rows]
    return {"token_seconds": [each for made in found for each in made]}
