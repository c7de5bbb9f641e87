"""One ragged forward over the paged cache: where its keys and values go, and what each query attends to.

Shapes: `T` packed tokens of all sequences of a step, `S` sequences, `Q` query tokens of the longest sequence, `L` keys
of the longest sequence, `H` query heads, `K` key-value heads, `G = H / K`, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .paged_prefix_cache import PagedPrefixCache


class SequenceSpan(NamedTuple):
    """One sequence's share of a step: `num_queries` new tokens behind `length - num_queries` cached ones."""

    block_table: Sequence[int]
    length: int
    num_queries: int


class PagedStep:
    """The plan of one forward, made once and used by every layer.

    Parameters
    ----------
    cache : PagedPrefixCache
        Owner of the pools that are written to and read from.
    spans : sequence of SequenceSpan
        The sequences, in the order in which their new tokens are packed.
    """

    def __init__(self, cache: PagedPrefixCache, spans: Sequence[SequenceSpan]) -> None:
        self.cache = cache
        self.spans = spans
        self._masks: dict[int | None, torch.Tensor | None] = {}
        self._num_keys = max(span.length for span in spans)
        self._num_queries = max(span.num_queries for span in spans)
        self._padded_rows = self._find_padded_rows()
        self._read: slice | torch.Tensor  # S * L slots
        self._write: slice | torch.Tensor  # T slots
        if len(spans) == 1 and _is_one_run(spans[0].block_table):
            # The common case, read and written as slices of the pool, without a copy.
            start = spans[0].block_table[0] * cache.block_size
            self._read = slice(start, start + self._num_keys)
            self._write = slice(start + self._num_keys - self._num_queries, start + self._num_keys)
        else:
            self._read, self._write = self._find_slots()

    def _find_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where every sequence's keys lie, short ones padded with their own first, and where the new ones go.

        Masked keys still count 0 times their value: another sequence's NaN would not stay its own.
        """
        size = self.cache.block_size
        read = torch.zeros(len(self.spans), self._num_keys, dtype=torch.long)
        write = []
        for row, span in enumerate(self.spans):
            blocks = torch.tensor(span.block_table[: -(-span.length // size)])
            slots = (blocks[:, None] * size + torch.arange(size)).flatten()[: span.length]
            read[row, : span.length], read[row, span.length :] = slots, slots[0]
            write.append(slots[span.length - span.num_queries :])
        return read.flatten().to(self.cache.device), torch.cat(write).to(self.cache.device)

    def _find_padded_rows(self) -> torch.Tensor | None:
        """Each packed token's place among the queries padded to `(S * Q,)`; None where no padding is needed."""
        if all(span.num_queries == self._num_queries for span in self.spans):
            return None
        places = [
            torch.arange(row * self._num_queries, row * self._num_queries + span.num_queries)
            for row, span in enumerate(self.spans)
        ]
        return torch.cat(places).to(self.cache.device)

    def attend(
        self,
        layer_index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new keys and values `(1, K, T, D)`, attend with `query` `(1, H, T, D)`, return `(1, T, H, D)`."""
        keys, values = self.cache.pools(layer_index, key, value)
        self._store(keys, key)
        self._store(values, value)
        k = keys[self._read].unflatten(0, (len(self.spans), self._num_keys)).transpose(1, 2)  # (S, K, L, D)
        v = values[self._read].unflatten(0, (len(self.spans), self._num_keys)).transpose(1, 2)
        q = self._pad(query)  # (S, H, Q, D)
        mask = self._mask(sliding_window)
        if softcap is None and sinks is None:
            output = _grouped_attention(q, k, v, mask, scaling)
        else:
            output = _eager_attention(q, k, v, mask, scaling, softcap, sinks)
        output = output.transpose(1, 2).flatten(0, 1)  # (S * Q, H, D)
        return (output if self._padded_rows is None else output[self._padded_rows])[None]

    def _store(self, pool: torch.Tensor, new: torch.Tensor) -> None:
        rows = new[0].transpose(0, 1)  # (T, K, D)
        if isinstance(self._write, slice):
            pool[self._write] = rows
        else:
            pool.index_copy_(0, self._write, rows.contiguous())

    def _pad(self, query: torch.Tensor) -> torch.Tensor:
        if len(self.spans) == 1:
            return query
        rows = query[0].transpose(0, 1)  # (T, H, D)
        if self._padded_rows is not None:
            padded = rows.new_zeros(len(self.spans) * self._num_queries, *rows.shape[1:])
            padded[self._padded_rows] = rows
            rows = padded
        return rows.unflatten(0, (len(self.spans), self._num_queries)).transpose(1, 2)

    def _mask(self, sliding_window: int | None) -> torch.Tensor | None:
        """`(S, 1, Q, L)` bool, True where a query may look; None where every query sees every key."""
        if sliding_window not in self._masks:
            self._masks[sliding_window] = self._make_mask(sliding_window)
        return self._masks[sliding_window]

    def _make_mask(self, sliding_window: int | None) -> torch.Tensor | None:
        sees_all = self._num_queries == 1 and self._num_keys <= (sliding_window or self._num_keys)
        if sees_all and len(self.spans) == 1:
            return None
        starts = torch.tensor([span.length - span.num_queries for span in self.spans])
        positions = starts[:, None] + torch.arange(self._num_queries)  # (S, Q)
        keys = torch.arange(self._num_keys)
        mask = keys <= positions[..., None]
        if sliding_window:
            mask &= keys > positions[..., None] - sliding_window
        return mask[:, None].to(self.cache.device)


def _is_one_run(block_table: Sequence[int]) -> bool:
    first = block_table[0]
    return block_table[-1] - first == len(block_table) - 1 and all(
        block == first + index for index, block in enumerate(block_table)
    )


def _grouped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Scaled dot-product attention `(S, H, Q, D)`, with the query heads of a group folded into the query axis.

    Keys and values are then never expanded to the number of query heads.
    """
    num_groups = q.shape[1] // k.shape[1]
    if num_groups == 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    num_queries = q.shape[2]
    folded = q.unflatten(1, (k.shape[1], num_groups)).flatten(2, 3)  # (S, K, G * Q, D)
    if mask is not None:
        mask = mask.repeat(1, 1, num_groups, 1)
    output = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (num_groups, num_queries)).flatten(1, 2)


def _eager_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft-cap on the logits (Gemma-2) or a learned sink per head (GPT-OSS): `(S, H, Q, D)`."""
    num_groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(num_groups, 1), v.repeat_interleave(num_groups, 1)
    logits = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1).to(logits.dtype)
        logits = torch.cat([logits, column], dim=-1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(logits, dim=-1, dtype=dtype).to(q.dtype)
    return weights[..., : k.shape[2]] @ v
