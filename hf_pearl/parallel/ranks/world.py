"""The ranks that `torchrun` or `accelerate launch` has started: who is who, and who speaks with whom.

The target's ranks come first, then the draft's. Every lane has a group of its own for sums, and one on CPUs for what
its first rank tells the others; a third kind joins the target's first rank with the draft's, and one joins all.
"""

from __future__ import annotations

import functools
import itertools
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from ...errors import PearlWorkerError
from ...interrupts import KeptInterrupts
from ..workers.records import MalformedRecordError
from .collectives import GroupCollectives, RankError
from .records import MAX_WORDS, Leave, Operation, decode_operations, encode_operations

ANSWER_SECONDS = 300.0  # until a rank that does not listen, or does not come to a sum, counts as lost


def in_world() -> bool:
    """Whether this process is one of several that a launcher has started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


class JoinedWorld:
    """The script's process group, or one that lasts from the first pair to the end of the last.

    The launcher's store keeps what ended groups have left in it, where their members were to be found among that: every
    group of ours has names of its own there, so that a script may launch one pair after the other.

    Attributes
    ----------
    num_pairs : int
        Of ours, which are open.
    """

    def __init__(self) -> None:
        self.num_pairs, self._is_ours, self._numbers = 0, False, itertools.count()

    def join(self, backend: str) -> None:
        """Before a pair is made; all ranks do so."""
        if not dist.is_initialized():
            store, rank, size = _meeting_place()
            own = dist.PrefixStore(f"hf_pearl/{next(self._numbers)}", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size)
            self._is_ours = True
        elif not self.num_pairs:  # of the script, or of accelerate
            self._is_ours = False
        self.num_pairs += 1

    def leave(self) -> None:
        """After a pair's end, once."""
        self.num_pairs -= 1
        if self._is_ours and not self.num_pairs and dist.is_initialized():
            self._is_ours = False
            dist.destroy_process_group()


joined_world = JoinedWorld()


@functools.cache
def _meeting_place() -> tuple[dist.Store, int, int]:
    """The store that the launcher's variables name, made once (without an agent, rank 0 serves it); rank, and size."""
    from torch.distributed.rendezvous import rendezvous  # Not every build of torch has it.

    found: tuple[dist.Store, int, int] = next(rendezvous("env://"))
    return found


def new_group(
    ranks: list[int] | None = None, backend: str | None = None, timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """torch's `new_group`; what it gives a process that is no member (a number) is only ever passed on."""
    return cast("dist.ProcessGroup", dist.new_group(ranks, timeout, backend))


class LaneGroups:
    """One lane's ranks, of which this process need not be one; made by all processes in the same order.

    Attributes
    ----------
    first : int
        The lane's first rank, in the world.
    is_member : bool
        Whether this process is one of them.
    """

    def __init__(self, lane: str, first: int, size: int) -> None:
        ranks = list(range(first, first + size))
        self.lane, self.first, self.size = lane, first, size
        sums = new_group(ranks, timeout=timedelta(seconds=ANSWER_SECONDS))
        self.words = new_group(ranks, backend="gloo")  # Its waits may be as long as a call is away.
        self.is_member = dist.get_rank() in ranks
        self.rank = dist.get_rank() - first
        self.collectives = GroupCollectives(sums, lane) if self.is_member else None

    def received_operations(self) -> Iterator[Operation]:
        """What the first rank says, until it leaves; raises `RankError` where it says nothing any more."""
        while True:
            try:
                words = broadcast_words(None, self.first, self.words)
            except RuntimeError as error:
                raise RankError(f"rank 0 of the {self.lane} lane does not speak: {error}") from error
            for operation in decode_operations(words):
                if isinstance(operation, Leave):
                    return
                yield operation


class WorldRanks:
    """`lane.Ranks` of a lane in the world. A launcher ends all ranks when one has ended: nothing is restarted."""

    def __init__(self, groups: LaneGroups, num_threads: int) -> None:
        assert groups.collectives is not None
        self.lane, self.size, self.collectives = groups.lane, groups.size, groups.collectives
        self.num_threads, self.num_here = num_threads, 1
        self._groups = groups
        self._failure = ""

    def ensure(self) -> bool:
        """They are there, or all is over."""
        if self._failure:
            raise PearlWorkerError(f"the ranks of the {self.lane} lane have failed, start all anew: {self._failure}")
        return False

    def together(self) -> AbstractContextManager[object]:
        """A scope that an interrupt does not end."""
        return KeptInterrupts()

    def send(self, operations: Sequence[Operation]) -> None:
        """Tell them; raises `RankError` where one cannot be told."""
        try:
            broadcast_words(encode_operations(operations), self._groups.first, self._groups.words)
        except RuntimeError as error:
            raise RankError(f"a rank of the {self.lane} lane does not listen: {error}") from error

    def leave(self) -> None:
        """Let them leave a call of `generate`, unless they were given up: one that stands still would not hear it."""
        if not self._failure:
            self.send([Leave()])

    def failed(self, error: BaseException) -> PearlWorkerError:
        """Give them up; say what is known of the reason."""
        self._failure = str(error)
        return PearlWorkerError(self._failure)

    def close(self) -> None:
        """Nothing to do: the launcher ends them."""


def broadcast_words(words: Sequence[int] | None, source: int, group: dist.ProcessGroup) -> array[int]:
    """Send words from the rank `source` of the world, which has some, to all others of a group, which have None."""
    count = torch.tensor([0 if words is None else len(words)], device="cpu")
    broadcast_tensor(count, source, group)
    content = torch.tensor(words if words is not None else [0] * _checked(count), dtype=torch.int64, device="cpu")
    if len(content):
        broadcast_tensor(content, source, group)
    return array("q", content.tolist())


def broadcast_tensor(tensor: torch.Tensor, source: int, group: dist.ProcessGroup) -> None:
    """Send a tensor from the rank `source` of the world into those of all others of a group."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = dist.get_group_rank(group, source), 0
    if dist.get_rank() == source:  # Who waits for it may do so for long; it is heard at once, or never.
        options.timeout = timedelta(seconds=ANSWER_SECONDS)
    group.broadcast([tensor], options).wait()


def send_words(words: Sequence[int], to: int, group: dist.ProcessGroup) -> None:
    """Send words to the rank `to` of the world; raises `RankError` where it does not hear them in time."""
    for content in ([len(words)], words):
        if len(content):
            tensor = torch.tensor(content, dtype=torch.int64, device="cpu")
            try:
                work = dist.isend(tensor, to, group)
                assert work is not None
                work.wait(timedelta(seconds=ANSWER_SECONDS))
            except RuntimeError as error:
                raise RankError(f"rank {to} does not listen: {error}") from error


def receive_words(source: int, group: dist.ProcessGroup) -> array[int]:
    """Wait for the next words of the rank `source` of the world; raises `RankError` where none can come any more."""
    count = torch.tensor([0], device="cpu")
    try:
        dist.recv(count, source, group)
        content = torch.zeros(_checked(count), dtype=torch.int64, device="cpu")
        if len(content):
            dist.recv(content, source, group)
    except RuntimeError as error:
        raise RankError(f"rank {source} does not speak: {error}") from error
    return array("q", content.tolist())


def _checked(count: torch.Tensor) -> int:
    num_words = int(count)
    if not 0 <= num_words <= MAX_WORDS:
        raise MalformedRecordError(f"a message of {num_words} words; the limit is {MAX_WORDS}")
    return num_words
