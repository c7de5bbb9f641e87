"""The paged cache against plain tensors: contents, reference counts, the index, eviction, and colliding digests."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import enabled_for_tiny_models, tiny_model
from transformers import LlamaConfig

from hf_pearl import PagedPrefixCache, PearlOutOfBlocksError
from hf_pearl.cache import PagedSequence
from hf_pearl.cache.block_pool import BlockPool
from hf_pearl.cache.paged_layer import as_numbers
from hf_pearl.cache.prefix_index import PrefixIndex
from hf_pearl.cache.step import Attention, PagedStep
from hf_pearl.decoding.messages import Window
from hf_pearl.parallel.lane import ModelLane

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 4, 2, 2
BLOCK_SIZE = 2
SALTS = ("", "another tenant")
SCALING = 0.5

# Few tokens, so that prefixes are often shared.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9)
continuations = st.lists(st.integers(0, 1), min_size=1, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@functools.cache
def _state(tokens: tuple[int, ...], layer: int, name: str) -> torch.Tensor:
    num_heads = NUM_HEADS if name == "query" else NUM_KV_HEADS
    digest = hashlib.blake2b(f"{name} {layer} {list(tokens)}".encode(), digest_size=num_heads * HEAD_DIM)
    return (torch.tensor(list(digest.digest()), dtype=torch.float64) / 128 - 1).reshape(num_heads, HEAD_DIM)


def states_of(tokens: Sequence[int], layer: int, name: str) -> torch.Tensor:
    """Made-up queries, keys or values `(len(tokens), heads, D)`; as in a model, each depends on all tokens up to it."""
    return torch.stack([_state(tuple(tokens[:end]), layer, name) for end in range(1, len(tokens) + 1)])


def plain_attention(tokens: Sequence[int], num_queries: int, layer: int, window: int | None) -> torch.Tensor:
    """What the last tokens of a sequence attend to, from plain tensors: `(num_queries, H, D)`."""
    query, key, value = (states_of(tokens, layer, name) for name in ("query", "key", "value"))
    key, value = (states.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, dim=1) for states in (key, value))
    outputs = []
    for position in range(len(tokens) - num_queries, len(tokens)):
        seen = slice(0 if window is None else max(0, position + 1 - window), position + 1)
        weights = torch.einsum("hd,lhd->hl", query[position], key[seen]).mul(SCALING).softmax(dim=-1)
        outputs.append(torch.einsum("hl,lhd->hd", weights, value[seen]))
    return torch.stack(outputs)


@dataclass(eq=False)
class Tracked:
    """A sequence in use, and what the cache should hold of it."""

    paged: PagedSequence
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)


def new_cache(max_blocks: int = 64, num_layers: int = NUM_LAYERS, **options: Any) -> PagedPrefixCache:
    config = LlamaConfig(num_hidden_layers=num_layers, num_attention_heads=NUM_HEADS)
    return PagedPrefixCache(config, max_blocks, **{"block_size": BLOCK_SIZE, **options})


def compute(cache: PagedPrefixCache, sequences: Sequence[Tracked], num_new: Sequence[int], window: int | None) -> None:
    """One ragged step over the last `num_new` tokens of every sequence, compared with plain attention."""
    for each, num in zip(sequences, num_new, strict=True):
        assert_may_write(cache, each.paged, each.paged.length - num)
    step = PagedStep(cache, [each.paged for each in sequences], num_new)
    for layer in range(NUM_LAYERS):
        packed = []
        for name in ("query", "key", "value"):
            rows = [states_of(each.tokens, layer, name)[-num:] for each, num in zip(sequences, num_new, strict=True)]
            packed.append(torch.cat(rows).transpose(0, 1)[None])  # (1, heads, T, D)
        output = step.attend(layer, *packed, Attention(SCALING, window))
        expected = [
            plain_attention(each.tokens, num, layer, window) for each, num in zip(sequences, num_new, strict=True)
        ]
        torch.testing.assert_close(output[0], torch.cat(expected), rtol=1e-9, atol=1e-12)


def assert_may_write(cache: PagedPrefixCache, sequence: PagedSequence, start: int) -> None:
    """Nobody else names the blocks from position `start` on, and nobody may find what lies there."""
    for place in range(start // cache.block_size, len(sequence.block_table)):
        block = sequence.block_table[place]
        assert cache.pool.count(block) == 1
        entry = cache.index.entry(block)
        assert entry is None or place * cache.block_size + len(entry.token_ids) <= start


def assert_holds(cache: PagedPrefixCache, each: Tracked) -> None:
    """Every layer holds exactly the keys and values of the sequence's tokens."""
    assert each.paged.length == len(each.tokens)
    slots = each.paged.slots(cache.block_size, 0, each.paged.length)
    for layer in range(NUM_LAYERS if each.tokens else 0):
        for held, name in zip(cache.layers[layer].read(slots), ("key", "value"), strict=True):
            assert torch.equal(held[0].transpose(0, 1), states_of(each.tokens, layer, name))


