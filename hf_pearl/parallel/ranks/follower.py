"""What the ranks of a lane but the first do: repeat what that does, on their own shards and caches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from ...cache import PagedPrefixCache
from ...cache.backends import BACKENDS
from ...cache.block_pool import BlockPool
from ...decoding.messages import Window
from ...errors import PearlOutOfBlocksError, PearlWorkerError
from ...model_devices import input_device
from ..lane import ModelLane
from .collectives import Collectives
from .records import Admit, Begin, End, Fork, Forward, Keep, Operation, Release, Rollback


class Follower:
    """One rank's part of a model, with its cache, which lives from call to call."""

    def __init__(self, model: PreTrainedModel, collectives: Collectives) -> None:
        self._model, self._collectives = model, collectives
        self._cache: PagedPrefixCache | None = None
        self._version = 0

    def progress(self) -> int:
        """Layers computed, and collectives."""
        cache = self._cache
        return self._collectives.num_done + (0 if cache is None else cache.statistics.computed_layers)

    def follow(self, operations: Iterator[Operation]) -> None:
        """Repeat what the first rank does until `operations`, which wait for it, end.

        Raises
        ------
        PearlWorkerError
            This rank has come to another result than the first one.
        """
        for begin in operations:
            assert isinstance(begin, Begin), begin
            if self._cache is None or begin.version != self._version:
                self._cache, self._version = _cache(self._model, begin), begin.version
            self._cache.backend.use(BACKENDS[begin.backend])
            lane = ModelLane(self._model, self._cache, begin.prefix_cache, begin.salt)
            with lane.ready():
                for operation in itertools.takewhile(lambda each: not isinstance(each, End), operations):
                    _repeat(lane, operation, begin.compares, self._collectives)


def _cache(model: PreTrainedModel, begin: Begin) -> PagedPrefixCache:
    device = input_device(model)
    cache = PagedPrefixCache(model.config, begin.max_blocks, begin.block_size, begin.eight_bit, device)
    cache.pool = BlockPool(begin.num_blocks, begin.max_blocks)  # The first rank's may have grown already.
    return cache


def _repeat(lane: ModelLane, operation: Operation, compares: bool, collectives: Collectives) -> None:
    if isinstance(operation, Forward):
        before = collectives.num_done
        try:
            lane.forward(operation.windows)
        except PearlOutOfBlocksError:  # So it is on every rank, before anything was computed.
            if collectives.num_done != before:
                raise
        else:
            if compares:
                compare(lane, operation.windows, collectives)
    elif isinstance(operation, Admit):
        num_known = lane.admit(operation.request_id, operation.token_ids, operation.max_length)
        if num_known != operation.num_known:
            raise PearlWorkerError(
                f"rank {collectives.rank} knew {num_known} tokens of a prompt, rank 0 {operation.num_known}"
            )
    elif isinstance(operation, Fork):
        lane.fork(*operation)
    elif isinstance(operation, Rollback):
        lane.rollback(*operation)
    elif isinstance(operation, Keep):
        lane.keep(*operation)
    else:
        assert isinstance(operation, Release), operation
        lane.release(*operation)


def compare(lane: ModelLane, windows: Sequence[Window], collectives: Collectives) -> None:
    """Raise `PearlWorkerError` unless all ranks have the same new tokens and block tables."""
    tables = {request_id: (each.length, each.block_table) for request_id, each in lane.sequences.items()}
    text = repr((list(windows), sorted(tables.items()))).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)
    digests = collectives.all_gather(torch.tensor([digest], device=lane.device)).tolist()
    if len(set(digests)) > 1:
        raise PearlWorkerError(f"the ranks of a lane disagree on tokens or block tables: digests {digests}")
