"""The paged cache against plain tensors: contents, reference counts, the index, eviction, and colliding digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from models import enabled_for_tiny_models

from hf_pearl import PagedPrefixCache, PearlOutOfBlocksError
from hf_pearl.cache import PagedSequence, paged_prefix_cache
from hf_pearl.cache.prefix_index import PrefixIndex

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 4, 2, 2
BLOCK_SIZE = 2
SCALING = 0.5

# Few tokens, so that prefixes are often shared.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=9)
continuations = st.lists(st.integers(0, 1), min_size=1, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def states_of(tokens: Sequence[int], layer: int, name: str) -> torch.Tensor:
    """Made-up queries, keys or values `(len(tokens), heads, D)`; as in a model, each depends on all tokens up to it."""
    num_heads = NUM_HEADS if name == "query" else NUM_KV_HEADS
    rows = []
    for end in range(1, len(tokens) + 1):
        digest = hashlib.blake2b(f"{name} {layer} {list(tokens[:end])}".encode(), digest_size=num_heads * HEAD_DIM)
        rows.append(torch.tensor(list(digest.digest()), dtype=torch.float64) / 128 - 1)
    return torch.stack(rows).reshape(len(tokens), num_heads, HEAD_DIM)


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
    """A sequence in use: what the cache should hold of it, and from where on it is its own."""

    paged: PagedSequence
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    num_kept: int = 0  # positions that others may find, or that it found itself: no rollback goes behind them


def compute(cache: PagedPrefixCache, sequences: Sequence[Tracked], num_new: Sequence[int], window: int | None) -> None:
    """One ragged step over the last `num_new` tokens of every sequence, compared with plain attention."""
    step = cache.begin_step([each.paged for each in sequences], num_new)
    for layer in range(NUM_LAYERS):
        packed = []
        for name in ("query", "key", "value"):
            rows = [states_of(each.tokens, layer, name)[-num:] for each, num in zip(sequences, num_new, strict=True)]
            packed.append(torch.cat(rows).transpose(0, 1)[None])  # (1, heads, T, D)
        output = step.attend(layer, *packed, scaling=SCALING, sliding_window=window)
        expected = [
            plain_attention(each.tokens, num, layer, window) for each, num in zip(sequences, num_new, strict=True)
        ]
        torch.testing.assert_close(output[0], torch.cat(expected), rtol=1e-9, atol=1e-12)


class CacheMachine(RuleBasedStateMachine):
    """Random calls of `PagedPrefixCache`, as lanes make them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(paged_prefix_cache, "INITIAL_BLOCKS", 2)  # so that the pools grow
        self.sequences: list[Tracked] = []
        self.verified: set[tuple[int, ...]] = set()

    @initialize(max_blocks=st.integers(3, 24))
    def make(self, max_blocks: int) -> None:
        self.cache = PagedPrefixCache(NUM_LAYERS, max_blocks, BLOCK_SIZE)

    @rule(prompt=prompts)
    def allocate(self, prompt: list[int]) -> None:
        """Only whole blocks of what somebody has verified are found, and never the last token."""
        paged = self.cache.allocate(prompt)
        assert paged.length % BLOCK_SIZE == 0
        assert paged.length < len(prompt)
        found = prompt[: paged.length]
        assert not found or tuple(found) in self.verified
        self.sequences.append(Tracked(paged, prompt, found, len(found)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), window=st.sampled_from([None, None, 1, 3]))
    def forward(self, data: st.DataObject, window: int | None) -> None:
        """One ragged step: the rest of a prompt, or new tokens, of some sequences."""
        chosen = data.draw(st.lists(st.sampled_from(self.sequences), min_size=1, max_size=3, unique=True))
        num_new, ready = [], []
        for each in chosen:
            new = each.prompt[len(each.tokens) :] or data.draw(continuations)
            before = list(each.paged.block_table), each.paged.length
            try:
                self.cache.append(each.paged, len(new))
            except PearlOutOfBlocksError:
                assert (each.paged.block_table, each.paged.length) == before
                needed = -(-(len(each.tokens) + len(new)) // BLOCK_SIZE) - len(before[0])
                assert needed > self.cache.pool.num_free + self.cache.pool.num_cached
                continue
            each.tokens += new
            num_new.append(len(new))
            ready.append(each)
        if ready:
            compute(self.cache, ready, num_new, window)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.sequences))
        length = data.draw(st.integers(each.num_kept, len(each.tokens)))
        self.cache.rollback(each.paged, length)
        del each.tokens[length:]
        each.prompt = each.tokens[:]

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def insert_prefix(self, data: st.DataObject) -> None:
        """Verified tokens become findable; sometimes more are given than are in the cache."""
        each = data.draw(st.sampled_from(self.sequences))
        num_verified = data.draw(st.integers(0, len(each.tokens)))
        beyond = [0] if num_verified == len(each.tokens) else []
        self.cache.insert_prefix(each.paged, each.tokens[:num_verified] + beyond)
        ends = range(BLOCK_SIZE, num_verified + 1, BLOCK_SIZE)
        self.verified.update(tuple(each.tokens[:end]) for end in ends)
        each.num_kept = max(each.num_kept, num_verified // BLOCK_SIZE * BLOCK_SIZE)

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
        """What a lane does at the end of a request."""
        each = data.draw(st.sampled_from(self.sequences))
        assume(len(each.tokens) >= BLOCK_SIZE)
        self.cache.insert_prefix(each.paged, each.tokens)
        self.verified.update(tuple(each.tokens[:end]) for end in range(BLOCK_SIZE, len(each.tokens) + 1, BLOCK_SIZE))
        self.sequences.remove(each)
        self.cache.free(each.paged)

    @rule(chance=st.integers(0, 9))
    def clear(self, chance: int) -> None:
        if not chance:
            self.cache.clear()
            self.verified.clear()
            assert self.cache.pool.num_cached == len(self.cache.index) == 0

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
        for each in self.sequences:
            assert each.paged.length == len(each.tokens)
            assert len(each.paged.block_table) == -(-len(each.tokens) // BLOCK_SIZE)

    @invariant()
    def index_holds_no_free_block(self) -> None:
        if hasattr(self, "cache"):
            for block in range(self.cache.pool.num_blocks):
                is_free = block in self.cache.pool._free
                assert not (is_free and block in self.cache.index)
                assert block in self.cache.index or block not in self.cache.pool._cached

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
TestCache.settings = settings(max_examples=130, stateful_step_count=50)
TestCollidingCache = CollidingCacheMachine.TestCase
TestCollidingCache.settings = settings(max_examples=70, stateful_step_count=50)


@pytest.mark.slow
class TestAMillionSteps(CacheMachine.TestCase):
    """The big count."""

    settings = settings(max_examples=13_000, stateful_step_count=50)


@pytest.mark.slow
class TestAMillionStepsOfCollidingDigests(CollidingCacheMachine.TestCase):
    """The big count."""

    settings = settings(max_examples=7_000, stateful_step_count=50)


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
    cache = PagedPrefixCache(NUM_LAYERS, 64, BLOCK_SIZE)
    finish(cache, computed(cache, A))
    assert num_found(cache, [*A, 0]) == 8
    assert num_found(cache, A) == 6  # its last token's logits are needed
    assert num_found(cache, A[:7]) == 6
    assert num_found(cache, A[:6]) == num_found(cache, [*A[:5], 0, *A[6:]]) == 4
    assert num_found(cache, A[:1]) == num_found(cache, []) == num_found(cache, B) == 0
    cache.check_integrity([])


def test_two_requests_with_one_prompt_in_one_step_share_its_first_copy() -> None:
    cache = PagedPrefixCache(NUM_LAYERS, 64, BLOCK_SIZE)
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


def test_a_shared_block_is_counted_by_everyone_who_reads_it() -> None:
    cache = PagedPrefixCache(NUM_LAYERS, 64, BLOCK_SIZE)
    finish(cache, computed(cache, A))
    readers = [computed(cache, [*A[:4], 1 - A[4], number, 0]) for number in range(3)]
    shared = readers[0].paged.block_table[:2]
    assert all(reader.paged.block_table[:2] == shared for reader in readers)
    for number, reader in enumerate(readers):
        assert [cache.pool.count(block) for block in shared] == [3 - number] * 2
        cache.free(reader.paged)
    assert num_found(cache, A) == 6


def test_a_recycled_block_is_not_found_under_its_old_tokens() -> None:
    cache = PagedPrefixCache(NUM_LAYERS, 4, BLOCK_SIZE)
    finish(cache, computed(cache, A))
    blocks_of_b = computed(cache, B)  # evicts all of A
    assert num_found(cache, A) == 0
    finish(cache, blocks_of_b)
    assert (num_found(cache, A), num_found(cache, B)) == (0, 6)
    with pytest.raises(PearlOutOfBlocksError, match="paged cache is full"):
        cache.append(cache.allocate(), 9)


def test_the_least_recently_used_prefix_is_evicted_first_and_from_its_end() -> None:
    cache = PagedPrefixCache(NUM_LAYERS, 8, BLOCK_SIZE)
    finish(cache, computed(cache, A))
    finish(cache, computed(cache, B))
    assert num_found(cache, A) == 6  # used again
    cache.append(cache.allocate(), 3 * BLOCK_SIZE)
    assert (num_found(cache, [*A, 0]), num_found(cache, [*B, 0])) == (6, 4)


def test_a_colliding_prefix_is_neither_served_nor_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "_digest", lambda index, parent, payload: b"always the same")
    cache = PagedPrefixCache(NUM_LAYERS, 64, BLOCK_SIZE)
    finish(cache, computed(cache, A))
    finish(cache, computed(cache, B))
    assert (num_found(cache, A), num_found(cache, B)) == (2, 0)
    computed(cache, A)


def test_what_hangs_on_an_evicted_block_is_not_found_behind_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests of the first blocks collide; A's first block goes, B's takes its place, A's second would fit behind."""
    monkeypatch.setattr(PrefixIndex, "_digest", lambda index, parent, payload: bytes([parent[0] + 1 if parent else 0]))
    cache = PagedPrefixCache(NUM_LAYERS, 64, BLOCK_SIZE)
    finish(cache, computed(cache, A[:4]))
    first = cache.allocate(A).block_table[0]
    cache.index.forget(first)
    finish(cache, computed(cache, B[:2]))
    assert num_found(cache, [*B[:2], *A[2:5]]) == 2


def test_a_sequences_nan_does_not_reach_another_one() -> None:
    """Rows of a step are padded to one length, and a masked key still counts 0 times its value."""
    cache = PagedPrefixCache(1, 64, BLOCK_SIZE)
    sequences = [cache.allocate(), cache.allocate()]
    for sequence, length in zip(sequences, (5, 3), strict=True):
        cache.append(sequence, length)
    step = cache.begin_step(sequences, [5, 3])
    query, key = torch.randn(1, 1, 8, 2), torch.randn(1, 1, 8, 2)
    key[:, :, :5] = torch.nan
    output = step.attend(0, query, key, key, scaling=1.0)
    assert output[0, :5].isnan().all()
    assert output[0, 5:].isfinite().all()


@pytest.mark.parametrize("block_size", [0, 3, -2])
def test_a_block_size_that_is_no_power_of_two_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        PagedPrefixCache(1, 8, block_size)


@pytest.mark.parametrize("length", [-1, 5])
def test_a_rollback_beyond_the_sequence_is_refused(length: int) -> None:
    cache = PagedPrefixCache(1, 8, BLOCK_SIZE)
    sequence = cache.allocate()
    cache.append(sequence, 4)
    with pytest.raises(ValueError, match="between 0 and 4"):
        cache.rollback(sequence, length)
