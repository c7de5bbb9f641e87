"""A lane over several ranks computes what one rank computes, and every rank keeps the same books."""

from __future__ import annotations

import copy
import gc
import os
import queue
import random
import socket
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB_SIZE, enabled_for_tiny_models, tiny_model

from hf_pearl.cache import PagedPrefixCache
from hf_pearl.cache.block_pool import BlockPool
from hf_pearl.decoding.messages import Branches, Window
from hf_pearl.errors import PearlOutOfBlocksError, PearlWorkerError
from hf_pearl.interrupts import KeptInterrupts
from hf_pearl.parallel.lane import ModelLane
from hf_pearl.parallel.ranks import draft_frames, shared_collectives
from hf_pearl.parallel.ranks.collectives import RankError
from hf_pearl.parallel.ranks.follower import Follower
from hf_pearl.parallel.ranks.lane import LeadingLane, lead, new_cache, new_lane, turns
from hf_pearl.parallel.ranks.leader import Leader
from hf_pearl.parallel.ranks.linked_draft import LinkedDraft
from hf_pearl.parallel.ranks.records import (
    Admit,
    Begin,
    End,
    Fork,
    Forward,
    Keep,
    Leave,
    Operation,
    Release,
    Rollback,
    decode_operations,
    encode_operations,
)
from hf_pearl.parallel.ranks.shared_collectives import SharedCollectives, Table
from hf_pearl.parallel.tensor_parallel import shard
from hf_pearl.parallel.workers import records
from hf_pearl.parallel.workers.records import MalformedRecordError