class CacheMachine(RuleBasedStateMachine):
    """Random calls of `PagedPrefixCache`, against sequences kept as plain tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.sequences: list[Tracked] = []
        self.verified: dict[str, set[tuple[int, ...]]] = {salt: {()} for salt in SALTS}

    @initialize(
        max_blocks=st.integers(3, 24), initial_blocks=st.sampled_from([2, 64]), block_size=st.sampled_from([2, 4])
    )
    def make(self, max_blocks: int, initial_blocks: int, block_size: int) -> None:
        self.cache = new_cache(max_blocks, block_size=block_size)
        self.cache.pool = BlockPool(min(initial_blocks, max_blocks), max_blocks)  # so that the pools grow

    @rule(prompt=prompts, salt=st.sampled_from(SALTS), expected=st.sampled_from([0, 8, 40]))
    def allocate(self, prompt: list[int], salt: str, expected: int) -> None:
        """Only what somebody has verified under this salt is found, and never the last token."""
        before = self.cache.statistics.hit_tokens
        paged = self.cache.allocate(prompt, salt, expected)
        assert paged.length < len(prompt)
        found = prompt[: paged.length]
        assert tuple(found) in self.verified[salt]
        assert self.cache.statistics.hit_tokens == before + len(found)
        self.sequences.append(Tracked(paged, prompt, found))
        assert_holds(self.cache, self.sequences[-1])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), window=st.sampled_from([None, None, 1, 3]))
    def forward(self, data: st.DataObject, window: int | None) -> None:
        """One ragged step: the rest of a prompt, or new tokens, of some sequences."""
        chosen = data.draw(st.lists(st.sampled_from(self.sequences), min_size=1, max_size=3, unique=True))
        num_new, ready = [], []
        for each in chosen:
            new = each.prompt[len(each.tokens) :] or data.draw(continuations)
            before = list(each.paged.block_table), each.paged.length
            available = self.cache.pool.max_blocks - self.cache.pool.num_referenced
            try:
                self.cache.append(each.paged, len(new))
            except PearlOutOfBlocksError:
                assert (each.paged.block_table, each.paged.length) == before
                is_copied = len(each.tokens) % self.cache.block_size != 0
                assert (
                    -(-(len(each.tokens) + len(new)) // self.cache.block_size) - len(before[0]) + is_copied > available
                )
                continue
            each.tokens = each.tokens + new
            num_new.append(len(new))
            ready.append(each)
        if ready:
            compute(self.cache, ready, num_new, window)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        """A fork takes no block."""
        each = data.draw(st.sampled_from(self.sequences))
        referenced = self.cache.pool.num_referenced
        self.sequences.append(Tracked(self.cache.fork(each.paged), each.tokens[:], each.tokens[:]))
        assert self.cache.pool.num_referenced == referenced

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.sequences))
        length = data.draw(st.integers(0, len(each.tokens)))
        self.cache.rollback(each.paged, length)
        each.tokens = each.tokens[:length]
        each.prompt = each.tokens[:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), new=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow_a_tree_and_keep_a_part(self, data: st.DataObject, new: list[int]) -> None:
        """What is kept of the new tokens moves up; here they need not attend to each other to tell them apart."""
        each = data.draw(st.sampled_from(self.sequences))
        num_first = len(each.tokens)
        try:
            self.cache.append(each.paged, len(new))
        except PearlOutOfBlocksError:
            return
        branches = [[*each.tokens, token] for token in new]  # all of them follow the last token
        slots = each.paged.slots(self.cache.block_size, num_first, num_first + len(new))
        for layer in range(NUM_LAYERS):
            states = [
                torch.stack([states_of(branch, layer, name)[-1] for branch in branches], dim=1)[None]
                for name in ("key", "value")
            ]
            if self.cache.layers[layer].pools is None:
                self.cache.layers[layer].make_pools(self.cache.num_slots, *states)
            self.cache.layers[layer].write(slots, *states)
        kept = data.draw(st.sampled_from(range(len(new))))
        self.cache.keep(each.paged, num_first, [num_first + kept])
        each.tokens = branches[kept]
        each.prompt = each.tokens[:]

    def _verify(self, each: Tracked, num_verified: int) -> None:
        beyond = [0] if num_verified == len(each.tokens) else []
        self.cache.insert_prefix(each.paged, each.tokens[:num_verified] + beyond)
        self.verified[each.paged.salt].update(tuple(each.tokens[:end]) for end in range(num_verified + 1))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def insert_prefix(self, data: st.DataObject) -> None:
        """Verified tokens become findable; sometimes more are given than are in the cache."""
        each = data.draw(st.sampled_from(self.sequences))
        self._verify(each, data.draw(st.integers(0, len(each.tokens))))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(each)
        self.cache.free(each.paged)
        assert (each.paged.block_table, each.paged.length) == ([], 0)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        """What a lane does at the end of a request: all of it can then be found again."""
        each = data.draw(st.sampled_from(self.sequences))
        self._verify(each, len(each.tokens))
        self.sequences.remove(each)
        self.cache.free(each.paged)

    @precondition(lambda self: sum(map(len, self.verified.values())) > 40)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.verified = {salt: {()} for salt in SALTS}
        assert self.cache.pool.num_cached == len(self.cache.index) == 0

    @invariant()
    def every_sequence_holds_its_tokens(self) -> None:
        for each in self.sequences:
            assert_holds(self.cache, each)

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache, pool = self.cache, self.cache.pool
        in_use = [each.paged for each in self.sequences]
        cache.check_integrity(in_use)
        named = {block for sequence in in_use for block in sequence.block_table}
        assert pool.num_referenced == len(named)
        assert pool.num_free + pool.num_cached + pool.num_referenced == pool.num_blocks <= pool.max_blocks
        assert not any(pool.is_cached(block) for block in named)
        for each in self.sequences:
            assert len(each.paged.block_table) == -(-len(each.tokens) // self.cache.block_size)

    @invariant()
    def the_index_is_a_tree_of_verified_tokens(self) -> None:
        """No free block is indexed, every cached one is, nothing hangs on a block that is gone."""
        if not hasattr(self, "cache"):
            return
        pool, index = self.cache.pool, self.cache.index
        entries = [index.entry(block) for block in range(pool.num_blocks)]
        by_number = {entry.number: entry for entry in entries if entry}
        for block, entry in enumerate(entries):
            assert pool.count(block) or bool(entry) == pool.is_cached(block)
            tokens: tuple[int, ...] = ()
            while entry is not None and isinstance(entry.parent, int):
                tokens, entry = entry.token_ids + tokens, by_number[entry.parent]
            assert entry is None or entry.token_ids + tokens in self.verified[str(entry.parent)]

    def teardown(self) -> None:
        self.patch.undo()


def small_digest(parent: bytes, payload: bytes) -> bytes:
    """Two bits."""
    return bytes([hashlib.blake2b(parent + payload).digest()[0] % 4])


class CollidingCacheMachine(CacheMachine):
    """The same with digests of two bits: nearly every prefix collides with another one's."""

    def __init__(self) -> None:
        super().__init__()
        self.patch.setattr(PrefixIndex, "_digest", lambda index, *parts: small_digest(*parts))


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=170, stateful_step_count=50)
TestCollidingCache = CollidingCacheMachine.TestCase
TestCollidingCache.settings = settings(max_examples=90, stateful_step_count=50)


