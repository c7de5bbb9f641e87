"""A pair of models over the ranks that `torchrun` or `accelerate launch` has started, all of which run the script."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.utils import logging

from ..device_arguments import present
from ..enabling import GenerateWithPearl
from ..errors import PearlWorkerError
from ..pair import load_model
from ..parallel.cores import leaving_cores
from ..parallel.ranks.follower import Follower
from ..parallel.ranks.lane import lead
from ..parallel.ranks.leader import Leader
from ..parallel.ranks.linked_draft import LinkedDraft
from ..parallel.ranks.linked_server import LinkedServer
from ..parallel.ranks.models import link, stand_in
from ..parallel.ranks.shared_output import Audience, receive_output, share_error, share_output
from ..parallel.ranks.wire import RankModel
from ..parallel.ranks.world import LaneGroups, WorldRanks, joined_world, new_group
from ..parallel.tensor_parallel import load_shard
from .launched_pair import LaunchedPair

logger = logging.get_logger(__name__)


class WorldPair(LaunchedPair):
    """The pair on one rank. Every rank calls `generate` with the same arguments, and gets the same output.

    Rank 0 decodes, streams, and knows the statistics. On the others `target` and `draft` are what the rank holds of
    them; `target.generate`, which pipelines call, is the pair's everywhere.
    """

    def __init__(self, target: RankModel, draft: RankModel | None, device: torch.device) -> None:
        self._device, self._num_threads = _own_device(device), target.num_threads
        if self._device.type == "cuda":  # NCCL and whoever says "cuda" mean the current one.
            torch.cuda.set_device(self._device)
        self._owner = os.getpid()
        joined_world.join("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        self._is_joined = True
        self._link: LinkedDraft | None = None
        self._serve: Callable[[], None] = lambda: None
        self._leave: Callable[[], None] = lambda: None
        self._pair: Audience | None = None  # rank 0 and the draft's first
        self._lanes: list[Audience] = []  # those that this rank is in
        # Collective: every rank makes every group, in this order.
        everyone = new_group(backend="gloo")
        target_groups = LaneGroups("target", 0, target.size)
        lanes, pair_group = [target_groups], None
        if draft is not None:
            lanes.append(LaneGroups("draft", target.size, draft.size))
            pair_group = new_group([0, target.size], backend="gloo")
            if dist.get_rank() in (0, target.size):
                self._pair = Audience(pair_group, 0)
        for groups in lanes:
            if groups.is_member and groups.size > 1:
                self._lanes.append(Audience(groups.words, groups.first))
        held_target, held_draft = self._hold(target, target_groups), None
        if draft is not None and pair_group is not None:
            held_draft = self._hold(draft, lanes[1])
            if dist.get_rank() == 0:
                self._link = LinkedDraft(pair_group, target.size)
                link(held_draft, self._link)
            elif dist.get_rank() == target.size:
                self._serve = LinkedServer(held_draft, pair_group, 0).serve
        dist.barrier(everyone)  # Nobody generates before all have loaded.
        super().__init__(held_target, held_draft)
        self._decode = self.target.generate
        self.target.generate = GenerateWithPearl(self.generate)  # Pipelines call the model's.

    def _hold(self, model: RankModel, groups: LaneGroups) -> PreTrainedModel:
        """What this rank has of a model: all, a part, or none of it."""
        device, dtype = self._device, model.torch_dtype
        collectives = groups.collectives
        if collectives is None:
            return stand_in(model, self._device)
        if model.size == 1:
            return load_model(model.name, device, dtype)
        if groups.rank > 0:
            sums = collectives.all_reduce, collectives.all_gather
            part = load_shard(model.name, groups.rank, model.size, *sums, dtype=dtype, device=device)
            follower = Follower(part, collectives)
            self._serve = lambda: follower.follow(groups.received_operations())
            return part
        ranks = WorldRanks(groups, model.num_threads)
        leader = Leader(ranks)
        part = load_shard(model.name, 0, model.size, leader.all_reduce, leader.all_gather, dtype=dtype, device=device)
        lead(part, leader)
        self._leave = ranks.leave
        return part

    def _check_open(self) -> None:
        super()._check_open()
        if self._owner != os.getpid():
            raise PearlWorkerError(
                f"this pair belongs to process {self._owner}, of which this one is a fork: a fork is no rank. Call "
                "`generate` there."
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`target.generate` on every rank; all call it with the same arguments, and get rank 0's output.

        A draft that stands still is given up in time, with a warning.

        Raises
        ------
        PearlWorkerError
            On ranks other than 0: `generate` failed on rank 0, or that has given this draft up. A rank that ends is the
            launcher's affair, who ends all. Or the pair has been closed, or belongs to the process that this was forked
            from.
        """
        self._check_open()
        if dist.get_rank() != 0:
            with leaving_cores(self._num_threads):
                self._serve()
            self._leave()
            hears = [*([self._pair] if self._pair is not None else []), *self._lanes]
            return receive_output(*hears)
        try:
            output = self._lead(*args, **kwargs)
        except PearlWorkerError:  # Not all are there to be told, and each notices it.
            raise
        except BaseException as error:
            self._tell(functools.partial(share_error, error))
            raise
        self._tell(functools.partial(share_output, output))
        return output

    def _tell(self, share: Callable[[Audience], None]) -> None:
        """Tell the target's other ranks, and the draft's first, if it has not been given up."""
        for lane in self._lanes:
            share(lane)
        if self._pair is not None and self._link is not None and not self._link.is_cut:
            try:
                share(self._pair)
            except RuntimeError as error:
                self._link.cut(f"the draft's first rank does not hear the output: {error}")
                logger.warning(self._link.why_it_ended())

    def _lead(self, *args: Any, **kwargs: Any) -> Any:
        if self._link is not None:
            self._link.open()
        try:
            return self._decode(*args, **kwargs)
        finally:
            self._leave()
            if self._link is not None:
                self._link.close()

    def close(self) -> None:
        """Give everything back; all ranks call it. With the last pair ends a process group that `launch` has begun.

        A target in one piece is an ordinary model then, on rank 0. In a fork of a rank there is nothing to give back.
        """
        if self._owner != os.getpid():
            return
        super().close()
        if self._link is not None:
            self._link.end()
        if self._is_joined:
            self._is_joined = False
            joined_world.leave()


def _own_device(device: torch.device) -> torch.device:
    """This rank's device: of CUDA devices without a number, the one that the launcher counts for it."""
    if str(device) != "cuda":
        return device
    return present("device", (torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))),))[0]
