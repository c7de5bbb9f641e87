"""FlashAttention where a step asks for what it knows; the Triton kernels do the rest, and store.

It knows windows that are plain lines: prompts first of all, whose multiplications its authors tuned for each GPU; that
it is faster than our kernels there is taken from that, and has not been measured. Of these windows, Triton kernels
compute what is captured in a CUDA graph (small steps, launched for fixed bounds), those with attention sinks, and those
whose keys and values have unequal dimensions. No version of it takes the mask that the lines of a tree need, which most
windows of draft and target are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import kernels
from .flash_libraries import LIBRARIES, Library
from .kernel_interface import Pools
from .kernel_trial import trial_failure
from .paged_layer import Held
from .step_tables import StepTables

if TYPE_CHECKING:
    from .step import Attention

DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
HEAD_DIM_MULTIPLE = 8


class FlashKernels:
    """`Kernels`, with one of the libraries for what it knows."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def store(self, key: torch.Tensor, value: torch.Tensor, pools: Pools, tables: StepTables) -> None:
        """`Kernels.store`, by Triton."""
        kernels.store(key, value, pools, tables)

    def move(self, pools: Sequence[torch.Tensor], source: Sequence[int], target: Sequence[int]) -> None:
        """`Kernels.move`, by Triton."""
        kernels.move(pools, source, target)

    def paged_attention(
        self,
        query: torch.Tensor,
        pools: Pools,
        tables: StepTables,
        attention: Attention,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`Kernels.paged_attention`, by the library or by Triton."""
        is_plain = not tables.bounds.has_trees and not tables.has_fixed_bounds and attention.sinks is None
        if is_plain and pools.keys.shape[3] == pools.values.shape[3]:
            result = self.library.attend(query[0].transpose(0, 1), pools, tables, attention)
            if result is not None:
                return result[None] if output is None else output.copy_(result[None])
        return kernels.paged_attention(query, pools, tables, attention, output)


def find_flash(held: Held) -> FlashKernels | str:
    """FlashAttention for pools that hold `held`; or why there is none, and what would help."""
    if held.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"FlashAttention reads {names}, and the model computes in {str(held.dtype).removeprefix('torch.')}"
    if held.max_head_dim % HEAD_DIM_MULTIPLE:
        return (
            f"FlashAttention reads heads of a multiple of {HEAD_DIM_MULTIPLE} dimensions, and the model's have "
            f"{held.max_head_dim}"
        )
    obstacles = []
    for library in LIBRARIES:
        obstacle = library.missing() or failure(library, held)
        if obstacle is None:
            return FlashKernels(library)
        obstacles.append(f"{library.name} {obstacle}")
    return "; ".join(obstacles)


@functools.cache
def failure(library: Library, held: Held) -> str | None:
    """What is wrong with what a library computes on a device, tried once; None: nothing."""
    return trial_failure(FlashKernels(library), held, (None, 9))