@pytest.mark.slow
class TestAMillionSteps(CacheMachine.TestCase):
    """The big count."""

    settings = settings(max_examples=15_000, stateful_step_count=50)


@pytest.mark.slow
class TestAMillionStepsOfCollidingDigests(CollidingCacheMachine.TestCase):
    """The big count."""

    settings = settings(max_examples=8_000, stateful_step_count=50)


def computed(cache: PagedPrefixCache, tokens: list[int]) -> Tracked:
    """A sequence with all its keys and values; what the cache held of it is used."""
    each = Tracked(cache.allocate(tokens), tokens)
    num_new = len(tokens) - each.paged.length
    cache.append(each.paged, num_new)
    each.tokens = list(tokens)
    compute(cache, [each], [num_new], None)
    return each


def finish(cache: PagedPrefixCache, each: Tracked) -> None:
    """End a sequence all of whose tokens are verified."""
    cache.insert_prefix(each.paged, each.tokens)
    cache.free(each.paged)


def num_found(cache: PagedPrefixCache, tokens: list[int]) -> int:
    """How many tokens of a prompt the cache holds."""
    paged = cache.allocate(tokens)
    length = paged.length
    cache.free(paged)
    return length


A, B = [0, 1, 0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 0, 1, 0]


def test_the_longest_prefix_is_found_but_never_the_last_token() -> None:
    cache = new_cache()
    finish(cache, computed(cache, A))
    assert num_found(cache, [*A, 0]) == 8
    assert num_found(cache, A) == 7  # its last token's logits are needed
    assert num_found(cache, A[:7]) == 6
    assert num_found(cache, A[:6]) == num_found(cache, [*A[:5], 0, *A[6:]]) == 5  # a part of a block
    assert num_found(cache, A[:1]) == num_found(cache, []) == num_found(cache, B) == 0
    cache.check_integrity([])


