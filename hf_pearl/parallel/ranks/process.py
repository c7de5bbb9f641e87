"""A rank of a lane: `python -m hf_pearl.parallel.ranks.process`, started by `child_ranks.ChildRanks`.

It reads its part of the model and then follows the first rank, whose end ends it. Its descriptors are its arguments.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import traceback

import torch

from ..heartbeat import Pulse
from ..tensor_parallel import load_shard
from .follower import Follower
from .shared_collectives import SharedCollectives
from .wire import READY, RankStart, received_operations


def main() -> None:
    """Load, say that it is ready, follow. What ends it before its time goes to standard error, which is kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    start = RankStart.from_arguments(sys.argv[1:])
    for each in (start.line, *start.seat.descriptors):
        os.set_inheritable(each, False)
    torch.set_num_threads(start.model.num_threads)
    line = socket.socket(fileno=start.line)
    collectives = SharedCollectives(start.model.lane, start.rank, start.seat)
    pulse = Pulse(collectives.control(start.rank), start.line, start.parent)
    pulse.start()
    device = start.model.device_of(start.rank)
    if device.type == "cuda":  # Kernels are launched on the current one.
        torch.cuda.set_device(device)
    model = load_shard(
        start.model.name,
        start.rank,
        start.model.size,
        collectives.all_reduce,
        collectives.all_gather,
        dtype=start.model.torch_dtype,
        device=device,
    )
    gc.collect()
    gc.freeze()
    follower = Follower(model, collectives)
    pulse.progress = follower.progress
    line.sendall(READY)
    with torch.inference_mode():
        follower.follow(received_operations(line))


if __name__ == "__main__":
    # Taking an interpreter with torch down takes its time: longer than the first rank waits for the reason.
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