pytestmark = pytest.mark.skipif(not shared_collectives.HAS_EVENTS, reason="ranks need Linux (memfd, eventfd)")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def on_ranks(
    size: int, act: Callable[[SharedCollectives], Any], on_wait: Callable[[int], None] = lambda rank: None
) -> list[Any]:
    """What `act` returns on every rank; each runs in a thread. The first error is raised."""
    table, results = Table(size), [None] * size
    ends = [SharedCollectives("target", rank, table.seat(rank), on_wait=on_wait) for rank in range(size)]
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = act(ends[rank])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for end in ends:
        end.close()
    table.close()
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_sums_and_concatenations_are_those_of_torch(
    size: int, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_collectives, "SLOT_BYTES", 256)  # Most tensors need several exchanges.
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1,), (3, 5), (2, 7, 11), (40, 4), (1, 0, 3), (16, 32)]
    given_tensors = [[(8 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes] for _ in range(size)]

    def act(collectives: SharedCollectives) -> list[tuple[torch.Tensor, torch.Tensor]]:
        own = given_tensors[collectives.rank]
        return [(collectives.all_reduce(tensor), collectives.all_gather(tensor)) for tensor in own]

    by_rank = on_ranks(size, act)
    for place, shape in enumerate(shapes):
        tensors = [of_rank[place] for of_rank in given_tensors]
        total = tensors[0].clone()
        for tensor in tensors[1:]:
            total += tensor
        for results in by_rank:
            assert torch.equal(results[place][0], total), shape
            assert torch.equal(results[place][1], torch.cat(tensors, dim=-1)), shape


def test_who_waits_may_give_up_a_rank_that_does_not_come() -> None:
    def give_up(rank: int) -> None:
        raise RankError(f"rank {rank} does not come")

    with pytest.raises(RankError, match="rank 2 does not come"):
        on_ranks(3, lambda collectives: collectives.rank == 2 or collectives.all_reduce(torch.ones(1)), give_up)


def test_a_rank_that_has_ended_is_named() -> None:
    table = Table(2)
    line, other_end = socket.socketpair()
    collectives = SharedCollectives("draft", 0, table.seat(0), {1: line.fileno()})
    other_end.close()
    with pytest.raises(RankError, match="rank 1 of the draft lane has ended"):
        collectives.all_gather(torch.ones(1))
    collectives.close()
    table.close()
    line.close()


class ThreadRanks:
    """Ranks in threads of this process, whose shards hold what theirs would; `messages` were all sent."""

    lane, num_threads, num_here = "target", 1, 1

    def __init__(self, size: int) -> None:
        self.size = size
        self._table = Table(size)
        self.ends = [SharedCollectives(self.lane, rank, self._table.seat(rank)) for rank in range(size)]
        self.collectives = self.ends[0]
        self._queues: list[queue.SimpleQueue[array[int]]] = [queue.SimpleQueue() for _ in range(1, size)]
        self.errors: list[BaseException] = []
        self.followers: list[Follower] = []
        self._threads: list[threading.Thread] = []

    def start(self, parts: Sequence[Any]) -> None:
        for rank, part in enumerate(parts[1:], start=1):
            self.followers.append(Follower(part, self.ends[rank]))
            self._threads.append(threading.Thread(target=self._follow, args=(rank,)))
            self._threads[-1].start()

    def _follow(self, rank: int) -> None:
        try:
            self.followers[rank - 1].follow(self._received(self._queues[rank - 1]))
        except BaseException as error:
            self.errors.append(error)

    @staticmethod
    def _received(words: queue.SimpleQueue[array[int]]) -> Iterator[Operation]:
        while True:
            for operation in decode_operations(words.get()):
                if isinstance(operation, Leave):
                    return
                yield operation

    def ensure(self) -> bool:
        return False

    def together(self) -> AbstractContextManager[object]:
        return KeptInterrupts()

    def send(self, operations: Sequence[Operation]) -> None:
        for each in self._queues:
            each.put(encode_operations(operations))

    def failed(self, error: BaseException) -> PearlWorkerError:
        return PearlWorkerError(str(error))

    def close(self) -> None:
        self.send([Leave()])
        for thread in self._threads:
            thread.join()
        for end in self.ends:
            end.close()
        self._table.close()


def over_ranks(model: Any, size: int) -> tuple[Any, ThreadRanks]:
    """The first part of a model over ranks in threads, with every forward compared."""
    ranks = ThreadRanks(size)
    leader = Leader(ranks)
    leader.compares = True
    parts = [copy.deepcopy(model) for _ in range(size)]
    shard(parts[0], 0, size, leader.all_reduce, leader.all_gather)
    for rank in range(1, size):
        shard(parts[rank], rank, size, ranks.ends[rank].all_reduce, ranks.ends[rank].all_gather)
    lead(parts[0], leader)
    ranks.start(parts)
    return parts[0], ranks


def random_call(chance: random.Random, lanes: Sequence[Any], num_steps: int) -> int:
    """Do the same random things on all lanes; their logits are compared. Return how often blocks ran out."""
    texts: dict[int, list[int]] = {}
    num_failed, next_id = 0, 0
    for _ in range(num_steps):
        kind = chance.choice(("admit", "forward", "forward", "forward", "tree", "fork", "rollback", "release"))
        if kind == "admit" and len(texts) < 5:
            prompt = [1, 2, 3, *(chance.randrange(VOCAB_SIZE) for _ in range(chance.randrange(1, 40)))]
            known = {lane.admit(next_id, prompt, 80) for lane in lanes}
            assert len(known) == 1
            texts[next_id], next_id = prompt, next_id + 1
        elif kind == "forward" and texts:
            num_failed += not forward(chance, lanes, texts)
        elif kind == "tree" and texts:
            tree(chance, lanes, texts)
        elif kind == "fork" and texts:
            source = chance.choice(list(texts))
            length = lanes[0].length(source)
            for lane in lanes:
                lane.fork(source, next_id, length)
            texts[next_id], next_id = texts[source].copy(), next_id + 1
        elif kind == "rollback" and texts:
            request_id = chance.choice(list(texts))
            length = chance.randrange(lanes[0].length(request_id) + 1)
            for lane in lanes:
                lane.rollback(request_id, length)
            del texts[request_id][max(length, 1) :]
        elif kind == "release" and texts:
            request_id = chance.choice(list(texts))
            verified = texts.pop(request_id)[: lanes[0].length(request_id)]
            for lane in lanes:
                lane.release(request_id, verified)
    return num_failed


def forward(chance: random.Random, lanes: Sequence[Any], texts: dict[int, list[int]]) -> bool:
    windows = []
    for request_id in chance.sample(list(texts), chance.randrange(1, len(texts) + 1)):
        text, length = texts[request_id], lanes[0].length(request_id)
        if length == len(text):
            text.append(chance.randrange(VOCAB_SIZE))
        new = tuple(text[length:])
        windows.append(Window(request_id, new, chance.randrange(1, len(new) + 1)))
    logits = []
    for lane in lanes:
        try:
            logits.append(lane.forward(windows))
        except PearlOutOfBlocksError:
            logits.append(None)
    if logits[0] is None:
        assert logits == [None] * len(lanes)
        return False
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], rtol=1e-9, atol=1e-9)
    return True


