"""One ragged forward over the paged cache: where its keys and values go, and what each sequence attends to.

Shapes: `T` packed tokens of all sequences of a step, `H` query heads, `K` key-value heads, `D` head dimension.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from .kernel_step import KernelStep
from .paged_layer import Held, PagedLayer, Slots, as_numbers
from .sdpa import SdpaPlan, Span, TreeMask, find_padded_rows
from .step_tables import needs

if TYPE_CHECKING:
    from .paged_prefix_cache import PagedPrefixCache
    from .paged_sequence import PagedSequence


# Reads of a key that are saved where all rows share it. Measured on a CPU with 2 to 16 rows: from here on it was
# faster; 1.04 times a step of 4 rows that share 256 tokens, 0.87 of 8 and 128, 0.5 of 16 and 512.
MIN_SAVED_KEYS = 800


class Attention(NamedTuple):
    """What a layer's attention wants beside queries, keys and values.

    Attributes
    ----------
    scaling : float
        Factor of the products of queries and keys.
    sliding_window : int or None
        How many tokens back a query looks, itself included.
    softcap : float or None
        Soft-cap of the scaled products (Gemma-2).
    sinks : torch.Tensor or None
        A logit per head that takes attention away, `(H,)` (GPT-OSS).
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class Step(Protocol):
    """What attention layers ask of the forward that they are part of."""

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Store the new keys and values `(1, K, T, D)`, attend with `query` `(1, H, T, D)`, return `(1, T, H, D)`."""


class PagedStep:
    """The plan of one forward, made once and used by every layer.

    Parameters
    ----------
    cache : PagedPrefixCache
        Owner of the pools that are written to and read from.
    sequences : sequence of PagedSequence
        In the order in which their new tokens are packed; room for these is made already.
    num_new : sequence of int
        New tokens of each.
    may_read_beyond : bool
        Whether rows may be read as one view in which the short ones end in what lies behind them. It is masked, but a
        NaN or an infinity there would not be: whoever allows this must look at the logits of every new token, and
        compute the step again with `read_by_row()` if there is a NaN among them.
    trees : sequence of TreeMask or None, optional
        For each sequence, what its new tokens attend to where that is not all before them.
    """

    def __init__(
        self,
        cache: PagedPrefixCache,
        sequences: Sequence[PagedSequence],
        num_new: Sequence[int],
        may_read_beyond: bool = False,
        trees: Sequence[TreeMask | None] | None = None,
    ) -> None:
        self.cache = cache
        self.sequences = sequences
        self.num_new = num_new
        self.trees = trees or [None] * len(sequences)
        self.has_read_beyond = False
        self._may_read_beyond = may_read_beyond and len(sequences) > 1 and not cache.eight_bit
        # (sliding window, device) -> where new tokens go, and how to read: one plan for all layers that are alike.
        self._plans: dict[tuple[int | None, torch.device], tuple[Slots, SdpaPlan]] = {}
        self._by_kernels: dict[Held, KernelStep | None] = {}

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Store the new keys and values `(1, K, T, D)`, attend with `query` `(1, H, T, D)`, return `(1, T, H, D)`."""
        self.cache.statistics.computed_layers += 1
        layer = self.cache.layers[layer_index]
        if layer.pools is None:
            layer.make_pools(self.cache.num_slots, key, value)
        by_kernels = self._kernel_step(layer)
        if by_kernels is not None:
            return by_kernels.attend(layer, query, key, value, attention)
        window, device = attention.sliding_window, key.device
        planned = self._plans.get((window, device))
        if planned is None:
            planned = self._plans[window, device] = self._write_slots(device), self._read_plan(window, query)
        write, plan = planned
        layer.write(write, key, value)
        return plan.attend(layer, query, attention)

    def _kernel_step(self, layer: PagedLayer) -> KernelStep | None:
        """What attends where kernels read what the layer holds; None: a plan does."""
        held = layer.held
        assert held is not None
        if held not in self._by_kernels:
            kernels, step = self.cache.backend.kernels(held), None
            if kernels is not None:
                limits, _ = needs(self.sequences, self.num_new, self.trees, self.cache.block_size)
                tables = self.cache.backend.tables(limits, self.cache.block_size, held.device)
                tables.fill(self.sequences, self.num_new, self.trees)
                step = KernelStep(kernels, tables)
            self._by_kernels[held] = step
        return self._by_kernels[held]

    def read_by_row(self) -> None:
        """Read nothing but what each sequence attends to, from now on."""
        self._may_read_beyond = self.has_read_beyond = False
        self._plans.clear()

    def _read_plan(self, window: int | None, query: torch.Tensor) -> SdpaPlan:
        num_shared = self._num_shared() if window is None else 0
        spans, even, shared = self._spans(window, query.device, num_shared), None, None
        if self._may_read_beyond and query.device.type == "cpu":
            even = find_padded_rows(spans, self.cache.num_slots)
        self.has_read_beyond |= even is not None
        if num_shared:
            shared = _on(self.sequences[0].slots(self.cache.block_size, 0, num_shared), query.device)
        return SdpaPlan(spans, window, query[:0], even, shared)

    def _num_shared(self) -> int:
        """How many tokens all sequences begin with and hold in the same blocks, if that is worth a part of its own."""
        if len(self.sequences) == 1:
            return 0
        num_tokens = num_shared_blocks([each.block_table for each in self.sequences]) * self.cache.block_size
        return num_tokens if num_tokens * (len(self.sequences) - 1) >= MIN_SAVED_KEYS else 0

    def _write_slots(self, device: torch.device) -> Slots:
        """Where the new tokens go."""
        parts = [
            sequence.slots(self.cache.block_size, sequence.length - num, sequence.length)
            for sequence, num in zip(self.sequences, self.num_new, strict=True)
        ]
        if len(parts) == 1 and isinstance(parts[0], slice):
            return parts[0]
        if max(self.num_new) == 1:
            return torch.tensor([part.start if isinstance(part, slice) else part[0] for part in parts], device=device)
        return torch.cat([as_numbers(part) for part in parts]).to(device)

    def _spans(self, window: int | None, device: torch.device, num_shared: int) -> list[Span]:
        """What each sequence attends to: from the first token that any of its queries sees, behind those shared."""
        spans = []
        for sequence, num, tree in zip(self.sequences, self.num_new, self.trees, strict=True):
            first = num_shared
            if window is not None:
                start = sequence.length - num if tree is None else tree.num_common
                first = max(0, start - window + 1)
            slots = sequence.slots(self.cache.block_size, first, sequence.length)
            spans.append(Span(_on(slots, device), sequence.length - first, num, tree and tree.behind(first)))
        return spans


def num_shared_blocks(block_tables: Sequence[list[int]]) -> int:
    """Length of the common prefix of all block tables."""
    low, high = min(block_tables), max(block_tables)  # All others lie between them.
    return bisect_left(range(len(low)), True, key=lambda place: low[: place + 1] != high[: place + 1])


def _on(slots: Slots, device: torch.device) -> Slots:
    return slots if isinstance(slots, slice) else slots.to(device)
