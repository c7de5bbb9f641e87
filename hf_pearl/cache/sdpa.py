"""Attention over the paged cache with torch's scaled dot-product attention: any device, no kernel of our own.

Shapes: `S` sequences, `T` packed tokens, `Q` query tokens of the longest window, `L` keys of the longest, `H` query
heads, `K` key-value heads, `G = H / K`, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from .paged_layer import EvenRows, PagedLayer, SlotPool, Slots, as_numbers, find_even_rows
from .partial_attention import attend_part, merge_parts

if TYPE_CHECKING:
    from .step import Attention

# Measured on a CPU: reading row by row copies nothing, but costs a call a row.
MAX_GATHERED_KEYS = 64  # up to here, gathering all rows was faster
MAX_VIEWED_KEYS = 1024  # up to here, reading rows of equal distance at once was


class TreeMask(NamedTuple):
    """What the new tokens of a sequence attend to where they are guesses in a tree.

    All of them to the first `num_common` tokens; the `i`-th to those at the places `paths[i]` too, one behind the
    other, itself at the end. Where a token lies in the sequence does not say its position, which is
    `num_common + len(path) - 1`.
    """

    num_common: int
    paths: tuple[tuple[int, ...], ...]

    def behind(self, first: int) -> TreeMask:
        """The same, with places counted from `first` on."""
        paths = tuple(tuple(place - first for place in path) for path in self.paths)
        return TreeMask(self.num_common - first, paths)

    def mask(self, num_queries: int, num_keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """`(1, Q, L)`, as in `PaddedBatch`; queries behind the last path see the first key."""
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device="cpu")
        hidden[:, : self.num_common] = False
        for row, path in enumerate(self.paths):
            hidden[row, list(path)] = False
            if window is not None and (num_passed := self.num_common + len(path) - window) > 0:
                hidden[row, : min(num_passed, self.num_common)] = True
                hidden[row, list(path[: max(0, num_passed - self.num_common)])] = True
        hidden[len(self.paths) :, 0] = False
        return _additive(hidden, like)[None]


class Span(NamedTuple):
    """What one sequence attends to: the slots of `num_keys` tokens, the last `num_queries` of which are new."""

    slots: Slots
    num_keys: int
    num_queries: int
    tree: TreeMask | None = None


class GroupedQueries(NamedTuple):
    """How packed queries become those of key-value heads, as if the `G` that read one head followed each other.

    Attributes
    ----------
    into : torch.Tensor
        `(S * K * G * Q,)`: which of `T * H` queries to take; a short window's last one again where it is padded.
    back : torch.Tensor
        `(T * H,)`: where each lies there.
    mask : torch.Tensor
        `(S, 1, G * Q, L)`.
    """

    into: torch.Tensor
    back: torch.Tensor
    mask: torch.Tensor


class PaddedBatch:
    """Sequences of a step, padded to the longest.

    Parameters
    ----------
    slots : torch.Tensor or EvenRows
        `(S * L,)`: short sequences are padded with their own first slot. Masked keys still count 0 times their value,
        and another sequence's NaN would not stay its own. In a view of even rows it does not; see `PagedStep`.
    mask : torch.Tensor
        `(S, 1, Q, L)`: what is added to the scores, 0 where a query may look, else minus infinity.
    num_queries : sequence of int
        New tokens of each sequence.
    """

    def __init__(self, slots: torch.Tensor | EvenRows, mask: torch.Tensor, num_queries: Sequence[int]) -> None:
        self.slots = slots
        self.mask = mask
        self.num_queries = num_queries
        self._grouped: dict[tuple[int, int], GroupedQueries] = {}

    def read(self, pool: SlotPool) -> torch.Tensor:
        """Keys or values `(S, K, L, D)`."""
        num_rows, num_keys = self.mask.shape[0], self.mask.shape[3]
        if isinstance(self.slots, torch.Tensor):
            return pool.read(self.slots)[0].unflatten(1, (num_rows, num_keys)).transpose(0, 1)
        return pool.view(self.slots, num_rows, 0, num_keys)

    def grouped(self, num_heads: int, num_key_value_heads: int) -> GroupedQueries:
        """How queries of `H` heads are grouped by `K`; the same for all layers that are alike."""
        sizes = num_heads, num_key_value_heads
        if sizes not in self._grouped:
            self._grouped[sizes] = self._group(*sizes)
        return self._grouped[sizes]

    def _group(self, num_heads: int, num_key_value_heads: int) -> GroupedQueries:
        group, width = num_heads // num_key_value_heads, max(self.num_queries)
        counts = torch.tensor(self.num_queries, device="cpu")  # (S,)
        window = torch.arange(width, device="cpu").minimum(counts[:, None] - 1)  # (S, Q)
        tokens = (counts.cumsum(0) - counts)[:, None] + window
        heads = torch.arange(num_heads, device="cpu").view(1, num_key_value_heads, group, 1)
        into = (tokens[:, None, None] * num_heads + heads).flatten()
        places = (
            torch.arange(into.numel(), device="cpu").view(len(counts), num_heads, width).transpose(1, 2)
        )  # (S, Q, H)
        back = places[torch.arange(width, device="cpu") < counts[:, None]].flatten()
        device = self.mask.device
        return GroupedQueries(into.to(device), back.to(device), self.mask.repeat(1, 1, group, 1))


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class SdpaPlan:
    """How the sequences of a step are read, for all layers with one sliding window on one device.

    `shared` is where the tokens lie that all sequences begin with; they are read once, and `spans` are what follows.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        window: int | None,
        like: torch.Tensor,
        even: EvenRows | None = None,
        shared: Slots | None = None,
    ) -> None:
        self.spans = spans
        self.shared = shared
        self.batch: PaddedBatch | None = None
        self.masks: list[torch.Tensor | None] = []
        longest = max(span.num_keys for span in spans)
        is_gathered = len(spans) > 1 and (like.device.type != "cpu" or longest <= MAX_GATHERED_KEYS)
        if even is not None or is_gathered:
            self.batch = padded_batch(spans, window, like, even)
        else:
            self.masks = [row_mask(span, window, like) for span in spans]

    def attend(self, layer: PagedLayer, query: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Attention of `(1, H, T, D)` over what `layer` holds of each sequence, to `(1, T, H, D)`."""
        if self.shared is None and attention.softcap is None and attention.sinks is None:
            return self._attend(layer, query, partial(_attend, scaling=attention.scaling))
        attend = partial(attend_part, scaling=attention.scaling, softcap=attention.softcap)
        parts = [self._attend(layer, query, attend)]
        if self.shared is not None:
            parts.insert(0, attend(query, *layer.read(self.shared), None).transpose(1, 2))
        return merge_parts(parts, attention.sinks).to(query.dtype)

    def _attend(self, layer: PagedLayer, query: torch.Tensor, attend: Attend) -> torch.Tensor:
        if self.batch is not None:
            return _attend_batched(layer, self.batch, query, attend)
        if len(self.spans) == 1:
            return attend(query, *layer.read(self.spans[0].slots), self.masks[0]).transpose(1, 2)
        outputs = []
        queries = query.split([span.num_queries for span in self.spans], dim=2)
        for span, mask, q in zip(self.spans, self.masks, queries, strict=True):
            outputs.append(attend(q, *layer.read(span.slots), mask))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def find_padded_rows(spans: Sequence[Span], num_slots: int) -> EvenRows | None:
    """Where the sequences lie, if they are even rows and reading them padded reads little beyond their keys."""
    longest, total = max(span.num_keys for span in spans), sum(span.num_keys for span in spans)
    if longest > MAX_VIEWED_KEYS or longest * len(spans) > 2 * total:
        return None
    even = find_even_rows([span.slots for span in spans])
    fits = even is not None and even.first + (len(spans) - 1) * even.distance + longest <= num_slots
    return even if fits else None


def padded_batch(
    spans: Sequence[Span], window: int | None, like: torch.Tensor, even: EvenRows | None = None
) -> PaddedBatch:
    """Sequences that are read together."""
    num_keys, num_queries = max(span.num_keys for span in spans), max(span.num_queries for span in spans)
    starts = torch.tensor([span.num_keys - span.num_queries for span in spans], device="cpu")
    positions = starts[:, None, None] + torch.arange(num_queries, device="cpu")[None, :, None]
    mask = _mask(positions, torch.arange(num_keys, device="cpu"), window, like)[:, None]
    for row, span in enumerate(spans):
        if span.tree is not None:
            mask[row] = span.tree.mask(num_queries, num_keys, window, like)
    slots = even or _gathered_slots(spans, num_keys).to(like.device)
    return PaddedBatch(slots, mask, [span.num_queries for span in spans])


def _gathered_slots(spans: Sequence[Span], num_keys: int) -> torch.Tensor:
    slots = torch.zeros(len(spans), num_keys, dtype=torch.long, device="cpu")
    for row, span in enumerate(spans):
        own = as_numbers(span.slots).cpu()
        slots[row, : span.num_keys], slots[row, span.num_keys :] = own, own[0]
    return slots.flatten()


def row_mask(span: Span, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """`(1, 1, Q, L)`, as in `PaddedBatch`; None where the only query sees every key."""
    if span.tree is not None:
        return span.tree.mask(span.num_queries, span.num_keys, window, like)[None]
    if span.num_queries == 1:
        return None
    positions = torch.arange(span.num_keys - span.num_queries, span.num_keys, device="cpu")[:, None]
    return _mask(positions, torch.arange(span.num_keys, device="cpu"), window, like)[None, None]


def _mask(positions: torch.Tensor, keys: torch.Tensor, window: int | None, like: torch.Tensor) -> torch.Tensor:
    is_hidden = keys > positions
    if window is not None:
        is_hidden |= keys <= positions - window
    return _additive(is_hidden, like)


def _additive(is_hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return like.new_zeros(is_hidden.shape).masked_fill_(is_hidden.to(like.device), -torch.inf)


def _attend_batched(layer: PagedLayer, batch: PaddedBatch, query: torch.Tensor, attend: Attend) -> torch.Tensor:
    assert layer.pools is not None
    keys, values = batch.read(layer.pools[0]), batch.read(layer.pools[1])
    num_rows, num_heads, width = len(batch.num_queries), query.shape[1], max(batch.num_queries)
    if width == 1:
        output = attend(query.permute(2, 1, 0, 3), keys, values, batch.mask)
        return output.permute(2, 0, 1, 3)
    # Every key is then read once for all heads of its group: a third less time on a CPU.
    grouped = batch.grouped(num_heads, keys.shape[1])
    rows = query[0].transpose(0, 1).flatten(0, 1).index_select(0, grouped.into)  # (S * H * Q, D)
    q = rows.view(num_rows, keys.shape[1], -1, rows.shape[1])  # (S, K, G * Q, D)
    output = attend(q, keys, values, grouped.mask).flatten(0, 2).index_select(0, grouped.back)  # (T * H, D)
    return output.view(1, -1, num_heads, output.shape[1])


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of `(S, H, Q, D)` over `(S, K, L, D)`, to `(S, H, Q, D)`."""
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=is_grouped)
