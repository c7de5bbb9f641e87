"""A batch of rows of one length on the paged cache: what transformers' `Cache` methods work on.

Shapes: `B` rows, `T` new tokens of each, `L` tokens of each, `K` key-value heads, `D` head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from ..errors import PearlOutOfBlocksError
from .backends import Backend
from .block_pool import BlockPool
from .paged_layer import EvenRows, PagedLayer, SlotPool, as_numbers, find_even_rows
from .paged_sequence import PagedSequence

MIN_EXPECTED_LENGTH = 256


class RowSlots(NamedTuple):
    """Where the tokens of a step lie, those from `start` on being new: made by the first layer, used by all.

    `slots` are even rows, which are read as one view, or `(B * end,)` to gather.
    """

    device: torch.device
    start: int
    end: int
    slots: EvenRows | torch.Tensor

    def write(self, pool: SlotPool, states: torch.Tensor) -> None:
        """Store `(B, K, T, D)`."""
        if isinstance(self.slots, EvenRows):
            pool.view(self.slots, states.shape[0], self.start, self.end).copy_(states)
        else:
            new = self.slots.unflatten(0, (states.shape[0], self.end))[:, self.start :].flatten()
            pool.write(new, states.transpose(0, 1).flatten(1, 2)[None])

    def read(self, pool: SlotPool, num_rows: int) -> torch.Tensor:
        """All keys or values `(B, K, L, D)`."""
        if isinstance(self.slots, EvenRows):
            return pool.view(self.slots, num_rows, 0, self.end)
        return pool.read(self.slots)[0].unflatten(1, (num_rows, self.end)).transpose(0, 1)


class BatchOfRows(Cache, ABC):
    """A `cache` of plain transformers; padding on the left is kept like any token, and masked by the model."""

    layers: list[PagedLayer]
    block_size: int
    eight_bit: bool
    pool: BlockPool

    def __init__(self, layers: list[PagedLayer]) -> None:
        super().__init__(layers=layers)
        self.batch_rows: list[PagedSequence] = []
        self._row_slots: RowSlots | None = None
        self._moves_from = 0
        self.backend = Backend()
        self.layout = 0  # Counts how often pools moved, or the model may have changed: for who keeps addresses.

    @property
    @abstractmethod
    def options(self) -> tuple[Any, ...]:
        """What it was made with."""

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Tokens that the pools have room for."""

    @abstractmethod
    def allocate(self, *, expected_length: int = 0) -> PagedSequence:
        """A new sequence."""

    @abstractmethod
    def append(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Make room for more tokens."""

    @abstractmethod
    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens."""

    @abstractmethod
    def rollback(self, sequence: PagedSequence, length: int) -> None:
        """Drop every token from position `length` on."""

    @abstractmethod
    def free(self, sequence: PagedSequence) -> None:
        """Give the sequence back."""

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first update."""
        return len(self.batch_rows) or -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store `(B, K, T, D)`; return all keys and values `(B, K, L, D)`, as a view where gradients do not matter.

        Gradients flow into `key_states` and `value_states`, not into what earlier calls have stored.

        Raises
        ------
        ValueError
            Another number of rows than before, or of layers than the model's.
        PearlOutOfBlocksError
            Not enough memory; the rows are then as they were.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the cache was made for a model of {len(self.layers)} layers, got layer {layer_idx} of another one; "
                "make it with that model's config."
            )
        layer, batch = self.layers[layer_idx], key_states.shape[0]
        start, end = layer.num_tokens, layer.num_tokens + key_states.shape[2]
        if not self.batch_rows:
            self.before_first_rows(key_states.device)
        self._make_room(batch, end)
        slots = self._slots(key_states.device, start, end)
        if layer.pools is None:
            layer.make_pools(self.num_slots, key_states, value_states)
        assert layer.pools is not None
        layer.num_tokens = end
        with torch.no_grad():
            for pool, states in zip(layer.pools, (key_states, value_states), strict=True):
                slots.write(pool, states)
            keys, values = (slots.read(pool, batch) for pool in layer.pools)
        if torch.is_grad_enabled():
            return _for_autograd(keys, key_states), _for_autograd(values, value_states)
        return keys, values

    def _make_room(self, num_rows: int, length: int) -> None:
        is_first = not self.batch_rows
        if is_first:
            self._moves_from = length + 1
            expected_length = 2 * max(length, MIN_EXPECTED_LENGTH)
            self.batch_rows = [self.allocate(expected_length=expected_length) for _ in range(num_rows)]
        if num_rows != len(self.batch_rows):
            raise ValueError(
                f"the cache holds {len(self.batch_rows)} rows, got keys and values of {num_rows}; call its `reset()` "
                "first."
            )
        before = self.batch_rows[0].length
        if length <= before:
            return  # Another layer has made room already.
        try:
            for row in self.batch_rows:
                self.append(row, length - row.length)
        except PearlOutOfBlocksError:
            for row in self.batch_rows:
                self.rollback(row, before)
            if is_first:
                self.batch_rows = []
            raise

    def _even_rows(self, length: int) -> EvenRows | None:
        """Where the rows lie, if one view reads them. Where they meet each other they move, with room for as much."""
        if self.eight_bit:
            return None
        even = find_even_rows([row.slots(self.block_size, 0, length) for row in self.batch_rows])
        if even is None and length >= self._moves_from:
            self._moves_from = 2 * length
            if all(self.pool.count(block) == 1 for row in self.batch_rows for block in row.block_table):
                self._move_rows()
                even = find_even_rows([row.slots(self.block_size, 0, length) for row in self.batch_rows])
        return even

    def _move_rows(self) -> None:
        rows = self.batch_rows
        kept, dropped = [self.allocate(expected_length=2 * row.length) for row in rows], rows
        try:
            for new, row in zip(kept, rows, strict=True):
                self.append(new, row.length)
        except PearlOutOfBlocksError:  # They can stay where they are.
            kept, dropped = rows, kept
        else:
            for row, new in zip(rows, kept, strict=True):
                for layer in self.layers:
                    layer.copy(*(each.slots(self.block_size, 0, row.length) for each in (row, new)))
        self.batch_rows = kept
        for row in dropped:
            self.free(row)

    def _slots(self, device: torch.device, start: int, end: int) -> RowSlots:
        if self._row_slots is None or self._row_slots[:3] != (device, start, end):
            slots: EvenRows | torch.Tensor | None = self._even_rows(end)
            if slots is None:
                every = [as_numbers(row.slots(self.block_size, 0, end)) for row in self.batch_rows]
                slots = torch.cat(every).to(device)
            self._row_slots = RowSlots(device, start, end, slots)
        return self._row_slots

    def _select(self, chosen: Sequence[int]) -> None:
        """Have the rows `chosen`, some perhaps several times, in this order."""
        wrong = [row for row in chosen if not 0 <= row < len(self.batch_rows)]
        if wrong:
            raise IndexError(f"the cache holds {len(self.batch_rows)} rows, counted from 0; got the row {wrong[0]}.")
        if list(chosen) == list(range(len(self.batch_rows))):
            return
        old, self.batch_rows = self.batch_rows, [self.fork(self.batch_rows[row]) for row in chosen]
        for row in old:
            self.free(row)
        self._row_slots = None
        if not self.batch_rows:
            self._set_length(0)

    def _set_length(self, length: int) -> None:
        for row in self.batch_rows:
            self.rollback(row, length)
        for layer in self.layers:
            layer.num_tokens = length
        self._row_slots = None

    def reset(self) -> None:
        """Drop all rows; the next ones may be of another dtype and on another device."""
        self._select([])
        self._set_length(0)
        self.rows_are_gone()

    @abstractmethod
    def before_first_rows(self, device: torch.device) -> None:
        """Keys and values are about to come from `device`."""

    @abstractmethod
    def rows_are_gone(self) -> None:
        """Nothing is left of the batch."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every row; a positive number is the length to keep."""
        length = self.batch_rows[0].length if self.batch_rows else 0
        change = int(tokens_to_remove)  # transformers passes a tensor, too
        self._set_length(min(length, max(0, change if change > 0 else length + change)))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Make row `i` what row `beam_idx[i]` is."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._select(torch.arange(len(self.batch_rows), device="cpu")[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row `repeats` times."""
        self._select([row for row in range(len(self.batch_rows)) for _ in range(repeats)])

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the batch's rows, and no other sequences or prefixes."""
        return _restored, (type(self), self.options, self.states())

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchOfRows:
        """A cache with a copy of the batch's rows, and with no other sequences or prefixes."""
        memo[id(self)] = copied = _restored(type(self), self.options, self.states())
        return copied

    def states(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """A copy of the keys and values `(B, K, L, D)` of every layer that holds some."""
        states = {}
        for layer_index, layer in enumerate(self.layers):
            if layer.num_tokens:
                every = [row.slots(self.block_size, 0, layer.num_tokens) for row in self.batch_rows]
                keys, values = (torch.cat(rows) for rows in zip(*map(layer.read, every), strict=True))
                states[layer_index] = keys, values
        return states


def _restored(
    kind: type[BatchOfRows], options: tuple[Any, ...], states: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> BatchOfRows:
    cache = kind(*options)
    with torch.no_grad():
        for layer_index, (keys, values) in states.items():
            cache.update(keys, values, layer_index)
    return cache


def _for_autograd(stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What may be saved for a backward pass: the next step must not write to it."""
    if not new.requires_grad:
        return stored.clone()
    return torch.cat([stored[:, :, : -new.shape[2]], new], dim=2)