def test_two_requests_with_one_prompt_in_one_step_share_its_first_copy() -> None:
    cache = new_cache()
    pair = [Tracked(cache.allocate(A), A) for _ in range(2)]
    for each in pair:
        cache.append(each.paged, len(A))
        each.tokens = list(A)
    compute(cache, pair, [8, 8], None)
    first, second = (list(each.paged.block_table) for each in pair)
    assert not set(first) & set(second)
    for each in pair:
        finish(cache, each)
    assert (cache.pool.num_cached, cache.pool.num_referenced) == (4, 0)
    third = computed(cache, [*A, 1, 1])
    assert third.paged.block_table[:4] == first
    assert [cache.pool.count(block) for block in first] == [1] * 4


def test_what_follows_an_evicted_block_is_forgotten_with_it() -> None:
    """A fork may hold an indexed block behind its own copy of the one before it, which is evicted."""
    cache = new_cache(3)
    first = computed(cache, [*range(BLOCK_SIZE), 0])
    fork = cache.fork(first.paged)
    other = computed(cache, list(range(BLOCK_SIZE)))
    for sequence, tokens in ((other.paged, list(range(BLOCK_SIZE))), (first.paged, first.tokens)):
        cache.insert_prefix(sequence, tokens)
        cache.free(sequence)
    assert (len(cache.index), cache.pool.num_cached) == (2, 1)
    last = cache.allocate()
    cache.append(last, 1)
    assert (len(cache.index), cache.pool.num_cached, cache.statistics.evicted_blocks) == (0, 0, 1)
    cache.free(fork)
    cache.free(last)
    assert cache.pool.num_free == 3


def test_a_shared_block_is_counted_by_everyone_who_reads_it() -> None:
    cache = new_cache()
    finish(cache, computed(cache, A))
    readers = [computed(cache, [*A[:4], 1 - A[4], number, 0]) for number in range(3)]
    shared = readers[0].paged.block_table[:2]
    assert all(reader.paged.block_table[:2] == shared for reader in readers)
    for number, reader in enumerate(readers):
        assert [cache.pool.count(block) for block in shared] == [3 - number] * 2
        cache.free(reader.paged)
    assert num_found(cache, A) == 7


