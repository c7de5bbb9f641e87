"""Attention over the paged cache with torch's scaled dot-product attention: any device, no kernel of our own.

Shapes: `S` sequences, `T` packed tokens, `Q` query tokens of the longest sequence, `L` keys of the longest, `H` query
heads, `K` key-value heads, `G = H / K`, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .paged_layer import PagedLayer, SlotPool, Slots, as_numbers

if TYPE_CHECKING:
    from .step import Attention

# Measured on a CPU: reading row by row copies nothing, but costs a call a row.
MAX_GATHERED_KEYS = 64  # up to here, gathering all rows was faster
MAX_STRIDED_KEYS = 1024  # up to here, reading rows of equal distance at once was


class Span(NamedTuple):
    """What one sequence attends to: the slots of `num_keys` tokens, the last `num_queries` of which are new."""

    slots: Slots
    num_keys: int
    num_queries: int


class Strided(NamedTuple):
    """Where rows lie whose first slots are `distance` apart: they are read as one view."""

    first: int
    distance: int


class PaddedBatch(NamedTuple):
    """Sequences of a step, padded to the longest.

    Attributes
    ----------
    slots : torch.Tensor or Strided
        `(S * L,)`: short sequences are padded with their own first slot. Masked keys still count 0 times their value,
        and another sequence's NaN would not stay its own. In a strided view it does not; see `PagedStep`.
    mask : torch.Tensor
        `(S, 1, Q, L)`: what is added to the scores, 0 where a query may look, else minus infinity.
    places : torch.Tensor or None
        Each packed token's place among `S * Q` queries; None: its own.
    """

    slots: torch.Tensor | Strided
    mask: torch.Tensor
    places: torch.Tensor | None

    def read(self, pool: SlotPool) -> torch.Tensor:
        """Keys or values `(S, K, L, D)`."""
        num_rows, num_keys = self.mask.shape[0], self.mask.shape[3]
        if isinstance(self.slots, torch.Tensor):
            return pool.read(self.slots)[0].unflatten(1, (num_rows, num_keys)).transpose(0, 1)
        heads, num_slots, dim = pool.data.shape[1:]
        strides = (self.slots.distance * dim, num_slots * dim, dim, 1)
        return pool.data.as_strided((num_rows, heads, num_keys, dim), strides, self.slots.first * dim)


class SdpaPlan:
    """How the sequences of a step are read, for all layers with one sliding window on one device."""

    def __init__(
        self, spans: Sequence[Span], window: int | None, like: torch.Tensor, strided: Strided | None = None
    ) -> None:
        self.spans = spans
        self.batch: PaddedBatch | None = None
        self.masks: list[torch.Tensor | None] = []
        longest = max(span.num_keys for span in spans)
        is_gathered = len(spans) > 1 and (like.device.type != "cpu" or longest <= MAX_GATHERED_KEYS)
        if strided is not None or is_gathered:
            self.batch = padded_batch(spans, window, like, strided)
        else:
            self.masks = [row_mask(span.num_keys, span.num_queries, window, like) for span in spans]

    def attend(self, layer: PagedLayer, query: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Attention of `(1, H, T, D)` over what `layer` holds of each sequence, to `(1, T, H, D)`."""
        if self.batch is not None:
            return _attend_batched(layer, self.batch, query, attention)
        if len(self.spans) == 1:
            keys, values = layer.read(self.spans[0].slots)
            return _attend(query, keys, values, self.masks[0], attention).transpose(1, 2)
        outputs = []
        queries = query.split([span.num_queries for span in self.spans], dim=2)
        for span, mask, q in zip(self.spans, self.masks, queries, strict=True):
            keys, values = layer.read(span.slots)
            outputs.append(_attend(q, keys, values, mask, attention))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def find_strided(spans: Sequence[Span], num_slots: int) -> Strided | None:
    """Where the rows lie, if all are at one distance and reading them padded reads little beyond their keys."""
    longest, total = max(span.num_keys for span in spans), sum(span.num_keys for span in spans)
    if longest > MAX_STRIDED_KEYS or longest * len(spans) > 2 * total:
        return None
    starts = [span.slots.start for span in spans if isinstance(span.slots, slice)]
    if len(starts) < len(spans):
        return None
    first, distance = starts[0], starts[1] - starts[0]
    is_even = all(start == first + row * distance for row, start in enumerate(starts))
    return Strided(first, distance) if is_even and distance > 0 and starts[-1] + longest <= num_slots else None


