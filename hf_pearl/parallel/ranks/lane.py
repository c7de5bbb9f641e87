"""A lane over several ranks: the first one leads, the others repeat what it does on their own shards and caches.

What the lane's cache finds, takes and evicts follows from the operations alone, so that every rank's block tables are
the same without being sent. The operations before a forward travel with it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ...cache import PagedPrefixCache
from ...cache.backends import BACKENDS
from ...decoding.messages import Window
from ...errors import PearlWorkerError
from ...fingerprint import Fingerprint, fingerprint
from ...forks import in_forked_children
from ..lane import ModelLane
from .follower import compare
from .leader import Leader
from .records import Admit, Begin, Fork, Keep, Release, Rollback

_versions = itertools.count(1)
_leaders: weakref.WeakKeyDictionary[torch.nn.Module, Leader] = weakref.WeakKeyDictionary()
_loaded: weakref.WeakKeyDictionary[torch.nn.Module, Fingerprint] = weakref.WeakKeyDictionary()


def _in_forked_child() -> None:
    for leader in _leaders.values():
        leader.begin_anew()


in_forked_children(_in_forked_child)


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


def lead(model: PreTrainedModel, leader: Leader, runs_alone: bool = False) -> None:
    """Have every lane of `model`, a shard, lead the other ranks.

    `runs_alone`: the others run no script of the user, and hear of no change that it makes to `model`.
    """
    _leaders[model] = leader
    loaded = fingerprint(model) if runs_alone else None
    if loaded is not None and fingerprint(model) == loaded:  # Not so of weights that were loaded in inference mode.
        _loaded[model] = loaded


def leader_of(model: torch.nn.Module) -> Leader | None:
    """The leader of a model's lanes; None of a model that is in one piece."""
    return _leaders.get(model)


@contextmanager
def turns(*models: torch.nn.Module | None) -> Iterator[None]:
    """The scope of a call, which has the other ranks of its models to itself: other engines may lead them, too.

    Raises
    ------
    ValueError
        Target and draft are one model over several ranks, which follow one lane.
    """
    found = [leader for model in models if model is not None and (leader := leader_of(model)) is not None]
    if len(set(found)) < len(found):
        raise ValueError(
            f"`assistant_model` is the target itself, which lies on {found[0].size} ranks, which follow one lane at a "
            "time. Leave it out (`assistant_model=None` decodes without a draft), or `launch` the same files as the "
            "draft, too."
        )
    with ExitStack() as stack:
        for leader in sorted(found, key=id):  # In one order, so that nobody waits for a waiting one.
            stack.enter_context(leader.turn())
        yield


def assemble_ranks(model: torch.nn.Module, now: Fingerprint) -> None:
    """Have a model's other ranks there, started anew where they must be; takes as long as they take to start.

    Parameters
    ----------
    now : Fingerprint
        The model's.

    Raises
    ------
    PearlWorkerError
        They cannot be started, or would compute with other weights than this rank.
    """
    leader, loaded = leader_of(model), _loaded.get(model)
    if loaded is not None and now != loaded:
        raise PearlWorkerError(
            f"`{type(model).__name__}` is one of several parts of a launched model, and has changed since (weights, "
            "dtype, hooks, or autocast), of which the other ranks know nothing. Change the whole model, "
            "`save_pretrained` it, and `launch` that."
        )
    if leader is not None:
        leader.assemble()


def num_ranks(model: torch.nn.Module) -> int:
    """How many ranks compute a model's lanes."""
    leader = leader_of(model)
    return 1 if leader is None else leader.size


def num_ranks_here(model: torch.nn.Module) -> int:
    """How many ranks of a model keep their caches in one memory."""
    leader = leader_of(model)
    return 1 if leader is None else leader.ranks.num_here


def num_threads(model: torch.nn.Module) -> int | None:
    """How many threads every rank of a model takes; None of a model that is in one piece."""
    leader = leader_of(model)
    return None if leader is None else leader.ranks.num_threads


def new_cache(model: PreTrainedModel, *arguments: Any, **options: Any) -> PagedPrefixCache:
    """`PagedPrefixCache` of a model, whether it is in one piece or not."""
    kind = LeadingCache if leader_of(model) is not None else PagedPrefixCache
    return kind(model.config, *arguments, **options)


def new_lane(model: PreTrainedModel, cache: PagedPrefixCache, *arguments: Any) -> Lane:
    """`ModelLane` of a model, whether it is in one piece or not."""
    lane, leader = ModelLane(model, cache, *arguments), leader_of(model)
    return lane if leader is None else LeadingLane(lane, leader)