def test_salts_share_nothing() -> None:
    cache = new_cache()
    each = Tracked(cache.allocate(A, "one"), A)
    cache.append(each.paged, len(A))
    each.tokens = list(A)
    compute(cache, [each], [len(A)], None)
    finish(cache, each)
    assert [cache.allocate([*A, 0], salt).length for salt in ("one", "two", "")] == [8, 0, 0]


def test_a_fork_goes_its_own_way_after_one_copied_block() -> None:
    cache = new_cache()
    first = computed(cache, A[:5])
    second = Tracked(cache.fork(first.paged), A, A[:5])
    table = list(first.paged.block_table)
    assert second.paged.block_table == table
    for each, token in ((first, 0), (second, 1)):
        cache.append(each.paged, 1)
        each.tokens = [*A[:5], token]
        compute(cache, [each], [1], None)
    assert (first.paged.block_table[:2], second.paged.block_table) == (table[:2], table)
    assert first.paged.block_table[2] != table[2]
    assert cache.statistics.copied_blocks == 1
    for each in (first, second):
        assert_holds(cache, each)


def test_a_partly_filled_last_block_is_used_again_in_place_or_copied() -> None:
    cache = new_cache(block_size=8)
    finish(cache, computed(cache, A[:6]))
    first = cache.allocate([*A[:6], 1, 1])  # nobody else has it: no copy
    second = cache.allocate([*A[:6], 0, 0])
    third = cache.allocate([*A[:3], 1 - A[3], 0])
    assert [each.length for each in (first, second, third)] == [6, 6, 3]
    assert len({each.block_table[0] for each in (first, second, third)}) == 3
    assert cache.statistics.copied_blocks == 2
    assert (cache.statistics.hit_tokens, cache.statistics.queried_tokens) == (15, 6 + 8 + 8 + 5)
    assert cache.statistics.hit_rate == 15 / 27


def test_a_longer_prefix_takes_the_place_of_its_part() -> None:
    cache = new_cache(block_size=8)
    for length in (3, 5, 7):
        each = Tracked(cache.allocate(), A)
        cache.append(each.paged, length)
        each.tokens = A[:length]
        compute(cache, [each], [length], None)
        finish(cache, each)
    assert (cache.pool.num_cached, len(cache.index)) == (1, 1)
    assert num_found(cache, A) == 7


def test_sequences_that_grow_side_by_side_stay_in_one_run() -> None:
    cache = new_cache(64)
    sequences = [cache.allocate(expected_length=40) for _ in range(3)]
    for _ in range(10):
        for sequence in sequences:
            cache.append(sequence, 4)
    assert all(isinstance(sequence.slots(BLOCK_SIZE, 0, 40), slice) for sequence in sequences)


def test_a_prompt_that_never_fits_is_told_so_at_once() -> None:
    with pytest.raises(PearlOutOfBlocksError, match=r"17 tokens needs 9 blocks .* at most 8.*cache_memory"):
        new_cache(8).pool.check_fits(17, BLOCK_SIZE)


def test_a_recycled_block_is_not_found_under_its_old_tokens() -> None:
    cache = new_cache(4)
    finish(cache, computed(cache, A))
    blocks_of_b = computed(cache, B)  # evicts all of A
    assert num_found(cache, A) == 0
    finish(cache, blocks_of_b)
    assert (num_found(cache, A), num_found(cache, B)) == (0, 6)  # no block is left for a copy
    with pytest.raises(PearlOutOfBlocksError, match="paged cache is full"):
        cache.append(cache.allocate(), 9)


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    cache = new_cache(8)
    finish(cache, computed(cache, A))
    finish(cache, computed(cache, B))
    assert num_found(cache, A[:7]) == 6  # used again
    cache.append(cache.allocate(), 3 * BLOCK_SIZE)
    assert (num_found(cache, [*A, 0]), num_found(cache, [*B, 0])) == (6, 4)


def test_a_colliding_prefix_is_neither_served_nor_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "_digest", lambda index, parent, payload: b"always the same")
    cache = new_cache()
    finish(cache, computed(cache, A))
    finish(cache, computed(cache, B))
    assert (num_found(cache, A), num_found(cache, B)) == (2, 0)
    computed(cache, A)


