"""A lane over several ranks: the first one leads, the others repeat what it does on their own shards and caches.

What the lane's cache finds, takes and evicts follows from the operations alone, so that every rank's block tables are
the same without being sent. The operations before a forward travel with it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...cache import PagedPrefixCache
from ...cache.backends import BACKENDS
from ...decoding.messages import Window
from ...errors import PearlOutOfBlocksError, PearlWorkerError
from ..lane import ModelLane
from .collectives import Collectives, RankError
from .follower import compare
from .records import Admit, Begin, End, Fork, Forward, Keep, Operation, Release, Rollback

logger = logging.get_logger(__name__)

_versions = itertools.count(1)
_leaders: weakref.WeakKeyDictionary[torch.nn.Module, Leader] = weakref.WeakKeyDictionary()


class Ranks(Protocol):
    """The other ranks of a lane, as the first one sees them."""

    lane: str
    size: int

    @property
    def collectives(self) -> Collectives:
        """What is computed with them."""

    def ensure(self) -> bool:
        """Have them all there; whether they had to be started anew, and know nothing."""

    def together(self) -> AbstractContextManager[object]:
        """A scope that an interrupt does not end."""

    def send(self, operations: Sequence[Operation]) -> None:
        """Tell them; raises `RankError` where one cannot be told."""

    def failed(self, error: BaseException) -> PearlWorkerError:
        """Give them up; say what is known of the reason."""

    def close(self) -> None:
        """End them; harmless to repeat."""


class Leader:
    """The first rank's end of a lane. Holds no model: the model's shard holds it, for its collectives.

    Attributes
    ----------
    compares : bool
        Whether every forward ends with a comparison of all ranks' tokens and block tables.
    held_version : int or None
        Of the cache that the other ranks hold; None where they hold none.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.compares = False
        self.held_version: int | None = None
        self.num_forwards = 0
        self._notes: list[Operation] = []
        self._is_inside = self._has_failed = False

    @property
    def size(self) -> int:
        """Ranks of the lane, this one included."""
        return self.ranks.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        self._check_inside()
        return self.ranks.collectives.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors, side by side in the last dimension."""
        self._check_inside()
        return self.ranks.collectives.all_gather(tensor)

    def _check_inside(self) -> None:
        if not self._is_inside:
            raise RuntimeError(
                f"this model is one of {self.size} parts, whose other ranks follow "
                "`generate(..., pearl=True)` only: it cannot be called by itself."
            )

    def assemble(self) -> None:
        """Have the other ranks there, started anew where they must be."""
        if self.ranks.ensure():
            self.held_version = None

    def note(self, operation: Operation) -> None:
        """Have the others do it before the next forward."""
        self._notes.append(operation)

    @contextmanager
    def call(self, begin: Begin) -> Iterator[None]:
        """A call that they follow; they must be there."""
        self._notes, self._has_failed = [begin], False
        try:
            yield
        finally:
            if not self._has_failed:
                self._notes.append(End())
                try:
                    self._send()
                except PearlWorkerError as error:  # The call has all it wanted; the next one starts them anew.
                    logger.warning(str(error))

    def _send(self) -> None:
        with self.ranks.together():
            notes, self._notes = self._notes, []
            try:
                self.ranks.send(notes)
            except RankError as error:
                raise self._failed(error) from error

    @contextmanager
    def forward(self, windows: Sequence[Window]) -> Iterator[None]:
        """A forward that they make at the same time; an interrupt waits for its end.

        Raises
        ------
        PearlWorkerError
            A rank has ended or does not answer. All are given up then, and started anew by the next call.
        """
        self.num_forwards += 1
        self._notes.append(Forward(tuple(windows)))
        with self.ranks.together():
            self._send()
            before, self._is_inside = self.ranks.collectives.num_done, True
            try:
                yield
            except RankError as error:
                raise self._failed(error) from error
            except BaseException as error:
                # Without blocks no rank has begun to compute; after anything else the others wait for this one.
                if not isinstance(error, PearlOutOfBlocksError) or self.ranks.collectives.num_done != before:
                    self._failed(error)
                raise
            finally:
                self._is_inside = False

    def _failed(self, error: BaseException) -> PearlWorkerError:
        self._notes, self._has_failed = [], True
        reason = self.ranks.failed(error)
        return PearlWorkerError(f"{self.ranks.lane} lane, forward {self.num_forwards}: {reason}")


class LeadingCache(PagedPrefixCache):
    """A cache whose `version` is new whenever it has forgotten everything."""

    version = 0

    def clear(self) -> None:
        """Forget every prefix."""
        super().clear()
        self.version = next(_versions)

    def start_anew(self) -> None:
        """Forget all sequences and prefixes."""
        super().start_anew()
        self.version = next(_versions)


class LeadingLane:
    """`ModelLane` on the first rank; whatever changes the cache or computes, the others do too."""

    def __init__(self, lane: ModelLane, leader: Leader) -> None:
        self._lane, self._leader = lane, leader
        self.model, self.cache = lane.model, lane.cache

    @property
    def device(self) -> torch.device:
        """Where the model expects its token ids."""
        return self._lane.device

    @property
    def num_warm_ups(self) -> int:
        """As of the lane on the first rank."""
        return self._lane.num_warm_ups

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The scope of all forwards of a call, on every rank."""
        cache = self.cache
        assert isinstance(cache, LeadingCache)
        self._leader.assemble()
        if cache.version != self._leader.held_version:  # They hold one cache: another engine's, or none, as it seems.
            cache.reset_pools()
        self._leader.held_version = cache.version
        begin = Begin(
            cache.version,
            cache.pool.num_blocks,
            cache.pool.max_blocks,
            cache.block_size,
            BACKENDS.index(cache.backend.name),
            cache.eight_bit,
            self._lane.prefix_cache,
            self._leader.compares,
            self._lane.cache_salt,
        )
        with self._leader.call(begin), self._lane.ready():
            yield

    def admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> int:
        """Begin a sequence; return how many of `token_ids` the cache already holds."""
        num_known = self._lane.admit(request_id, token_ids, max_length)
        self._leader.note(Admit(request_id, max_length, num_known, tuple(token_ids)))
        return num_known

    def fork(self, request_id: int, new_id: int, length: int) -> None:
        """Begin a sequence with the first `length` tokens of another, in the same memory."""
        self._lane.fork(request_id, new_id, length)
        self._leader.note(Fork(request_id, new_id, length))

    def length(self, request_id: int) -> int:
        """How many tokens of a sequence have keys and values."""
        return self._lane.length(request_id)

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute the new tokens of every window: `(sum of num_logits, vocab_size)`."""
        with self._leader.forward(windows):
            logits = self._lane.forward(windows)
            if self._leader.compares:
                compare(self._lane, windows, self._leader.ranks.collectives)
        return logits

    def rollback(self, request_id: int, length: int) -> None:
        """Drop a sequence's tokens from position `length` on."""
        self._lane.rollback(request_id, length)
        self._leader.note(Rollback(request_id, length))

    def keep(self, request_id: int, num_first: int, places: Sequence[int]) -> None:
        """Drop a sequence's tokens but the first ones and those at `places`, ascending, which move up."""
        self._lane.keep(request_id, num_first, places)
        self._leader.note(Keep(request_id, num_first, tuple(places)))

    def release(self, request_id: int, verified: Sequence[int]) -> None:
        """End a sequence; its `verified` tokens may be found again by later requests."""
        self._lane.release(request_id, verified)
        self._leader.note(Release(request_id, tuple(verified)))


