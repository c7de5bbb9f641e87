"""Which code reads and writes the paged cache: torch's scaled dot-product attention, or kernels that follow tables.

`"auto"` takes the Triton kernels on CUDA wherever they work: `sdpa` copies every key that it reads there, has the host
make slots and masks, and cannot be captured in a CUDA graph. Elsewhere it takes `sdpa`, which on a CPU reads in place.

There is no backend on flash-attn, nor on torch's `varlen_attn`, which is FlashAttention 2 too unless another is
installed. Their layout is no obstacle: pools viewed as `(blocks, block size, heads, head dim)` need no copy. But
FlashAttention 2 takes blocks of a multiple of 256 tokens only ("Paged KV cache block size must be divisible by 256"),
where ours have 16, so that short prefixes are shared. And it takes no mask for the lines of a tree, which most windows
of draft and target are. What remains are prompts: a cache with `block_size=256`, and `Kernels` that hand every step
with `bounds.has_trees`, sinks or (`varlen_attn`) a soft-cap on to ours.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Protocol

import torch
from transformers.utils import logging

from .paged_layer import Held
from .step_tables import Limits, StepTables

if TYPE_CHECKING:
    from .step import Attention

logger = logging.get_logger(__name__)

BACKENDS = ("auto", "sdpa", "triton")
_NO_LIMITS = Limits(0, 0, 0, 0)


class Kernels(Protocol):
    """Store and attention of one backend, for `StepTables`; `kernels.py` says what they take and return."""

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        tables: StepTables,
    ) -> None:
        """Copy new keys and values to their slots."""

    def paged_attention(
        self,
        query: torch.Tensor,
        key_pool: torch.Tensor,
        value_pool: torch.Tensor,
        tables: StepTables,
        attention: Attention,
        output: torch.Tensor | None = None,
        num_parts: int | None = None,
    ) -> torch.Tensor:
        """Attend to what the sequences of the step hold."""


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
    if name == "sdpa" or (name == "auto" and held.device.type != "cuda"):
        return None
    obstacle = _obstacle_to_triton(held)
    if name == "auto":
        chosen = "torch's SDPA" if obstacle else "Triton kernels"
        why = f", since {obstacle}" if obstacle else ""
        logger.info_once(f"hf_pearl's attention on {held.device} runs on {chosen}{why}.")
    elif obstacle:
        raise ValueError(f'`attention="{name}"` cannot be used here: {obstacle}. Or set it to "auto".')
    return None if obstacle else importlib.import_module(".kernels", __package__)


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
    return None
