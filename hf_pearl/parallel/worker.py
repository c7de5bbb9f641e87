"""The draft worker: `python -m hf_pearl.parallel.worker`, started by `worker_process.WorkerProcess`.

It builds the draft model on the weights in shared memory, and then drafts for one call after the other. Its private
descriptors are its arguments. It ends when it is told to, and when its parent ends.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, TextIO

import torch
from transformers import PreTrainedModel

from ..cache import PagedPrefixCache
from ..decoding.calibration import Calibration
from ..decoding.drafting import Drafter
from ..decoding.messages import Admission, Grant, Removal, Rest, TokenTree, Verdict
from ..decoding.proposal import Proposer
from . import records
from .draft_loop import EndOfCall, run_draft_loop
from .heartbeat import LOOK_SECONDS, Pulse
from .lane import ModelLane
from .processor_specs import decode_processors
from .records import BeginCall, Clear, EndCall, Message, Quit, Status
from .shared_distributions import SharedDistributions
from .shared_memory import ERROR_BYTES, NUM_SLOTS, TIMELINE_LENGTH, Channel, RingReader
from .shipping import build


class Arguments(NamedTuple):
    """What the worker is started with: the parent's process id, and descriptors."""

    parent: int
    shipment: int
    weights: int
    channel: int
    distributions: int
    to_worker: int
    to_engine: int
    lifeline: int


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


class Outbox:
    """Lines, progress and errors of one call, into the shared memory."""

    def __init__(self, channel: Channel, to_engine: int, call: int) -> None:
        self._channel, self._to_engine, self.call = channel, to_engine, call
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
        os.eventfd_write(self._to_engine, 1)

    def fail(self, text: str) -> None:
        """Tell what went wrong in the call, and that it is over."""
        content = text.encode(errors="replace")[-(ERROR_BYTES - 8) :]
        self._channel.error.write(struct.pack("<q", self.call) + content)
        self._channel.status.write(records.encode_status(Status(self.call, True, 0, 0, 0, 0, 0.0)))
        os.eventfd_write(self._to_engine, 1)


class DraftServer:
    """The draft model with its cache and its calibration, which live from call to call."""

    def __init__(self, model: PreTrainedModel, channel: Channel, inbox: Inbox, arguments: Arguments) -> None:
        self.model, self.channel, self.inbox, self.arguments = model, channel, inbox, arguments
        self.calibration = Calibration()
        self.cache: PagedPrefixCache | None = None

    def progress(self) -> int:
        """Layers computed, and looks for a message."""
        cache = self.cache
        return self.inbox.num_looks + (0 if cache is None else cache.statistics.computed_layers)

    def serve(self) -> None:
        """Serve calls until told to quit."""
        while True:
            message = self.inbox.message(block=True)
            if isinstance(message, Quit):
                return
            if isinstance(message, Clear) and self.cache is not None:
                self.cache.reset_pools()
            elif isinstance(message, BeginCall):
                self._serve_call(message)
            # Anything else belongs to a call that has failed here, and whose end the engine has not seen yet.

    def _serve_call(self, begin: BeginCall) -> None:
        outbox = Outbox(self.channel, self.arguments.to_engine, begin.number)
        options, distributions = begin.options, None
        if options.keeps_distributions:
            distributions = SharedDistributions(
                self.arguments.distributions, begin.number, options.vocab_size, options.max_line
            )
        try:
            self._draft(options, distributions, outbox)
        except (ToldToQuit, records.MalformedRecordError):
            raise
        except Exception:
            self.cache = None  # Whatever failed may have left its books half written.
            outbox.fail(traceback.format_exc())
        finally:
            if distributions is not None:
                distributions.clear()

    def _draft(self, options: records.CallOptions, distributions: SharedDistributions | None, outbox: Outbox) -> None:
        lane = ModelLane(self.model, self._cache_for(options), options.prefix_cache, options.cache_salt)
        processors = decode_processors(options.processors)
        proposer = Proposer(options.vocab_size, processors, options.pad_token_id, distributions)
        # How often guesses stand that were drawn apart says nothing of those that share the target's noise.
        calibration = self.calibration if distributions is None else Calibration()
        drafter = Drafter(lane, proposer, calibration, options.max_line, options.free_running, options.max_width)
        with lane.ready():
            outbox.publish(drafter, [])
            run_draft_loop(drafter, self.inbox, lambda trees: outbox.publish(drafter, trees), options.free_running)
            outbox.publish(drafter, [], is_finished=True)

    def _cache_for(self, options: records.CallOptions) -> PagedPrefixCache:
        made_for = options.num_blocks, options.eight_bit_cache
        if self.cache is None or (self.cache.pool.max_blocks, self.cache.eight_bit) != made_for:
            self.cache = PagedPrefixCache(self.model.config, options.num_blocks, eight_bit=options.eight_bit_cache)
        return self.cache


def main() -> None:
    """Build the model, then serve. An error before the first call goes to standard error, which the parent reads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    num_descriptors = len(Arguments._fields)
    arguments = Arguments(*map(int, sys.argv[1 : 1 + num_descriptors]))
    more = sys.argv[1 + num_descriptors :]
    num_threads, cores = int(more[0]), [int(core) for core in more[1].split(",") if core]
    for descriptor in arguments[1:]:
        os.set_inheritable(descriptor, False)
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(num_threads)
    channel, lifeline = Channel(arguments.channel), socket.socket(fileno=arguments.lifeline)
    pulse = Pulse(channel.control, arguments.lifeline, arguments.parent)
    pulse.start()
    with open(arguments.shipment, "rb") as file:
        shipment = pickle.load(file)
    model = build(shipment, arguments.weights)
    if not lifeline.recv(1):  # The weights are there; or the parent has gone.
        return
    gc.collect()
    gc.freeze()
    log = _silence()
    try:
        server = DraftServer(model, channel, Inbox(channel, arguments.to_worker), arguments)
        pulse.progress = server.progress
        channel.status.write(records.encode_status(Status(0, True, 0, 0, 0, 0, 0.0)))
        os.eventfd_write(arguments.to_engine, 1)
        with torch.inference_mode():
            server.serve()
    except ToldToQuit:
        return
    except BaseException:
        traceback.print_exc(file=log)
        log.flush()
        raise SystemExit(1) from None


def _silence() -> TextIO:
    """Keep standard error, where the parent reads what ended the worker, for that; all else goes nowhere."""
    log = os.fdopen(os.dup(2), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    faulthandler.enable(log)
    return log


if __name__ == "__main__":
    main()
    os._exit(0)  # Nothing is left to be written, and taking an interpreter with torch down takes its time.
