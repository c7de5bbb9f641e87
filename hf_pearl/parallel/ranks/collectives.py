"""Sums and concatenations over the ranks of a lane; every rank calls them in the same order, on equal shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from ...errors import PearlWorkerError


class RankError(PearlWorkerError):
    """A rank of a lane has ended, or does not answer."""


class Collectives(Protocol):
    """What a rank computes together with the others of its lane."""

    rank: int
    size: int
    num_done: int  # collectives since the lane began

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, with the same bits on every rank."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `(..., n)` side by side, in the order of ranks: `(..., size * n)`."""


class GroupCollectives:
    """Over a process group of torch.distributed, whose own timeout ends a wait.

    Parameters
    ----------
    group : ProcessGroup
        Has this process as a member.
    lane : str
        What errors name.
    """

    def __init__(self, group: dist.ProcessGroup, lane: str) -> None:
        self.rank, self.size, self.num_done = group.rank(), group.size(), 0
        self._group, self._lane = group, lane

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's tensor, with the same bits on every rank."""
        total = tensor.clone(memory_format=torch.contiguous_format)
        self._wait(lambda: self._group.allreduce([total]))
        return total

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `(..., n)` side by side, in the order of ranks: `(..., size * n)`."""
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._wait(lambda: self._group.allgather([parts], [tensor]))
        return torch.cat(parts, dim=-1)

    def _wait(self, start: Callable[[], dist.Work]) -> None:
        self.num_done += 1
        try:
            start().wait()
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of the {self._lane} lane, collective {self.num_done}: another rank has ended, or "
                f"did not answer in time: {error}"
            ) from error
