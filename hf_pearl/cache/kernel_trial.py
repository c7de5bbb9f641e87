"""A trial of kernels, against their twins in torch, on two short sequences.

That something is installed says little: it may have been built for another torch or another GPU, ask for more than the
GPU has, or lack a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import torch_kernels
from .kernel_interface import Kernels, Pools
from .paged_layer import Held
from .paged_sequence import PagedSequence
from .step_tables import StepTables, needs

BLOCK_SIZE, NUM_BLOCKS = 16, 7
MOVED = (64, 70, 76), (62, 64, 70)  # slots of the longer one, from and to
MAX_ERROR = 3e-2  # of the largest number; outputs of bfloat16 are off by up to 4e-3 of themselves


def trial_failure(kernels: Kernels, held: Held, windows: Sequence[int | None]) -> str | None:
    """What is wrong with what kernels compute where pools hold `held`, with some sliding windows; None: nothing.

    It goes on with a sentence that begins with their name.
    """
    try:
        errors = _errors(kernels, held, windows)
    except Exception as raised:  # Whatever it is, there are other ways to compute this.
        return f"fails: {type(raised).__name__}: {raised}"
    for error in errors:
        if not error < MAX_ERROR:
            return f"computes something else: it is off by {error:.2g} of the largest number"
    return None


def _errors(kernels: Kernels, held: Held, windows: Sequence[int | None]) -> list[float]:
    """By how much the outputs are off, as shares of the largest number."""
    from .step import Attention

    tables = _tables(held.device)
    num_new, num_slots = tables.bounds.num_tokens, NUM_BLOCKS * BLOCK_SIZE
    generator = torch.Generator().manual_seed(0)
    query, key, value, *pools = (
        torch.randn(1, heads, length, held.max_head_dim, generator=generator, device="cpu").to(held.device, held.dtype)
        for heads, length in ((2, num_new), (1, num_new), (1, num_new), (1, num_slots), (1, num_slots))
    )
    right, tried = (Pools(*(pool.clone() for pool in pools)) for _ in range(2))
    torch_kernels.store(key, value, right, tables)
    kernels.store(key, value, tried, tables)
    torch_kernels.move(right, *MOVED)
    kernels.move(tried, *MOVED)
    errors = []
    for window in windows:
        attention = Attention(held.max_head_dim**-0.5, window)
        expected = torch_kernels.paged_attention(query, right, tables, attention)
        found = kernels.paged_attention(query, tried, tables, attention)
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    return errors


def _tables(device: torch.device) -> StepTables:
    """Those of 40 new tokens behind 30, and of one behind 4."""
    sequences, num_new = [PagedSequence(), PagedSequence()], [40, 1]
    for sequence, length, blocks in zip(sequences, (70, 5), (range(2, NUM_BLOCKS), [1]), strict=True):
        sequence.length = length
        for block in blocks:
            sequence.push(block)
    limits, _ = needs(sequences, num_new, [None, None], BLOCK_SIZE)
    tables = StepTables(limits, BLOCK_SIZE, device)
    tables.fill(sequences, num_new, [None, None])
    return tables