def test_what_hangs_on_an_evicted_block_is_not_found_behind_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of the first blocks collide; A's first block goes, B's takes its place, A's second would fit behind."""
    monkeypatch.setattr(PrefixIndex, "_digest", lambda index, parent, payload: bytes([parent[0] + 1 if parent else 0]))
    cache = new_cache()
    finish(cache, computed(cache, A[:4]))
    first = cache.allocate(A).block_table[0]
    cache.index.forget(first)
    finish(cache, computed(cache, B[:2]))
    assert num_found(cache, [*B[:2], *A[2:5]]) == 2


def test_a_sequences_nan_does_not_reach_another_one() -> None:
    """Rows of a step are padded to one length, and a masked key still counts 0 times its value."""
    cache = new_cache(num_layers=1)
    sequences = [cache.allocate(), cache.allocate()]
    for sequence, length in zip(sequences, (5, 3), strict=True):
        cache.append(sequence, length)
    step = PagedStep(cache, sequences, [5, 3])
    query, key = torch.randn(1, 1, 8, 2), torch.randn(1, 1, 8, 2)
    key[:, :, :5] = torch.nan
    output = step.attend(0, query, key, key, Attention(1.0))
    assert output[0, :5].isnan().all()
    assert output[0, 5:].isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_what_lies_behind_a_short_row_changes_nothing(poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at equal distances are read as one view, in which short ones end in foreign keys and values."""
    model = tiny_model("llama", 3)
    lane = ModelLane(model, PagedPrefixCache(model.config, 64, 4))
    rows = {0: 40, 1: 25, 2: 31}
    num_by_row = 0

    def counted(step: PagedStep) -> None:
        nonlocal num_by_row
        num_by_row += 1
        read_by_row(step)

    read_by_row = PagedStep.read_by_row
    monkeypatch.setattr(PagedStep, "read_by_row", counted)
    with lane.ready():
        for row, length in rows.items():
            lane.admit(row, (), 80)
            lane.forward([Window(row, tuple(range(1, length + 1)), 1)])
        windows = [Window(row, (5, 6), 2) for row in rows]
        clean = lane.forward(windows)
        assert num_by_row == 0
        for row, length in rows.items():
            lane.rollback(row, length)
        held = torch.cat([as_numbers(lane._sequences[row].slots(4, 0, length)) for row, length in rows.items()])
        foreign = torch.ones(lane.cache.num_slots, dtype=torch.bool).index_fill(0, held, False)
        for layer in lane.cache.layers:
            for pool in layer.pools:
                pool.data[:, :, foreign] = poison
        assert torch.equal(lane.forward(windows), clean)
    assert num_by_row == (not abs(poison) < torch.inf)


@pytest.mark.parametrize("block_size", [0, 3, -2, True])
def test_a_block_size_that_is_no_power_of_two_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        new_cache(8, block_size=block_size)


@pytest.mark.parametrize("length", [-1, 5])
def test_a_rollback_beyond_the_sequence_is_refused(length: int) -> None:
    cache = new_cache(8, 1)
    sequence = cache.allocate()
    cache.append(sequence, 4)
    with pytest.raises(ValueError, match="between 0 and 4"):
        cache.rollback(sequence, length)


def test_tokens_that_others_read_are_not_moved_over() -> None:
    """What a fork or the index holds stands; behind it, a tree's tokens move up, and a refusal changes nothing."""
    cache = new_cache()
    first = computed(cache, A[:6])
    second = Tracked(cache.fork(first.paged), A[:6], A[:6])
    with pytest.raises(ValueError, match="from 4 on that are forked or indexed"):
        cache.keep(second.paged, 4, [5])
    cache.free(second.paged)
    cache.insert_prefix(first.paged, A[:5])
    with pytest.raises(ValueError, match="from 4 on that are forked or indexed"):
        cache.keep(first.paged, 4, [5])
    assert_holds(cache, first)
    cache.append(first.paged, 1)
    cache.keep(first.paged, 5, [6])
    assert first.paged.length == 6 and cache.allocate([*A[:5], 1]).length == 5
