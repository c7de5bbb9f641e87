"""Keys and values of one layer, in blocks.

Shapes: `T` new tokens, `K` key-value heads, `D` head dimension, `N` slots (blocks times block size). A head's vectors
lie side by side, as attention reads them: what lies in neighbouring slots is a view `(1, K, n, D)`, and no copy.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from ..errors import PearlOutOfBlocksError

FLOAT8 = torch.float8_e4m3fn
Slots = slice | torch.Tensor  # neighbours, or `(n,)` numbers of any slots


def as_numbers(slots: Slots) -> torch.Tensor:
    """Slot numbers `(n,)`."""
    return torch.arange(slots.start, slots.stop, device="cpu") if isinstance(slots, slice) else slots


class Held(NamedTuple):
    """What a layer's pools hold, as far as it decides who can read them."""

    device: torch.device
    dtype: torch.dtype
    max_head_dim: int
    eight_bit: bool


class EvenRows(NamedTuple):
    """Where sequences lie whose first slots are `distance` apart, each in one run: they are read as one view."""

    first: int
    distance: int


def find_even_rows(rows: Sequence[Slots]) -> EvenRows | None:
    """Where sequences lie, if it is so."""
    starts = [slots.start for slots in rows if isinstance(slots, slice)]
    if len(starts) < len(rows):
        return None
    first, distance = starts[0], starts[1] - starts[0] if len(starts) > 1 else 0
    is_even = all(start == first + row * distance for row, start in enumerate(starts))
    return EvenRows(first, distance) if is_even and distance >= 0 else None


class SlotPool:
    """One vector per head and slot, `(1, K, N, D)`, in the model's dtype or in 8 bits.

    In 8 bits every vector has a scale of its own, its largest absolute value over 448, so that what is kept of a token
    depends on this token alone, not on what was drafted beside it. A value's error is at most 1/16 of itself, or
    2**-10 of the scale near zero.

    Parameters
    ----------
    num_slots : int
        Slots.
    like : torch.Tensor
        `(..., K, T, D)`: shape, dtype and device of what will be stored.
    eight_bit : bool
        Whether to keep 8 bits a value.
    """

    def __init__(self, num_slots: int, like: torch.Tensor, eight_bit: bool) -> None:
        heads, dim = like.shape[-3], like.shape[-1]
        self.dtype = like.dtype
        # Indexing knows no 8-bit floats; their bytes it does.
        stored = torch.uint8 if eight_bit else like.dtype
        self.data = _zeros((1, heads, num_slots, dim), stored, like.device)
        self.scales = _zeros((1, heads, num_slots, 1), torch.float32, like.device) if eight_bit else None

    @property
    def nbytes(self) -> int:
        """Bytes it may take."""
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def _parts(self) -> list[torch.Tensor]:
        return [self.data] if self.scales is None else [self.data, self.scales]

    def write(self, slots: Slots, new: torch.Tensor) -> None:
        """Store `(1, K, T, D)` in `slots`."""
        if self.scales is None:
            _put(self.data, slots, new)
            return
        largest = new.abs().amax(dim=-1, keepdim=True).float()
        scale = torch.where(largest > 0, largest / torch.finfo(FLOAT8).max, 1.0)
        _put(self.data, slots, (new.float() / scale).to(FLOAT8).view(torch.uint8))
        _put(self.scales, slots, scale)

    def read(self, slots: Slots) -> torch.Tensor:
        """What lies in `slots`, `(1, K, n, D)`: a view where they are neighbours, unless it is kept in 8 bits."""
        if self.scales is None:
            return _get(self.data, slots)
        return (_get(self.data, slots).view(FLOAT8).float() * _get(self.scales, slots)).to(self.dtype)

    def view(self, rows: EvenRows, num_rows: int, start: int, end: int) -> torch.Tensor:
        """The slots from `start` to `end - 1` of every row, `(S, K, n, D)`; not where they are kept in 8 bits."""
        heads, num_slots, dim = self.data.shape[1:]
        strides = (rows.distance * dim, num_slots * dim, dim, 1)
        return self.data.as_strided((num_rows, heads, end - start, dim), strides, (rows.first + start) * dim)

    def copy(self, source: Slots, target: Slots) -> None:
        """Copy slots."""
        for part in self._parts():
            _put(part, target, _get(part, source))

    def resize(self, num_slots: int) -> None:
        """Have `num_slots` slots; what lies in those that stay is kept."""
        kept = min(num_slots, self.data.shape[2])
        parts = []
        for part in self._parts():
            resized = _zeros((*part.shape[:2], num_slots, part.shape[3]), part.dtype, part.device)
            resized[:, :, :kept] = part[:, :, :kept]
            parts.append(resized)
        self.data, self.scales = parts[0], parts[1] if len(parts) > 1 else None


