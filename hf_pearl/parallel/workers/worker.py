"""The draft worker: `python -m hf_pearl.parallel.workers.worker`, started by `worker_process.WorkerProcess`.

It builds the draft model on the weights in shared memory, and then drafts for one call after the other. Its private
descriptors are its descriptors. It ends when it is told to, and when its parent ends.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
import traceback
from typing import NamedTuple, TextIO

import torch

from ...model_devices import input_device
from ..heartbeat import Pulse
from ..ranks.models import close_ranks
from . import records
from .child_process import Parent
from .draft_boxes import Inbox, Outbox, ToldToQuit
from .draft_server import DraftServer
from .records import Status
from .shared_memory import Channel
from .shipping import build


class Descriptors(NamedTuple):
    """What the worker inherits."""

    shipment: int
    weights: int
    channel: int
    distributions: int
    to_worker: int
    to_engine: int
    lifeline: int


def main() -> None:
    """Build the model, then serve. An error before the first call goes to standard error, which the parent reads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    *numbers, listed = sys.argv[1:]
    parent, death_signal, num_threads, *inherited = map(int, numbers)
    descriptors, cores = Descriptors(*inherited), [int(core) for core in listed.split(",") if core]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(num_threads)
    channel, lifeline = Channel(descriptors.channel), socket.socket(fileno=descriptors.lifeline)
    pulse = Pulse(channel.control, descriptors.lifeline, Parent(parent, death_signal))
    pulse.start()
    with open(descriptors.shipment, "rb") as file:
        shipment, shared = pickle.load(file)
    model = build(shipment, descriptors.weights, shared)
    device = input_device(model)
    if device.type == "cuda":  # Kernels are launched on the current one.
        torch.cuda.set_device(device)
    if not lifeline.recv(1):  # The weights are there; or the parent has gone.
        return
    gc.collect()
    gc.freeze()
    log = _silence()
    try:

        def wake() -> None:
            os.eventfd_write(descriptors.to_engine, 1)

        inbox = Inbox(channel, descriptors.to_worker)
        server = DraftServer(model, inbox, lambda call: Outbox(channel, wake, call), descriptors.distributions)
        pulse.progress = server.progress
        channel.status.write(records.encode_status(Status(0, True, 0, 0, 0, 0, 0.0)))
        wake()
        with torch.inference_mode():
            server.serve()
    except ToldToQuit:
        return
    except BaseException:
        traceback.print_exc(file=log)
        log.flush()
        raise SystemExit(1) from None
    finally:
        close_ranks(model)


def _silence() -> TextIO:
    """Keep standard error, where the parent reads what ended the worker, for that; all else goes nowhere."""
    log = os.fdopen(os.dup(2), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    faulthandler.enable(log)
    return log


if __name__ == "__main__":
    # Nothing is left to be written, and taking an interpreter with torch down takes its time; and what it has mapped of
    # its parent's memory must not be counted off twice (`device_weights`).
    try:
        main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