Lane = ModelLane | LeadingLane


def lead(model: PreTrainedModel, leader: Leader) -> None:
    """Have every lane of `model`, a shard, lead the other ranks."""
    _leaders[model] = leader


def leader_of(model: torch.nn.Module) -> Leader | None:
    """The leader of a model's lanes; None of a model that is in one piece."""
    return _leaders.get(model)


def assemble_ranks(model: torch.nn.Module) -> None:
    """Have a model's other ranks there, started anew where they must be; takes as long as they take to start."""
    leader = leader_of(model)
    if leader is not None:
        leader.assemble()


def num_ranks(model: torch.nn.Module) -> int:
    """How many ranks compute a model's lanes."""
    leader = leader_of(model)
    return 1 if leader is None else leader.size


def new_cache(model: PreTrainedModel, *arguments: Any, **options: Any) -> PagedPrefixCache:
    """`PagedPrefixCache` of a model, whether it is in one piece or not."""
    kind = LeadingCache if leader_of(model) is not None else PagedPrefixCache
    return kind(model.config, *arguments, **options)


def new_lane(model: PreTrainedModel, cache: PagedPrefixCache, *arguments: Any) -> Lane:
    """`ModelLane` of a model, whether it is in one piece or not."""
    lane, leader = ModelLane(model, cache, *arguments), leader_of(model)
    return lane if leader is None else LeadingLane(lane, leader)
