"""The collectives of ranks on one host, through shared memory: nothing listens, and nobody else can take part.

torch's gloo takes 0.3 to 2 milliseconds for a small sum of two ranks on two cores (it hands every operation from thread
to thread, over TCP); this takes 0.03. A model of 18 layers makes 38 of them in a forward, one to gather logits.
"""

from __future__ import annotations

import math
import mmap
import os
import select
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from .. import heartbeat
from ..workers.descriptors import anonymous_memory, event
from .collectives import RankError

POLL_SECONDS = 0.1
SLOT_BYTES = 2**22  # of a tensor, at a time; pages are taken when they are first written to
HAS_EVENTS = hasattr(os, "eventfd") and hasattr(os, "memfd_create") and hasattr(select, "POLLRDHUP")


class Seat(NamedTuple):
    """A rank's descriptors: the memory, and for every other rank two semaphores, of its arrivals and of ours."""

    memory: int
    arrivals: dict[int, int]
    posts: dict[int, int]

    @property
    def descriptors(self) -> tuple[int, ...]:
        """All of them."""
        return (self.memory, *self.arrivals.values(), *self.posts.values())


class Table:
    """What all ranks of a lane share, made by the first of them; a descriptor may belong to several seats."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._descriptors = [anonymous_memory("hf_pearl_ranks", _num_bytes(size))]
        self._semaphores: dict[tuple[int, int], int] = {}  # (from, to)
        try:
            for pair in ((source, to) for source in range(size) for to in range(size) if source != to):
                self._semaphores[pair] = event(os.EFD_SEMAPHORE)
                self._descriptors.append(self._semaphores[pair])
        except BaseException:
            self.close()
            raise

    def seat(self, rank: int) -> Seat:
        """What rank `rank` takes part with."""
        others = [other for other in range(self.size) if other != rank]
        arrivals = {other: self._semaphores[other, rank] for other in others}
        posts = {other: self._semaphores[rank, other] for other in others}
        return Seat(self._descriptors[0], arrivals, posts)

    def close(self) -> None:
        """Give the descriptors back; harmless to repeat."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class SharedCollectives:
    """One rank's end.

    Every rank writes its tensor to its own slot, tells the others, waits until all have, and reads every slot. There
    are two sets of slots, used in turn: whoever writes to one again knows that all have been to the other since, and so
    have read this one. Sums are taken in the order of ranks, so that every rank has the same bits. Tensors on GPUs are
    copied to the slots, and sums back: only there does a rank wait for its device, so that no wait is without an end.

    Parameters
    ----------
    lane : str
        What errors name.
    seat : Seat
        Of this rank.
    lines : mapping of int to int
        Ranks whose end shows as a hang-up of a descriptor.
    on_wait : callable
        Called with a rank every tenth of a second while it is waited for; ends the wait by an exception. Who has none,
        and so waits for as long as it lives, must end with a rank that has one.
    """

    def __init__(
        self,
        lane: str,
        rank: int,
        seat: Seat,
        lines: Mapping[int, int] | None = None,
        on_wait: Callable[[int], None] = lambda rank: None,
    ) -> None:
        self.rank, self.size, self.num_done = rank, len(seat.arrivals) + 1, 0
        self._lane, self._seat, self._on_wait = lane, seat, on_wait
        self._lines = {descriptor: rank for rank, descriptor in (lines or {}).items()}
        self._memory = mmap.mmap(seat.memory, _num_bytes(self.size))
        self._words = memoryview(self._memory)[2 * self.size * SLOT_BYTES :].cast("q")
        self._slots = [
            [
                torch.frombuffer(self._memory, dtype=torch.uint8, count=SLOT_BYTES, offset=place * SLOT_BYTES)
                for place in range(first, first + self.size)
            ]
            for first in (0, self.size)
        ]

    def close(self) -> None:
        """Unmap the memory."""
        self._slots = []
        self._words.release()
        with suppress(BufferError):  # A tensor that is still being read keeps it for as long.
            self._memory.close()

    def control(self, rank: int) -> memoryview:
        """A rank's control words, where it gives signs of life."""
        return self._words[rank * heartbeat.NUM_WORDS : (rank + 1) * heartbeat.NUM_WORDS]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, with the same bits on every rank."""
        total = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        given, taken = tensor.reshape(-1), total.view(-1)
        step = SLOT_BYTES // tensor.dtype.itemsize
        for start in range(0, len(given), step):
            first, second, *others = self._exchange(given[start : start + step])
            part = torch.add(first, second, out=taken[start : start + step])
            for other in others:
                part += other
        return total.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `(..., n)` side by side, in the order of ranks: `(..., size * n)`."""
        width = tensor.shape[-1]
        given = tensor.reshape(-1, width)
        taken = torch.empty(len(given), self.size * width, dtype=tensor.dtype, device="cpu")
        step = SLOT_BYTES // (tensor.dtype.itemsize * max(1, width))
        assert step, f"a row of {width} values does not fit into a slot"
        for start in range(0, len(given), step):
            rows = given[start : start + step]
            parts = [part.view(rows.shape) for part in self._exchange(rows.reshape(-1))]
            torch.cat(parts, dim=-1, out=taken[start : start + step])
        return taken.view(*tensor.shape[:-1], self.size * width).to(tensor.device)

    def _exchange(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Every rank's `values`, in the order of ranks; to be read before the next exchange."""
        self.num_done += 1
        num_bytes = math.prod(values.shape) * values.dtype.itemsize
        parts = [slot[:num_bytes].view(values.dtype) for slot in self._slots[self.num_done % 2]]
        parts[self.rank].copy_(values)
        for descriptor in self._seat.posts.values():
            os.eventfd_write(descriptor, 1)
        for rank, descriptor in self._seat.arrivals.items():
            self._await(rank, descriptor)
        return parts

    def _await(self, rank: int, arrival: int) -> None:
        if _take(arrival):
            return
        poller = select.poll()
        poller.register(arrival, select.POLLIN)
        for line in self._lines:
            poller.register(line, select.POLLRDHUP)
        while True:
            events = poller.poll(1000 * POLL_SECONDS)
            if _take(arrival):
                return
            ended = [self._lines[line] for line, _ in events if line in self._lines]
            if ended:
                raise RankError(f"rank {ended[0]} of the {self._lane} lane has ended, in collective {self.num_done}")
            self._on_wait(rank)


def _num_bytes(size: int) -> int:
    """Of the shared memory: two sets of slots, then every rank's control words."""
    return 2 * size * SLOT_BYTES + 8 * size * heartbeat.NUM_WORDS


def _take(semaphore: int) -> bool:
    try:
        os.eventfd_read(semaphore)
    except BlockingIOError:
        return False
    return True