def padded_batch(
    spans: Sequence[Span], window: int | None, like: torch.Tensor, strided: Strided | None = None
) -> PaddedBatch:
    """Slots, mask and places of sequences that are read together."""
    num_keys, num_queries = max(span.num_keys for span in spans), max(span.num_queries for span in spans)
    starts = torch.tensor([span.num_keys - span.num_queries for span in spans])
    positions = starts[:, None, None] + torch.arange(num_queries)[None, :, None]
    mask = _mask(positions, torch.arange(num_keys), window, like)[:, None]
    places = None
    if any(span.num_queries != num_queries for span in spans):
        own_places = [torch.arange(row * num_queries, row * num_queries + s.num_queries) for row, s in enumerate(spans)]
        places = torch.cat(own_places).to(like.device)
    return PaddedBatch(strided or _gathered_slots(spans, num_keys).to(like.device), mask, places)


def _gathered_slots(spans: Sequence[Span], num_keys: int) -> torch.Tensor:
    slots = torch.zeros(len(spans), num_keys, dtype=torch.long)
    for row, span in enumerate(spans):
        own = as_numbers(span.slots).cpu()
        slots[row, : span.num_keys], slots[row, span.num_keys :] = own, own[0]
    return slots.flatten()


def row_mask(num_keys: int, num_queries: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """`(1, 1, Q, L)`, as in `PaddedBatch`; None where the only query sees every key."""
    if num_queries == 1:
        return None
    positions = torch.arange(num_keys - num_queries, num_keys)[:, None]
    return _mask(positions, torch.arange(num_keys), window, like)[None, None]


def _mask(positions: torch.Tensor, keys: torch.Tensor, window: int | None, like: torch.Tensor) -> torch.Tensor:
    is_hidden = keys > positions
    if window is not None:
        is_hidden |= keys <= positions - window
    return like.new_zeros(is_hidden.shape).masked_fill_(is_hidden.to(like.device), -torch.inf)


def _attend_batched(layer: PagedLayer, batch: PaddedBatch, query: torch.Tensor, attention: Attention) -> torch.Tensor:
    assert layer.pools is not None
    num_rows, _, num_queries, _ = batch.mask.shape
    keys, values = batch.read(layer.pools[0]), batch.read(layer.pools[1])
    if num_queries == 1:
        output = _attend(query.permute(2, 1, 0, 3), keys, values, batch.mask, attention)
        return output.permute(2, 0, 1, 3)
    rows = query[0]  # (H, T, D)
    if batch.places is not None:
        padded = rows.new_zeros(rows.shape[0], num_rows * num_queries, rows.shape[2])
        padded[:, batch.places] = rows
        rows = padded
    q = rows.unflatten(1, (num_rows, num_queries)).transpose(0, 1)  # (S, H, Q, D)
    output = _attend(q, keys, values, batch.mask, attention).transpose(1, 2).flatten(0, 1)  # (S * Q, H, D)
    return (output if batch.places is None else output[batch.places])[None]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, attention: Attention
) -> torch.Tensor:
    """Attention of `(S, H, Q, D)` over `(S, K, L, D)`, to `(S, H, Q, D)`."""
    if attention.softcap is not None or attention.sinks is not None:
        return _eager_attention(q, k, v, mask, attention)
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attention.scaling, enable_gqa=is_grouped)


def _eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, attention: Attention
) -> torch.Tensor:
    """Attention with a soft-cap on the logits (Gemma-2) or a learned sink per head (GPT-OSS)."""
    num_groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(num_groups, 1), v.repeat_interleave(num_groups, 1)
    logits = q @ k.transpose(-1, -2) * attention.scaling
    if attention.softcap is not None:
        logits = torch.tanh(logits / attention.softcap) * attention.softcap
    if mask is not None:
        logits = logits + mask
    if attention.sinks is not None:
        column = attention.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1).to(logits.dtype)
        logits = torch.cat([logits, column], dim=-1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(logits, dim=-1, dtype=dtype).to(q.dtype)
    return weights[..., : k.shape[2]] @ v
