"""A rank of a lane: `python -m hf_pearl.parallel.rank_process`, started by `child_ranks.ChildRanks`.

It reads its part of the model and then follows the first rank, whose end ends it. Its descriptors are its arguments.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import select
import signal
import socket
import sys
import threading

import torch

from .heartbeat import LOOK_SECONDS
from .rank_follower import Follower
from .rank_wire import READY, RankStart, received_operations
from .shared_collectives import SharedCollectives
from .tensor_parallel import load_shard


def _end_with(line: socket.socket, parent: int) -> None:
    """End this process, whatever it does, when the first rank has closed its end of the line, or ended.

    A forked copy of the first rank may hold that end open for longer.
    """
    poller = select.poll()
    poller.register(line, select.POLLRDHUP)
    while os.getppid() == parent and not poller.poll(1000 * LOOK_SECONDS):
        pass
    os._exit(0)


def main() -> None:
    """Load, say that it is ready, follow. What ends it before its time goes to standard error, which is kept."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    start = RankStart.from_arguments(sys.argv[1:])
    for each in (start.line, *start.seat.descriptors):
        os.set_inheritable(each, False)
    torch.set_num_threads(start.model.num_threads)
    line = socket.socket(fileno=start.line)
    threading.Thread(target=_end_with, args=(line, start.parent), daemon=True).start()
    collectives = SharedCollectives(start.model.lane, start.rank, start.seat)
    model = load_shard(
        start.model.name,
        start.rank,
        start.model.size,
        collectives.all_reduce,
        collectives.all_gather,
        dtype=start.model.torch_dtype,
    )
    gc.collect()
    gc.freeze()
    line.sendall(READY)
    with torch.inference_mode():
        Follower(model, collectives).follow(received_operations(line))


if __name__ == "__main__":
    main()
    os._exit(0)  # Nothing is left to be written, and taking an interpreter with torch down takes its time.
