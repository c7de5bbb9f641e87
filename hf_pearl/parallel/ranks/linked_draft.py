"""A draft lane in another rank of the world, as the engine sees it.

torch.distributed carries what shared memory carries on one host. What arrives is put into memory laid out as a
worker's, so that `ProcessDraft` reads both.
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from contextlib import suppress

import torch.distributed as dist

from ...interrupts import KeptInterrupts
from ..workers.descriptors import anonymous_memory, event
from ..workers.records import MalformedRecordError, Message, Quit, Status, decode_status, encode_message, encode_status
from ..workers.shared_memory import Channel
from . import world
from .draft_frames import unpack
from .world import receive_words, send_words


class LinkedDraft:
    """What `WorkerProcess` is for a child process: messages one way, a channel of news the other.

    It listens between `open` and `close`, within one call of `generate`.

    Parameters
    ----------
    group : ProcessGroup
        Of the target's first rank, which this is, and the draft's.
    other : int
        The draft's first rank, in the world.

    Attributes
    ----------
    is_cut : bool
        Whether nothing can be said to the other side any more, which has been given up then.
    """

    distributions: int | None = None
    is_ready = True
    is_silent = False
    has_failed_by_itself = False
    process_id = 0  # not on this host, perhaps

    def __init__(self, group: dist.ProcessGroup, other: int) -> None:
        self._group, self._other = group, other
        memory = anonymous_memory("hf_pearl_channel", Channel.NUM_BYTES)
        self.channel = Channel(memory)
        os.close(memory)
        self.channel.status.write(encode_status(Status(0, True, 0, 0, 0, 0, 0.0)))
        self._news = event()
        self._free = weakref.finalize(self, _free, self.channel, self._news)
        self._free.atexit = False  # The system does it then, and a thread may still listen.
        self._waiting: list[Message] = []
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._num_sent = 0
        self.is_cut = False

    def open(self) -> None:
        """Listen, and send what has had to wait."""
        self._hear_out()
        if self.is_cut:
            return
        self._thread = threading.Thread(target=self._listen, name="hf_pearl draft link", daemon=True)
        self._thread.start()
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            self.put(message)

    def _listen(self) -> None:
        try:
            while words := receive_words(self._other, self._group):
                for part in unpack(words):
                    part.store(self.channel)
                os.eventfd_write(self._news, 1)
        except Exception as error:  # Whatever it is: nobody listens from here on.
            self.cut(str(error))
        os.eventfd_write(self._news, 1)

    def close(self) -> None:
        """Let the other side leave this call of `generate`, and hear it out, or give it up."""
        if self._thread is not None and not self.is_cut:
            self._send(Quit())  # It waits for this also where it was given up for what it has sent.
        self._hear_out()

    def _hear_out(self) -> None:
        if self._thread is None:
            return
        self._thread.join(world.ANSWER_SECONDS)
        if self._thread.is_alive():
            self.cut(f"rank {self._other} has not left a call in {world.ANSWER_SECONDS:g} s")
        else:
            self._thread = None

    @property
    def status(self) -> Status | None:
        """How far it is."""
        content = self.channel.status.read()
        try:
            return None if content is None else decode_status(content)
        except MalformedRecordError as error:
            self.give_up(str(error))
            return None

    @property
    def is_alive(self) -> bool:
        """Whether it has not been given up; a rank that ends takes this one with it."""
        return not self._failure

    def why_it_ended(self) -> str:
        """What is known of its end."""
        return self._failure

    def give_up(self, reason: str) -> None:
        """Never use it again."""
        self._failure = self._failure or reason

    def cut(self, reason: str) -> None:
        """Never speak to it again."""
        self.is_cut = True
        self.give_up(reason)

    def put(self, message: Message) -> int:
        """Send a message; return its number. While nobody listens it waits."""
        self._num_sent += 1
        if self._thread is None and not self.is_cut:
            self._waiting.append(message)
        elif self.is_alive:
            self._send(message)
        return self._num_sent

    def _send(self, message: Message) -> None:
        try:
            with KeptInterrupts():  # Half a message would be taken for the next one's beginning.
                send_words(encode_message(message), self._other, self._group)
        except RuntimeError as error:
            self.cut(str(error))

    def withdraw(self, first: int) -> bool:
        """Whether the messages from number `first` on were taken back: what is sent cannot be."""
        return False

    def flush(self) -> None:
        """Nothing to do: nothing waits."""

    def wait(self, seconds: float) -> None:
        """Wait until there is news; `seconds` at most."""
        poller = select.poll()
        poller.register(self._news, select.POLLIN)
        poller.poll(1000 * max(0.0, seconds))
        with suppress(BlockingIOError):
            os.eventfd_read(self._news)

    def end(self) -> None:
        """Give memory and descriptor back; harmless to repeat. Garbage collection does the same.

        A thread that still listens keeps them for as long as it does.
        """
        if self._thread is None:
            self._free()


def _free(channel: Channel, news: int) -> None:
    channel.close()
    os.close(news)
