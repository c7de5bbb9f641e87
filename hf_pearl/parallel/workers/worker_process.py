"""Starting and ending a draft worker's process, and what the engine shares with it."""

from __future__ import annotations

import os
import pickle
import select
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from .. import heartbeat
from . import device_weights
from .child_process import Parent, start_module
from .descriptors import anonymous_memory, event, socket_pair
from .device_weights import SharedStorage
from .records import MalformedRecordError, Message, Quit, Status, decode_status, encode_message
from .shared_memory import Channel, RingWriter
from .shipping import Shipment, copy_weights, share_weights

QUIT_SECONDS = 0.7  # for each of: asked, terminated, killed
START_SECONDS = 600.0  # after which a worker that is not ready is given up; nobody waits for it
LOG_BYTES = 4000


class WorkerProcess:
    """One child process, from its start to its end. Starting does not wait: `is_ready` tells.

    Parameters
    ----------
    shipment : Shipment
        The draft model.
    tensors : list of torch.Tensor
        Its weights; those in main memory are copied in the background.
    num_threads : int
        Threads of the worker's arithmetic.
    cores : sequence of int
        Cores that it is pinned to; empty: it is not.
    """

    def __init__(self, shipment: Shipment, tensors: list[torch.Tensor], num_threads: int, cores: Sequence[int]) -> None:
        self.shipment = shipment
        self.channel: Channel | None = None
        self._owner = os.getpid()
        self._descriptors: dict[str, int] = {}
        self._shared: list[SharedStorage] = []
        self._cancelled = threading.Event()
        self._failure = ""
        self._is_lost = self._was_stopped = False
        self._status: tuple[bytes, Status] | None = None
        self._started = time.perf_counter()
        self._signs = heartbeat.Signs()
        try:
            self._open(shipment, tensors)
            self._process = self._start(num_threads, cores)
        except BaseException:
            self._release()
            raise
        self._poller = select.poll()
        self._poller.register(self._descriptors["to_engine"], select.POLLIN)
        self._poller.register(self._lifeline, select.POLLIN)
        weights = os.dup(self._descriptors["weights"])  # its own: this one may be closed before it is through
        self._copier = threading.Thread(target=self._send_weights, args=(tensors, weights), name="hf_pearl weights")
        self._copier.start()

    def _open(self, shipment: Shipment, tensors: list[torch.Tensor]) -> None:
        self._descriptors["shipment"] = anonymous_memory("hf_pearl_shipment", 0)
        self._descriptors["weights"] = anonymous_memory("hf_pearl_weights", shipment.num_bytes)
        self._descriptors["channel"] = anonymous_memory("hf_pearl_channel", Channel.NUM_BYTES)
        self._descriptors["distributions"] = anonymous_memory("hf_pearl_distributions", 0)
        self._descriptors["log"] = anonymous_memory("hf_pearl_log", 0)
        for name in ("to_worker", "to_engine"):
            self._descriptors[name] = event()
        self._shared = share_weights(shipment, tensors)
        with open(self._descriptors["shipment"], "wb", closefd=False) as file:
            pickle.dump((shipment, self._shared), file)
        os.lseek(self._descriptors["shipment"], 0, os.SEEK_SET)
        self.channel = Channel(self._descriptors["channel"])
        self._writer = RingWriter(self.channel.control, self.channel.ring)

    def _start(self, num_threads: int, cores: Sequence[int]) -> subprocess.Popen[bytes]:
        self._lifeline, other_end = socket_pair()
        names = ("shipment", "weights", "channel", "distributions", "to_worker", "to_engine")
        passed = [*(self._descriptors[name] for name in names), other_end.fileno()]
        arguments = [*Parent.here(), num_threads, *passed, ",".join(map(str, cores))]
        try:
            return start_module(
                "hf_pearl.parallel.workers.worker", arguments, passed, self._descriptors["log"], num_threads
            )
        except BaseException:
            self._lifeline.close()
            raise
        finally:
            other_end.close()

    def _send_weights(self, tensors: list[torch.Tensor], descriptor: int) -> None:
        try:
            copy_weights(self.shipment, tensors, descriptor, self._cancelled.is_set)
            if not self._cancelled.is_set():
                self._lifeline.send(b"w")
        except BrokenPipeError:
            pass  # It has ended, and its log says why.
        except OSError as error:
            if not self._cancelled.is_set():  # Else it is ending, and nobody asks.
                self.give_up(f"its weights could not be copied into shared memory: {error}")
                self._process.terminate()
        finally:
            os.close(descriptor)

    def replace_weights(self, tensors: list[torch.Tensor]) -> None:
        """Have new values in the old places; the worker must not be in a call."""
        self._copier.join()
        device_weights.settle(tensors)
        copy_weights(self.shipment, tensors, self._descriptors["weights"], self._cancelled.is_set)

    @property
    def is_alive(self) -> bool:
        """Whether it runs, gives signs of life, and belongs to this process (a forked copy of it does not)."""
        if self.channel is None or self._owner != os.getpid() or self._is_lost or self._failure:
            return False
        if self._process.poll() is not None:
            return False
        self._look_for_life(self.channel.control)
        return not self._failure

    def _look_for_life(self, control: memoryview) -> None:
        if not self.is_ready:
            if time.perf_counter() - self._started > START_SECONDS:
                self.give_up(f"it was not ready within {START_SECONDS:.0f} s")
            elif missing := self._signs.missing_at_start(self._process.pid):
                self._was_stopped = True
                self.give_up(missing)
        elif missing := self._signs.missing(control):
            self.give_up(missing)

    @property
    def is_silent(self) -> bool:
        """Whether it has missed some beats: soon it beats again, or is given up."""
        return self._signs.is_silent

    @property
    def is_ready(self) -> bool:
        """Whether it has built its model."""
        return self.channel is not None and self.channel.status.read() is not None

    @property
    def status(self) -> Status | None:
        """How far it is; None until it is ready."""
        content = None if self.channel is None else self.channel.status.read()
        if content is None:
            return None
        if self._status is None or self._status[0] is not content:
            try:
                self._status = content, decode_status(content)
            except MalformedRecordError as error:
                self.give_up(str(error))
                return None
        return self._status[1]

    @property
    def has_failed_by_itself(self) -> bool:
        """Whether it was given up, or has ended, without a signal from outside."""
        code = self._process.poll()
        return not self._was_stopped and (bool(self._failure) or (code is not None and code >= 0))

    @property
    def process_id(self) -> int:
        """The operating system's number of the process."""
        return self._process.pid

    @property
    def distributions(self) -> int | None:
        """The file of `SharedDistributions`; None after its end."""
        return self._descriptors.get("distributions")

    def why_it_ended(self) -> str:
        """What is known of its end."""
        if self._is_lost:
            self._reaped(0.2)  # It lets go of its descriptors a moment before it has an exit code.
        log, text = self._descriptors.get("log"), ""
        if log is not None:
            start = max(0, os.fstat(log).st_size - LOG_BYTES)
            text = os.pread(log, LOG_BYTES, start).decode(errors="replace").strip()
        code = self._process.poll()
        return "; ".join(part for part in (self._failure, "" if code is None else f"exit code {code}", text) if part)

    def give_up(self, reason: str) -> None:
        """Never use it again."""
        self._failure = self._failure or reason

    def put(self, message: Message) -> int:
        """Queue a message and send what can be sent; return its number."""
        number = self._writer.put(encode_message(message))
        self.flush()
        return number

    def withdraw(self, first: int) -> bool:
        """Take back the messages from number `first` on that have not been sent; whether that was all of them."""
        return self.channel is not None and self._writer.withdraw(first)

    def flush(self) -> None:
        """Send what waits, as far as the worker is ready and has room for it."""
        if self.channel is not None and not self._writer.is_empty and self.is_ready and self._writer.flush():
            os.eventfd_write(self._descriptors["to_worker"], 1)

    def wait(self, seconds: float) -> None:
        """Wait until the worker has done something, or has ended; `seconds` at most."""
        if self.channel is None:
            return
        for descriptor, _ in self._poller.poll(1000 * max(0.0, seconds)):
            if descriptor == self._descriptors["to_engine"]:
                with suppress(BlockingIOError):
                    os.eventfd_read(descriptor)
            else:
                self._is_lost = True  # Nothing is ever sent on the lifeline: it was closed.

    def end(self) -> None:
        """End it, by asking first, and give everything back; harmless to repeat."""
        if self.channel is None:
            return
        if self._owner == os.getpid():
            self._cancelled.set()
            self._end_process()
            if threading.current_thread() is not self._copier:  # Garbage is collected in any thread.
                self._copier.join()
        self._lifeline.close()
        self._release()

    def _end_process(self) -> None:
        if self._failure:  # It would not answer.
            self._process.kill()
        elif self.is_ready and self._process.poll() is None:
            with suppress(OSError):
                self.put(Quit())
                self._lifeline.shutdown(socket.SHUT_RDWR)
            if self._reaped():
                return
        for stop in (self._process.terminate, self._process.kill):
            stop()
            if self._reaped():
                return

    def _reaped(self, seconds: float = QUIT_SECONDS) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
            return True
        return False

    def _release(self) -> None:
        channel, self.channel = self.channel, None
        if channel is not None:
            channel.close()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        if self._owner == os.getpid():
            shared, self._shared = self._shared, []
            device_weights.release(shared)
