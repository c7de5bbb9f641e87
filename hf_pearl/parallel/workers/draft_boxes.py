"""What a draft lane that runs by itself hears, and what it tells: messages out of a ring, news into a channel."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from ...decoding.drafting import Drafter
from ...decoding.messages import Admission, Grant, Removal, Rest, TokenTree, Verdict
from ..draft_loop import EndOfCall
from ..heartbeat import LOOK_SECONDS
from . import records
from .records import BeginCall, Clear, EndCall, Message, Quit, Status
from .shared_memory import ERROR_BYTES, NUM_SLOTS, TIMELINE_LENGTH, Channel, RingReader


class ToldToQuit(Exception):
    """The parent wants the worker to end."""


class Inbox:
    """Messages of the engine, from the ring.

    Attributes
    ----------
    num_looks : int
        How often there was a look for a message: whoever waits for one makes progress.
    """

    def __init__(self, channel: Channel, to_worker: int) -> None:
        self._reader = RingReader(channel.control, channel.ring)
        self._to_worker = to_worker
        self._wake = select.poll()
        self._wake.register(to_worker, select.POLLIN)
        self.num_looks = 0

    def message(self, block: bool) -> Message | None:
        """The next message of any kind; None where none is there and `block` is False."""
        while True:
            self.num_looks += 1
            words = self._reader.get()
            if words is not None:
                return records.decode_message(words)
            if not block:
                return None
            self._wake.poll(1000 * LOOK_SECONDS)
            with suppress(BlockingIOError):
                os.eventfd_read(self._to_worker)

    def get(self, block: bool) -> Admission | Verdict | Removal | Grant | Rest | None:
        """The next message of the call; None where none is there and `block` is False.

        Raises
        ------
        EndOfCall
            The engine has ended the call.
        """
        message = self.message(block)
        if isinstance(message, EndCall):
            raise EndOfCall
        if isinstance(message, Quit):
            raise ToldToQuit
        if isinstance(message, BeginCall | Clear):
            raise records.MalformedRecordError(f"a {type(message).__name__} inside a call")
        return message


class Record(Protocol):
    """The last value of something."""

    def write(self, content: bytes) -> None:
        """Replace it."""


class Times(Protocol):
    """Values in places."""

    def __setitem__(self, place: int, value: float, /) -> None:
        """Set one."""


class Published(Protocol):
    """Where a draft lane's news go: a `Channel`, or what is like it and sends them on."""

    @property
    def status(self) -> Record:
        """A `Status`."""

    @property
    def error(self) -> Record:
        """A call's number, and text."""

    @property
    def timeline(self) -> Times:
        """The last draft steps."""

    def tree(self, slot: int) -> Record:
        """A request's guesses."""


class Outbox:
    """Lines, progress and errors of one call, for the engine, which `wake` tells of news."""

    def __init__(self, channel: Published, wake: Callable[[], None], call: int) -> None:
        self._channel, self._wake, self.call = channel, wake, call
        self._num_timed = 0

    def publish(self, drafter: Drafter, trees: Sequence[TokenTree], is_finished: bool = False) -> None:
        """Make guesses and the progress of the call visible, and wake the engine."""
        for tree in trees:
            self._channel.tree(tree.request_id % NUM_SLOTS).write(records.encode_tree(self.call, tree))
        for step in drafter.timeline[self._num_timed :]:
            for place, value in enumerate(step, start=3 * (self._num_timed % TIMELINE_LENGTH)):
                self._channel.timeline[place] = value
            self._num_timed += 1
        status = Status(
            self.call,
            is_finished,
            drafter.num_steps,
            self._num_timed,
            drafter.num_drafted,
            drafter.num_prefilled,
            drafter.step_seconds,
        )
        self._channel.status.write(records.encode_status(status))
        self._wake()

    def fail(self, text: str) -> None:
        """Tell what went wrong in the call, and that it is over."""
        content = text.encode(errors="replace")[-(ERROR_BYTES - 8) :]
        self._channel.error.write(struct.pack("<q", self.call) + content)
        self._channel.status.write(records.encode_status(Status(self.call, True, 0, 0, 0, 0, 0.0)))
        self._wake()