class PagedLayer(CacheLayerMixin):
    """One layer of a `PagedPrefixCache`: its pools, and, for `past_key_values`, how many tokens its rows hold."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, eight_bit: bool = False) -> None:
        super().__init__()
        self.eight_bit = eight_bit
        self.num_tokens = 0
        self.pools: tuple[SlotPool, SlotPool] | None = None
        self.held: Held | None = None

    def make_pools(self, num_slots: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Make the pools of keys and of values, to fit `(..., K, T, D)`."""
        self.pools = SlotPool(num_slots, key, self.eight_bit), SlotPool(num_slots, value, self.eight_bit)
        self.is_initialized = True
        device, head_dims = self.pools[0].data.device, [pool.data.shape[3] for pool in self.pools]
        self.held = Held(device, key.dtype, max(head_dims), self.eight_bit)

    def write(self, slots: Slots, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store `(1, K, T, D)` each."""
        assert self.pools is not None
        self.pools[0].write(slots, key)
        self.pools[1].write(slots, value)

    def read(self, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(1, K, n, D)` that lie in `slots`."""
        assert self.pools is not None
        return self.pools[0].read(slots), self.pools[1].read(slots)

    def copy(self, source: Slots, target: Slots) -> None:
        """Copy slots."""
        for pool in self.pools or ():
            pool.copy(source, target)

    def resize(self, num_slots: int) -> None:
        """Have `num_slots` slots."""
        for pool in self.pools or ():
            pool.resize(num_slots)

    @property
    def device(self) -> torch.device | None:
        """Where its keys and values are kept; None before there are any."""
        return None if self.pools is None else self.pools[0].data.device

    @property
    def nbytes(self) -> int:
        """Bytes that the pools may take."""
        return sum(pool.nbytes for pool in self.pools or ())

    def get_seq_length(self) -> int:
        """Tokens of every row."""
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `PagedPrefixCache.update` returns."""
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: pools are made on first use."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: blocks belong to all layers together."""
        raise TypeError("call the method of the PagedPrefixCache, not of one of its layers")

    reset = reorder_cache = crop = offload = prefetch = update


def _put(pool: torch.Tensor, slots: Slots, new: torch.Tensor) -> None:
    if isinstance(slots, slice):
        pool.narrow(2, slots.start, slots.stop - slots.start).copy_(new)
    else:
        pool.index_copy_(2, slots, new)


def _get(pool: torch.Tensor, slots: Slots) -> torch.Tensor:
    if isinstance(slots, slice):
        return pool.narrow(2, slots.start, slots.stop - slots.start)
    return pool.index_select(2, slots)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On a CPU the operating system provides the memory page by page, when it is first written to."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        with torch.inference_mode(False):  # A tensor made in inference mode could not be written to outside it.
            if device.type != "cpu" or not num_bytes:
                return torch.zeros(*shape, dtype=dtype, device=device)
            return torch.frombuffer(_memory(num_bytes), dtype=dtype).view(*shape)
    except (torch.OutOfMemoryError, MemoryError, OSError) as error:
        raise PearlOutOfBlocksError(
            f"there is no memory for {num_bytes} more bytes of the paged cache on {device}. Lower "
            f"`PearlConfig(cache_memory=...)`, or free memory."
        ) from error


def _memory(num_bytes: int) -> mmap.mmap:
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return mmap.mmap(-1, num_bytes, **private)