def tree(chance: random.Random, lanes: Sequence[Any], texts: dict[int, list[int]]) -> None:
    """Two branches behind the last token, of which one stays."""
    request_id = chance.choice(list(texts))
    length = lanes[0].length(request_id)
    if length != len(texts[request_id]) or not length:
        return
    tokens = tuple(chance.randrange(VOCAB_SIZE) for _ in range(3))
    window = Window(request_id, tokens, 3, Branches(length, ((length,), (length + 1,), (length + 1, length + 2))))
    try:
        logits = [lane.forward([window]) for lane in lanes]
    except PearlOutOfBlocksError:
        for lane in lanes:
            lane.rollback(request_id, length)
        return
    for each in logits[1:]:
        torch.testing.assert_close(each, logits[0], rtol=1e-9, atol=1e-9)
    kept = chance.choice(([], [length], [length + 1], [length + 1, length + 2]))
    for lane in lanes:
        lane.keep(request_id, length, kept)
    texts[request_id] += [tokens[place - length] for place in kept]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize(("num_calls", "num_blocks"), [(4, 400), (6, 7), pytest.param(80, 7, marks=pytest.mark.slow)])
def test_any_sequence_of_operations_gives_the_logits_and_block_tables_of_one_rank(
    architecture: str, size: int, num_calls: int, num_blocks: int, seed: int
) -> None:
    chance = random.Random(seed)
    model = tiny_model(architecture, seed % 1000)
    part, ranks = over_ranks(model, size)
    whole_cache, cache = PagedPrefixCache(model.config, num_blocks), new_cache(part, num_blocks)
    num_failed = 0
    try:
        for call in range(num_calls):
            salt = chance.choice(("", "a", "\ud800b"))
            whole, leading = ModelLane(model, whole_cache, True, salt), new_lane(part, cache, True, salt)
            assert isinstance(leading, LeadingLane)
            with whole.ready(), leading.ready():
                num_failed += random_call(chance, [whole, leading], 60)
            if call % 3 == 2:  # what a change of weights and an interrupt do
                for each in (whole_cache, cache):
                    chance.choice((each.reset_pools, each.start_anew))()
                    each.start_anew()
        assert cache.statistics.hit_tokens > 0
        assert (num_failed > 0) == (num_blocks == 7)
    finally:
        ranks.close()
    assert ranks.errors == []
    for follower in ranks.followers:
        assert follower._cache is not None
        follower._cache.check_integrity([])
        assert follower._cache.pool.num_referenced == 0


def test_ranks_that_disagree_are_found_out(seed: int) -> None:
    model = tiny_model("llama", 1)
    part, ranks = over_ranks(model, 2)
    lane = new_lane(part, new_cache(part, 50))
    with pytest.raises(PearlWorkerError, match="disagree"), lane.ready():
        lane.admit(0, [1, 2, 3], 20)
        lane.forward([Window(0, (1, 2, 3), 1)])
        follower_cache = ranks.followers[0]._cache
        assert follower_cache is not None
        follower_cache.pool = BlockPool(50, 50)  # It begins with the block that is taken already.
        lane.fork(0, 1, 3)
        lane.admit(2, [4, 5], 20)
        lane.forward([Window(2, (4, 5), 1)])
    ranks.close()
    assert [type(error) for error in ranks.errors] == [PearlWorkerError]


