"""The ranks of a tensor-parallel group as threads of one process, in step with each other."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from hf_pearl.parallel.tensor_parallel import shard

PATIENCE = 60.0  # seconds that a rank waits for the others
Result = TypeVar("Result")


class Ranks:
    """`size` ranks. They sum in one order, so that all get the same bits; one that fails ends the others' waiting."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: list[torch.Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=PATIENCE)

    def _share(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._held[rank] = tensor
        self._barrier.wait()
        held = [each for each in self._held if each is not None]
        self._barrier.wait()
        return held

    def all_reduce(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The sum over the ranks, as `rank` calls it."""
        return lambda tensor: torch.stack(self._share(rank, tensor)).sum(dim=0)

    def all_gather(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The ranks' tensors, joined along the last dimension, as `rank` calls it."""
        return lambda tensor: torch.cat(self._share(rank, tensor), dim=-1)

    def parts(self, model: PreTrainedModel) -> list[PreTrainedModel]:
        """Every rank's part of a copy of `model`."""
        return [self.part(copy.deepcopy(model), rank) for rank in range(self.size)]

    def part(self, model: PreTrainedModel, rank: int) -> PreTrainedModel:
        """`model` itself, cut."""
        return shard(model, rank, self.size, self.all_reduce(rank), self.all_gather(rank))

    def run(self, work: Callable[[int], Result]) -> list[Result]:
        """What `work(rank)` returns on every rank."""

        def guarded(rank: int) -> Result:
            try:
                with torch.no_grad():
                    return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.size)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        for error in sorted(errors, key=lambda each: isinstance(each, threading.BrokenBarrierError)):
            self._barrier.reset()
            raise error
        return [future.result() for future in futures]
