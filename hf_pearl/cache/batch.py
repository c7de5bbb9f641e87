"""A batch of rows of one length on the paged cache: what transformers' `Cache` methods work on.

Shapes: `B` rows, `T` new tokens of each, `L` tokens of each, `K` key-value heads, `D` head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache

from ..errors import PearlOutOfBlocksError
from .paged_layer import PagedLayer, Slots, as_numbers
from .paged_sequence import PagedSequence


class RowSlots(NamedTuple):
    """Where a step's tokens lie: made by the first layer, used by all."""

    device: torch.device
    start: int
    end: int
    new: Slots
    every: Slots


class BatchOfRows(Cache, ABC):
    """`past_key_values` for plain transformers; padding on the left is kept like any token, and masked by the model."""

    layers: list[PagedLayer]
    block_size: int

    def __init__(self, layers: list[PagedLayer]) -> None:
        super().__init__(layers=layers)
        self.batch_rows: list[PagedSequence] = []
        self._row_slots: RowSlots | None = None

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Tokens that the pools have room for."""

    @abstractmethod
    def allocate(self) -> PagedSequence:
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
        """Store `(B, K, T, D)`; return all keys and values `(B, K, L, D)`, a view where they lie side by side.

        Gradients flow into `key_states` and `value_states`, not into what earlier calls have stored.

        Raises
        ------
        ValueError
            Another number of rows than before.
        PearlOutOfBlocksError
            Not enough memory; the rows are then as they were.
        """
        layer, batch = self.layers[layer_idx], key_states.shape[0]
        start, end = layer.num_tokens, layer.num_tokens + key_states.shape[2]
        if not self.batch_rows:
            self.before_first_rows(key_states.device)
        self._make_room(batch, end)
        slots = self._slots(key_states.device, start, end)
        if layer.pools is None:
            layer.make_pools(self.num_slots, key_states, value_states)
        with torch.no_grad():
            layer.write(slots.new, _side_by_side(key_states), _side_by_side(value_states))
        layer.num_tokens = end
        keys, values = (_in_rows(states, batch) for states in layer.read(slots.every))
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys, values = (
                torch.cat([stored[:, :, :start], new], dim=2)
                for stored, new in ((keys, key_states), (values, value_states))
            )
        return keys, values

    def _make_room(self, num_rows: int, length: int) -> None:
        is_first = not self.batch_rows
        if is_first:
            self.batch_rows = [self.allocate() for _ in range(num_rows)]
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

    def _slots(self, device: torch.device, start: int, end: int) -> RowSlots:
        if self._row_slots is None or self._row_slots[:3] != (device, start, end):
            new, every = (
                _joined([row.slots(self.block_size, first, end) for row in self.batch_rows], device)
                for first in (start, 0)
            )
            self._row_slots = RowSlots(device, start, end, new, every)
        return self._row_slots

    def _select(self, chosen: Sequence[int]) -> None:
        """Have the rows `chosen`, some perhaps several times, in this order."""
        if list(chosen) == list(range(len(self.batch_rows))):
            return
        old, self.batch_rows = self.batch_rows, [self.fork(self.batch_rows[row]) for row in chosen]
        for row in old:
            self.free(row)
        self._row_slots = None

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
        self._select(torch.arange(len(self.batch_rows))[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every row `repeats` times."""
        self._select([row for row in range(len(self.batch_rows)) for _ in range(repeats)])

    def copy_rows(self, target: BatchOfRows) -> None:
        """Put the same rows into another cache of the same model, which has none."""
        for layer_index, layer in enumerate(self.layers):
            if layer.num_tokens:
                every = [row.slots(self.block_size, 0, layer.num_tokens) for row in self.batch_rows]
                keys, values = (torch.cat(states) for states in zip(*map(layer.read, every), strict=True))
                target.update(keys, values, layer_index)


def _joined(parts: Sequence[Slots], device: torch.device) -> Slots:
    """The slots of several rows, in order: still a slice where the rows lie side by side."""
    runs = [part for part in parts if isinstance(part, slice)]
    if len(runs) == len(parts) and all(run.stop == after.start for run, after in pairwise(runs)):
        return slice(runs[0].start, runs[-1].stop)
    return torch.cat([as_numbers(part) for part in parts]).to(device)


def _side_by_side(states: torch.Tensor) -> torch.Tensor:
    """`(B, K, T, D)` to `(1, K, B * T, D)`."""
    return states if states.shape[0] == 1 else states.transpose(0, 1).flatten(1, 2)[None]


def _in_rows(states: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`(1, K, B * L, D)` to `(B, K, L, D)`."""
    return states if num_rows == 1 else states[0].unflatten(1, (num_rows, -1)).transpose(0, 1)