def test_a_call_inside_another_one_is_refused_and_the_next_one_is_not() -> None:
    part, ranks = over_ranks(tiny_model("llama", 1), 2)
    try:
        with turns(part, None), pytest.raises(RuntimeError, match="target lies on 2 ranks, which follow one call"):
            turns(None, part).__enter__()
        with turns(part, None):
            pass
    finally:
        ranks.close()


def test_a_part_is_not_its_own_draft() -> None:
    """Both lanes would tell the same ranks of sequences with the same numbers."""
    part, ranks = over_ranks(tiny_model("llama", 1), 2)
    try:
        with pytest.raises(ValueError, match=r"`assistant_model` is the target itself, which lies on 2 ranks.*Leave"):
            turns(part, part).__enter__()
    finally:
        ranks.close()


def test_a_part_cannot_be_called_by_itself() -> None:
    part, ranks = over_ranks(tiny_model("llama", 1), 2)
    try:
        with pytest.raises(RuntimeError, match="one of 2 parts"):
            part(input_ids=torch.tensor([[1, 2]]))
    finally:
        ranks.close()


OPERATIONS: list[Operation] = [
    Begin(3, 10, 400, 16, 2, False, True, True, "salt \udcff"),
    Admit(0, 80, 16, tuple(range(20))),
    Fork(0, 1, 20),
    Rollback(1, 3),
    Keep(1, 2, (4, 7)),
    Release(2**40, ()),
    Forward((Window(0, (5, 6), 2), Window(1, (7, 8, 9), 3, Branches(4, ((4,), (5,), (5, 6)))))),
    Forward(()),
    End(),
    Leave(),
]


def test_operations_arrive_as_they_were_sent() -> None:
    assert decode_operations(encode_operations(OPERATIONS)) == OPERATIONS


@settings(max_examples=300)
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 12), max_size=30))
def test_junk_is_refused_and_never_crashes(words: list[int]) -> None:
    for decode in (decode_operations, lambda each: list(draft_frames.unpack(each))):
        with suppress(MalformedRecordError):
            decode(words)


@settings(max_examples=300)
@given(st.data())
def test_damaged_operations_are_refused_or_read_as_others(data: st.DataObject) -> None:
    words = encode_operations(OPERATIONS)
    place = data.draw(st.integers(0, len(words) - 1))
    words[place] = data.draw(st.integers(-3, 2**40))
    with suppress(MalformedRecordError):
        assert all(type(each) in map(type, OPERATIONS) for each in decode_operations(words))


def test_a_time_that_is_none_is_refused_before_it_is_stored() -> None:
    for num_bytes in (0, 5, 16):
        words = [draft_frames.Kind.TIME, 0, num_bytes, *[0] * -(-num_bytes // 8)]
        with pytest.raises(MalformedRecordError, match=f"{num_bytes} bytes"):
            list(draft_frames.unpack(words))


def test_news_of_a_draft_arrive_where_a_worker_would_have_written_them() -> None:
    descriptor = shared_collectives.anonymous_memory("test", draft_frames.Channel.NUM_BYTES)
    channel, news = draft_frames.Channel(descriptor), draft_frames.News()
    os.close(descriptor)
    news.tree(5).write(b"a tree!")
    news.timeline[7] = 0.25
    news.error.write(b"")
    news.status.write(records.encode_status(records.Status(1, True, 2, 3, 4, 5, 0.5)))
    for part in draft_frames.unpack(news.take()):
        part.store(channel)
    assert channel.tree(5).read() == b"a tree!"
    assert channel.timeline[7] == 0.25
    assert channel.error.read() == b""
    assert records.decode_status(channel.status.read() or b"") == records.Status(1, True, 2, 3, 4, 5, 0.5)
    assert len(news.take()) == 0
    channel.close()


def test_the_descriptors_of_a_link_are_given_back_once_by_its_end_or_by_garbage_collection() -> None:
    group: Any = None  # Nothing is sent.
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    link = LinkedDraft(group, 1)
    link.end()
    taken = [os.dup(0) for _ in range(4)]  # among them the numbers that the link had
    link.end()
    for each in taken:
        os.close(each)  # None was closed for the link.
    link = LinkedDraft(group, 1)
    del link
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == before
