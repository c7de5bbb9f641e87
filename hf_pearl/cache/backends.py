"""Which code reads and writes the paged cache: torch's scaled dot-product attention, or kernels that follow tables.

On CUDA `"auto"` takes kernels wherever they work: `sdpa` copies every key that it reads there, has the host make slots
and masks, and cannot be captured in a CUDA graph. Among kernels it takes FlashAttention, where a library that can read
our blocks is installed, and Triton's for what that does not know; else Triton's for all. Elsewhere it takes `sdpa`,
which on a CPU reads in place.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .kernel_interface import Kernels
from .kernel_trial import trial_failure
from .paged_layer import Held
from .step_tables import Limits, StepTables

if TYPE_CHECKING:
    from .flash_kernels import FlashKernels

logger = logging.get_logger(__name__)

BACKENDS = ("auto", "sdpa", "triton", "flash")
_NO_LIMITS = Limits(0, 0, 0, 0)


class Backend:
    """What reads one cache, chosen where it is first needed, and the tables that kernels read, kept between steps."""

    def __init__(self) -> None:
        self._name = "auto"
        self._chosen: dict[Held, Kernels | None] = {}
        self._tables: dict[torch.device, StepTables] = {}

    @property
    def name(self) -> str:
        """The one of `BACKENDS` that was asked for."""
        return self._name

    def use(self, name: str) -> None:
        """Have the cache read by one of `BACKENDS` from the next step on."""
        assert name in BACKENDS
        if name != self._name:
            self._name = name
            self._chosen.clear()

    def kernels(self, held: Held) -> Kernels | None:
        """What reads pools that hold `held`; None: `sdpa`.

        Raises
        ------
        ValueError
            The backend that was asked for cannot.
        """
        if held not in self._chosen:
            self._chosen[held] = choose_kernels(self._name, held)
        return self._chosen[held]

    def tables(self, limits: Limits, block_size: int, device: torch.device) -> StepTables:
        """Tables with room for a step; its layers on one device share them."""
        tables = self._tables.get(device)
        if tables is None or not tables.limits.holds(limits) or tables.block_size != block_size:
            before = _NO_LIMITS if tables is None else tables.limits
            tables = self._tables[device] = StepTables(limits.grown(before), block_size, device)
        return tables


def choose_kernels(name: str, held: Held) -> Kernels | None:
    """The kernels that a backend means for pools that hold `held`; None: `sdpa`.

    Raises
    ------
    ValueError
        The named one cannot read them.
    """
    if name == "sdpa":
        return None
    if name == "auto":
        found, said = _fastest(held)
        logger.info_once(f"hf_pearl's attention on {held.device} runs on {said}.")
        return found
    kernels = _flash(held) if name == "flash" else _triton(held)
    if isinstance(kernels, str):
        raise ValueError(f'`attention="{name}"` cannot be used here: {kernels}. Or set it to "auto".')
    return kernels


def _fastest(held: Held) -> tuple[Kernels | None, str]:
    """The fastest that works, and its name, with the reason why it is not a faster one."""
    if held.device.type != "cuda":
        return None, "torch's SDPA"
    triton, flash = _triton(held), _flash(held)
    if isinstance(triton, str):
        return None, f"torch's SDPA, since {triton}"
    if isinstance(flash, str):
        return triton, f"Triton kernels. Not on FlashAttention: {flash}"
    return flash, f"FlashAttention ({flash.library.name}) where windows are plain lines, else on Triton kernels"


def _flash(held: Held) -> FlashKernels | str:
    """FlashAttention beside Triton kernels, or why not."""
    obstacle = _obstacle_to_triton(held)
    if obstacle:
        return obstacle
    from .flash_kernels import find_flash

    return find_flash(held)


def _triton(held: Held) -> Kernels | str:
    """The Triton kernels, or why not."""
    obstacle = _obstacle_to_triton(held)
    if obstacle:
        return obstacle
    from . import kernels

    return kernels


def _obstacle_to_triton(held: Held) -> str | None:
    """Why Triton kernels cannot read pools, and what would help; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    from . import kernels

    if held.device.type != "cuda" and not kernels.IS_INTERPRETED:
        return f"Triton kernels need a CUDA device, and the model is on {held.device} (move it there)"
    if held.eight_bit:
        return 'they read no 8-bit cache (leave `cache_dtype` at "auto")'
    if held.dtype not in kernels.DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in kernels.DTYPES)
        return f"they read {names}, and the model computes in {str(held.dtype).removeprefix('torch.')} (cast it)"
    if held.max_head_dim > kernels.MAX_HEAD_DIM:
        return f"they read heads of up to {kernels.MAX_HEAD_DIM} dimensions, and the model's have {held.max_head_dim}"
    failed = failure_of_triton(held) if held.device.type == "cuda" else None
    return None if failed is None else f"a trial of the Triton kernels {failed}"


@functools.cache
def failure_of_triton(held: Held) -> str | None:
    """What is wrong with what the Triton kernels compute on a device, tried once; None: nothing."""
    from . import kernels

    return trial_failure(kernels, held, (None,))
