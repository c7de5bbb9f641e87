"""What ranks of one host are started with, and how the first one's messages travel to the others."""

from __future__ import annotations

import json
import select
import socket
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..workers.child_process import Parent
from ..workers.records import MalformedRecordError
from .records import MAX_WORDS, Leave, Operation, decode_operations
from .shared_collectives import POLL_SECONDS, Seat

READY = b"r"
HEAD = struct.Struct("<q")  # words of the message that follows


class RankModel(NamedTuple):
    """What every rank of a lane is told at its start.

    Attributes
    ----------
    name : str
        Folder, or name on the Hub.
    dtype : str
        Of the weights, without "torch.".
    lane : str
        "target" or "draft": what errors name.
    size : int
        Ranks of the lane.
    num_threads : int
        Threads of each rank's arithmetic.
    device : str
        Of the first rank; on GPUs every rank has its own, the next.
    """

    name: str
    dtype: str
    lane: str
    size: int
    num_threads: int
    device: str = "cpu"

    def device_of(self, rank: int) -> torch.device:
        """Where a rank computes."""
        first = torch.device(self.device)
        return first if first.index is None else torch.device(first.type, first.index + rank)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


class RankStart(NamedTuple):
    """What a rank is told at its start: the lane's model, its number, its parent, its line, its seat."""

    model: RankModel
    rank: int
    parent: Parent
    line: int
    seat: Seat

    def arguments(self) -> list[str]:
        """It as arguments of a command."""
        numbers = self.rank, self.parent, self.line, self.seat.memory
        return [json.dumps(each) for each in (self.model, numbers, *self.seat[1:])]

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> RankStart:
        """It out of a command's arguments."""
        model, (rank, parent, line, memory), arrivals, posts = map(json.loads, arguments)
        semaphores = ({int(other): each for other, each in named.items()} for named in (arrivals, posts))
        return cls(RankModel(*model), rank, Parent(*parent), line, Seat(memory, *semaphores))


def send_message(line: socket.socket, words: Sequence[int], on_wait: Callable[[], None]) -> None:
    """Send a message of the first rank down a line; `on_wait`, which may raise, is called while there is no room."""
    content = memoryview(HEAD.pack(len(words)) + array("q", words).tobytes())
    poller = select.poll()
    poller.register(line, select.POLLOUT)
    while content:
        try:
            content = content[line.send(content, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            if not poller.poll(1000 * POLL_SECONDS):
                on_wait()


def received_operations(line: socket.socket) -> Iterator[Operation]:
    """What the first rank says, until it leaves or ends."""
    while True:
        head = _receive(line, HEAD.size)
        if head is None:
            return
        (num_words,) = HEAD.unpack(head)
        if not 0 <= num_words <= MAX_WORDS:
            raise MalformedRecordError(f"a message of {num_words} words; the limit is {MAX_WORDS}")
        content = _receive(line, 8 * num_words)
        if content is None:
            return
        for operation in decode_operations(array("q", content)):
            if isinstance(operation, Leave):
                return
            yield operation


def _receive(line: socket.socket, num_bytes: int) -> bytes | None:
    content = bytearray(num_bytes)
    view, place = memoryview(content), 0
    while place < num_bytes:
        received = line.recv_into(view[place:])
        if not received:
            return None
        place += received
    return bytes(content)
