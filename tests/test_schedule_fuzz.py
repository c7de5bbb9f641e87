"""Any interleaving of the two lanes gives the same tokens: a seeded scheduler decides who runs at every hand-over."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from callbacks import CountingProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    PAD_TOKEN_ID,
    VOCAB_SIZE,
    DraftKind,
    enabled_for_tiny_models,
    is_varied,
    left_padded,
    make_draft,
    tiny_model,
)
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from hf_pearl.cache import PagedPrefixCache
from hf_pearl.decoding import draft_windows, loop
from hf_pearl.decoding.benefit import Benefit, Benefits
from hf_pearl.decoding.calibration import Calibration
from hf_pearl.decoding.draft_tree import Candidate, DraftTree
from hf_pearl.decoding.drafting import Drafter
from hf_pearl.decoding.guesses import Guesses
from hf_pearl.decoding.lines import Line, likeliest_line
from hf_pearl.decoding.lookup import LookupChances
from hf_pearl.decoding.loop import DecodingLoop
from hf_pearl.decoding.messages import Admission, Removal, TokenTree, Verdict, Window
from hf_pearl.decoding.noise import NoiseSource, request_seed
from hf_pearl.decoding.policy import Pace
from hf_pearl.decoding.processors import draft_processors
from hf_pearl.decoding.proposal import Proposer
from hf_pearl.decoding.request import Request
from hf_pearl.decoding.rules import Rules
from hf_pearl.decoding.schedule import Choices, FreeRunning, Lockstep, PlainDecoding, Schedule
from hf_pearl.decoding.stats import PearlStats
from hf_pearl.decoding.verification import Verifier
from hf_pearl.decoding.while_pays import WhilePays
from hf_pearl.parallel.lane import ModelLane

RUNS_PER_CASE = 6
BLOCK_SIZE = 4  # many blocks for few tokens


class ArbitraryDraft:
    """A draft lane that runs when a die says so: messages are heard late, trees published late, or old ones read.

    Messages are heard in order and trees published in order, as every real lane promises; nothing else is kept.
    """

    def __init__(self, drafter: Drafter, chance: random.Random) -> None:
        self.drafter, self.chance = drafter, chance
        self.concurrent = chance.random() < 0.5
        self.step_seconds = chance.choice((0.0, 1e-4, 1e-2))
        self.max_line = drafter.max_line
        self.num_steps = 0
        self.is_resting = False
        self._inbox: deque[Admission | Verdict | Removal] = deque()
        self._made: deque[tuple[int, list[TokenTree]]] = deque()
        self._published: dict[int, list[TokenTree]] = {}
        # How often it hears, drafts and publishes; a weight of 0 is a lane that is deaf, dead or mute.
        self._weights = [chance.choice((0.2, 1.0, 1.0, 5.0)) for _ in range(3)]
        if chance.random() < 0.1:
            self._weights[chance.randrange(3)] = 0.0
        self._staleness = chance.choice((0.0, 0.0, 0.2, 0.8))

    def run_a_while(self) -> None:
        """What the draft lane does between two moments of the target's."""
        for _ in range(self.chance.choice((0, 1, 3, 10, 40))):
            action = self.chance.choices((self._hear, self._step, self._publish), self._weights)[0]
            action()

    def _hear(self) -> None:
        for _ in range(min(len(self._inbox), self.chance.randint(1, 4))):
            self.drafter.handle(self._inbox.popleft())

    @property
    def is_ready(self) -> bool:
        return self.chance.random() < 0.9

    @property
    def is_starting(self) -> bool:
        return self.chance.random() < 0.1

    def rest(self, is_resting: bool) -> None:
        self.is_resting = is_resting  # It may go on all the same: nobody relies on its being quick to hear.
        self.run_a_while()

    def _step(self) -> None:
        if self.drafter.has_work() or self.chance.random() < 0.1:
            trees = self.drafter.step()
            self._made.append((self.drafter.num_steps, trees))

    def _publish(self) -> None:
        for _ in range(min(len(self._made), self.chance.randint(1, 4))):
            self.num_steps, trees = self._made.popleft()
            for tree in trees:
                self._published.setdefault(tree.request_id, []).append(tree)

    def send(self, message: Admission | Verdict | Removal) -> None:
        self._inbox.append(message)
        self.run_a_while()

    def grant(self, num_steps: int) -> None:
        self.run_a_while()

    def tree(self, request_id: int) -> TokenTree | None:
        self.run_a_while()
        published = self._published.get(request_id)
        if not published:
            return None
        return self.chance.choice(published) if self.chance.random() < self._staleness else published[-1]

    def wait(self, num_steps: int, timeout: float) -> bool:
        """Come to an end whatever happens, perhaps too early, perhaps with the wrong answer."""
        for _ in range(self.chance.choice((0, 1, 3, 10))):
            if self.num_steps >= num_steps:
                break
            self.run_a_while()
        return self.num_steps >= num_steps if self.chance.random() < 0.9 else self.chance.random() < 0.5

    def finish(self) -> None:
        """Hear the rest, so that every request is released."""
        while self._inbox:
            self._hear()


class Confident(Calibration):
    """Believes in every guess, so that lines and windows are long."""

    def chance(self, confidence: float, rank: int = 0) -> float:
        """Nearly one; of all that may come at a place together at most one, or a tree would grow without end."""
        return 0.8 / 5**rank


class InterleavedLane(ModelLane):
    """The target's lane; the draft's runs beside each of its forwards."""

    draft: ArbitraryDraft | None = None
    num_trees = 0

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """The real forward."""
        if self.draft is not None:
            self.draft.run_a_while()
        logits = super().forward(windows)
        InterleavedLane.num_trees += sum(window.branches is not None for window in windows)
        if self.draft is not None:
            self.draft.run_a_while()
        return logits


@dataclass
class Pair:
    """Two models, and their caches, which live from run to run."""

    target: PreTrainedModel
    draft: PreTrainedModel
    caches: list[PagedPrefixCache] = field(default_factory=list)

    def __post_init__(self) -> None:
        for model, max_blocks in ((self.target, 4096), (self.draft, 4096), (self.draft, 16)):  # the last: too few
            self.caches.append(PagedPrefixCache(model.config, max_blocks, BLOCK_SIZE))

    def assert_nothing_held(self) -> None:
        """Fail unless every block was given back."""
        for cache in self.caches:
            cache.check_integrity([])
            assert cache.pool.num_referenced == 0


@dataclass
class Case:
    """One call, and what it must give."""

    rows: list[list[int]]
    num_new: int
    make_processors: list[Callable[[], Any]]
    eos_token_id: int | None = None
    call_seed: int | None = None
    expected: list[list[int]] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Length of the padded prompts."""
        return max(map(len, self.rows))

    def rules(self) -> Rules:
        """Processors and stopping rules as transformers would build them."""
        max_length = self.longest + self.num_new
        criteria = StoppingCriteriaList([MaxLengthCriteria(max_length)])
        if self.eos_token_id is not None:
            criteria.append(EosTokenCriteria(self.eos_token_id))
        processors = LogitsProcessorList([make() for make in self.make_processors])
        return Rules(processors, criteria, self.call_seed is not None, max_length, PAD_TOKEN_ID)

    def requests(self) -> list[Request]:
        """Every row as a request."""
        requests = []
        for index, row in enumerate(self.rows):
            padding = (PAD_TOKEN_ID,) * (self.longest - len(row))
            seed = None if self.call_seed is None else request_seed(self.call_seed, index)
            noise = None if seed is None else NoiseSource(seed, VOCAB_SIZE)
            max_length = len(row) + self.num_new
            requests.append(Request(index, len(row), padding, max_length, list(row), seed, noise))
        return requests

    def generate(self, target: PreTrainedModel) -> list[list[int]]:
        """What transformers' greedy decoding gives, each row up to its end."""
        output = target.generate(
            **left_padded(self.rows),
            do_sample=False,
            max_new_tokens=self.num_new,
            eos_token_id=self.eos_token_id,
            pad_token_id=PAD_TOKEN_ID,
            logits_processor=LogitsProcessorList([make() for make in self.make_processors]),
        )
        rows = output[:, self.longest :].tolist()
        return [row[: row.index(self.eos_token_id) + 1] if self.eos_token_id in row else row for row in rows]


def draw_case(chance: random.Random, pair: Pair, samples: bool) -> Case:
    """A random call, and its right answer: transformers' own, or, when sampling, ours without a draft."""
    prefix = [chance.randrange(1, VOCAB_SIZE) for _ in range(10)]  # shared by all rows, so that blocks are too
    rows = [
        prefix[: chance.randint(0, 10)] + [chance.randrange(1, VOCAB_SIZE) for _ in range(chance.randint(1, 12))]
        for _ in range(chance.choice((1, 2, 2, 4)))
    ]
    rows += rows[: chance.choice((0, 0, 0, 1))]  # as for `num_return_sequences`: one is computed, the others are forked
    processors = chance.choice(([], [], [lambda: RepetitionPenaltyLogitsProcessor(1.3)], [CountingProcessor]))
    case = Case(rows, chance.choice((1, 2, 12, 22, 22, 22)), processors)
    if samples:
        case.make_processors = [*processors, lambda: TemperatureLogitsWarper(0.7), lambda: TopKLogitsWarper(20)]
        case.call_seed = chance.getrandbits(63)

    def answer() -> list[list[int]]:
        return decode_without_draft(pair, case) if samples else case.generate(pair.target)

    case.expected = answer()
    if chance.random() < 0.5:
        case.eos_token_id = chance.choice(chance.choice(case.expected))
        case.expected = answer()
    return case


def decode_without_draft(pair: Pair, case: Case) -> list[list[int]]:
    """Plain decoding through our loop."""
    rules, requests = case.rules(), case.requests()
    lane = ModelLane(pair.target, pair.caches[0], prefix_cache=False)
    with lane.ready():
        verifier = Verifier(requests, rules, lane.device)
        DecodingLoop(lane, requests, verifier, PlainDecoding(), None, PearlStats()).run()
    return [request.generated for request in requests]


def decode_interleaved(pair: Pair, case: Case, chance: random.Random) -> tuple[list[list[int]], PearlStats]:
    """One call with the real loop, lanes, drafter and schedules, in an order that `chance` decides."""
    rules, requests, stats = case.rules(), case.requests(), PearlStats()
    prefix_cache = chance.random() < 0.7
    cache = pair.caches[0]
    if rules.is_of_row and chance.random() < 0.5:  # Rows that advance together cannot give way to each other.
        num_blocks = -(-max(request.max_length for request in requests) // BLOCK_SIZE) + chance.choice((0, 1, 4))
        cache = PagedPrefixCache(pair.target.config, num_blocks, BLOCK_SIZE)
        pair.caches[3:] = [cache]
    target_lane = InterleavedLane(pair.target, cache, prefix_cache)
    draft_lane = ModelLane(pair.draft, pair.caches[chance.choice((1, 1, 1, 1, 1, 1, 1, 2))], prefix_cache)
    proposer = Proposer(VOCAB_SIZE, draft_processors(rules.processors), PAD_TOKEN_ID)
    calibration = chance.choice((Calibration, Confident, Confident))()
    drafter = Drafter(
        draft_lane,
        proposer,
        calibration,
        max_line=chance.choice((1, 4, 32, 32, 32, 32)),
        free_running=chance.random() < 0.7,
        max_width=chance.choice((1, 2, 8)),
    )
    drafter.step_times.record(2, chance.choice((1e-9, 1.0)))  # what a wider step costs
    draft = ArbitraryDraft(drafter, chance)
    with target_lane.ready(), draft_lane.ready():
        for request in requests:
            max_length = request.max_length - chance.choice((0, 0, 5))  # a draft may have fewer positions
            admission = (request.request_id, tuple(request.verified), max_length, request.num_padding, request.seed)
            draft.send(Admission(*admission))
        target_lane.draft = draft
        verifier = Verifier(requests, rules, target_lane.device)
        schedule = draw_schedule(requests, draft, chance)
        DecodingLoop(target_lane, requests, verifier, schedule, draft, stats, draw_clock(chance)).run()
        draft.finish()
    report = drafter.report()
    assert report.num_drafted >= 0
    return [request.generated for request in requests], stats


def draw_schedule(requests: Sequence[Request], draft: ArbitraryDraft, chance: random.Random) -> Schedule:
    """One of the three schedules, perhaps in the middle of what it has learnt."""
    overlap = chance.random() < 0.7
    if chance.random() < 0.4:
        return Lockstep(draft, chance.choice((1, 3, 8, 16)), overlap)
    pace = Pace()
    for _ in range(chance.choice((0, 3))):
        pace.record_cycle(len(requests), chance.randint(1, 9), chance.randint(1, 9), chance.random(), 0.0)
        pace.record_wait(chance.random(), chance.random(), chance.random())
    lookup_chances = chance.choice((None, LookupChances()))
    choices = Choices(*(chance.random() < 0.8 for _ in range(2)))
    free_running = FreeRunning(draft, pace, overlap, lookup_chances, choices)
    if chance.random() < 0.5:
        return free_running
    return WhilePays(
        requests, free_running, draft, RestlessBenefits(chance), lambda is_leaving: None, draw_clock(chance)
    )


class RestlessBenefits(Benefits):
    """Sends the draft to rest and back at any moment."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance, self.share = chance, chance.choice((0.1, 0.5, 0.9))

    def of(self, num_rows: int) -> Benefit:
        benefit = super().of(num_rows)
        benefit.mode = "drafted" if self.chance.random() < self.share else "plain"
        return benefit


def draw_clock(chance: random.Random) -> Callable[[], float]:
    """A clock that jumps: whatever the cost model learns, the answer is the same."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += chance.expovariate(chance.choice((1.0, 1e3)))
        return now

    return clock


PAIRS: list[tuple[str, DraftKind, float]] = [
    ("llama", "noisy", 0.003),
    ("mistral", "noisy", 0.03),  # far beyond its sliding window
    ("gpt2", "unrelated", 0.0),
    ("qwen3", "same", 0.0),
    ("llama", "noisy", 0.06),
]


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def run_fuzz(seed: int, samples: bool, num_cases: int, patch: pytest.MonkeyPatch) -> None:
    """Run `num_cases * RUNS_PER_CASE` random interleavings."""
    total, num_long, num_varied = PearlStats(), 0, 0
    patch.setattr(InterleavedLane, "num_trees", 0)
    pairs: dict[int, Pair] = {}
    for index in range(num_cases):
        which = index % len(PAIRS)
        if which not in pairs:
            architecture, kind, noise = PAIRS[which]
            target = tiny_model(architecture, which, num_hidden_layers=1)
            pairs[which] = Pair(target, make_draft(target, kind, which, noise))
        case = draw_case(random.Random(f"{seed} {index}"), pairs[which], samples)
        if case.num_new >= 8 and case.eos_token_id is None:
            num_long += 1
            num_varied += is_varied(torch.tensor([list(row) for row in set(map(tuple, case.expected))]))
        for run in range(RUNS_PER_CASE):
            chance = random.Random(f"{seed} {index} {run}")
            patch.setattr(loop, "MAX_TOKENS_PER_FORWARD", chance.choice((4096, 4096, 3, 7, 13)))
            patch.setattr(draft_windows, "MAX_PREFILL_TOKENS", chance.choice((1024, 3)))
            got, stats = decode_interleaved(pairs[which], case, chance)
            where = f"seed {seed}, case {index}, run {run}"
            assert got == case.expected, f"{where}: {got}\nis not\n{case.expected}"
            pairs[which].assert_nothing_held()
            total.preemptions += stats.preemptions
            for place, (judged, stood) in enumerate(zip(stats.judged_at, stats.stood_at, strict=True)):
                for each in range(judged):
                    total.judge(place, each < stood)
    assert num_varied >= 0.7 * num_long > 0
    assert 0.2 < total.acceptance_rate < 0.95
    assert sum(total.judged_at[4:]) > 20, total.judged_at
    assert total.preemptions > 20
    assert InterleavedLane.num_trees > 20


@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
def test_three_hundred_interleavings_give_the_same_tokens(
    samples: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_fuzz(seed, samples, 150 // RUNS_PER_CASE, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize("part", range(5))
def test_five_thousand_interleavings_give_the_same_tokens(
    part: int, samples: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_fuzz(seed, samples, -(-500 // RUNS_PER_CASE), monkeypatch)


class SecondIsRight(Schedule):
    """Guesses two tokens for the next place of every row, of which the second is what the target chooses."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def before_forward(self, requests: Sequence[Request]) -> dict[int, Guesses]:
        guesses = {}
        for request in requests:
            right = self.case.expected[request.request_id][len(request.generated)]
            wrong = (right + 1) % VOCAB_SIZE
            guesses[request.request_id] = Guesses((wrong, right), (-1, -1), (0.5, 0.4), (False, False))
        return guesses


def test_what_stands_of_a_tree_may_move_where_equal_prompts_begin(seed: int) -> None:
    """All of a prompt but its last token is cached: its first forward could verify guesses, and others wait for it."""
    target = tiny_model("llama", 0, num_hidden_layers=1)
    pair = Pair(target, make_draft(target, "same", 0))
    chance = random.Random(seed)
    row = [chance.randrange(1, VOCAB_SIZE) for _ in range(2 * BLOCK_SIZE + 2)]
    case = Case([row, row], 8, [])
    case.expected = case.generate(target)
    for is_warm in (False, True):
        requests, stats = case.requests(), PearlStats()
        lane = ModelLane(target, pair.caches[0])
        with lane.ready():
            verifier = Verifier(requests, case.rules(), lane.device)
            DecodingLoop(lane, requests, verifier, SecondIsRight(case), None, stats).run()
        assert [request.generated for request in requests] == case.expected
        assert stats.accepted_tokens > 4 and (stats.prefilled_tokens == 1) == is_warm, stats
        pair.assert_nothing_held()


tokens = st.lists(st.integers(0, 2), max_size=6)
children = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
growth = st.tuples(st.integers(0, 20), children, st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3))


class HeldTree:
    """A tree, and what its sequence in the draft's cache would hold: for each place, all tokens up to it."""

    def __init__(self, prompt: list[int]) -> None:
        self.tree = DraftTree(prompt, max_length=1000)
        self.held: list[list[int]] = [prompt[: end + 1] for end in range(len(prompt) - 1)]

    def compute(self, which: int, token_ids: list[int], chances: list[float]) -> None:
        """Compute one of the leaves, as a draft step does."""
        tree, leaves = self.tree, list(self.tree.leaves())
        if not leaves:
            return
        node = leaves[which % len(leaves)]
        if node is tree.root:
            self.held += [tree.verified[: end + 1] for end in range(len(self.held), tree.num_verified)]
        else:
            self.held.append(tree.tokens(node))
        candidates = [Candidate(*each) for each in zip(token_ids, chances, chances, strict=False)]
        tree.computed(node, len(self.held) - 1, candidates)
        assert [child.candidate for child in node.children] == candidates

    def prune(self, number: int, token_ids: list[int]) -> None:
        """Apply a verdict, and do with the sequence what it says."""
        pruned = self.tree.prune(number, token_ids)
        assert pruned.places == sorted(set(pruned.places))
        if len(self.held) > pruned.num_first:
            self.held = self.held[: pruned.num_first] + [self.held[place] for place in pruned.places]
        for node, token_id in pruned.judged:
            assert node.children
            assert token_id in token_ids

    def guesses(self) -> set[tuple[int, ...]]:
        """Every guess, as the tokens up to it."""
        return {tuple(self.tree.tokens(node)) for node in self.tree.root.walk() if node is not self.tree.root}

    def check(self) -> None:
        """The cache holds what was computed and nothing else, and every node says where it stands."""
        tree, num_verified = self.tree, self.tree.num_verified
        places = []
        for node in tree.root.walk():
            assert tree.length(node) == len(tree.tokens(node))
            product = 1.0 if node.parent is None else node.parent.path_chance * node.candidate.chance
            assert node.path_chance == pytest.approx(product, rel=1e-6)
            if node.place is not None:
                places.append(node.place)
                assert self.held[node.place] == tree.tokens(node)
                assert [len(self.held[place]) for place in tree.path(node)] == list(
                    range(num_verified + 1, tree.length(node) + 1)
                )
        if places:
            assert sorted(places) == list(range(num_verified - 1, len(self.held)))
        else:
            assert len(self.held) < num_verified
        assert self.held[:num_verified] == [tree.verified[: end + 1] for end in range(len(self.held[:num_verified]))]
        likeliest = tree.likeliest(1000)
        assert {tuple(tree.tokens(node)) for node in likeliest} == self.guesses()
        assert tree.likeliest(3) == likeliest[:3]
        assert all(node.parent in (tree.root, *likeliest[:place]) for place, node in enumerate(likeliest))


@settings(max_examples=300)
@given(tokens, st.lists(st.one_of(growth, growth, tokens.filter(bool)), max_size=30))
def test_a_pruned_tree_keeps_exactly_what_agrees(prompt: list[int], operations: list[Any]) -> None:
    """A tuple grows the tree, a list is a verdict."""
    held = HeldTree([0, *prompt])
    verified = [0, *prompt]
    for number, operation in enumerate(operations, start=1):
        if isinstance(operation, tuple):
            held.compute(*operation)
        else:
            before, num_leaves = held.guesses(), {tuple(held.tree.tokens(node)) for node in held.tree.leaves()}
            verified += operation
            held.prune(number, operation)
            assert held.tree.verified == verified
            assert held.tree.verdict_number == number
            behind = {each for each in before if each[: len(verified)] == tuple(verified) and len(each) > len(verified)}
            assert held.guesses() == behind
            assert (held.tree.root.place is None) == (tuple(verified) in num_leaves or tuple(verified) not in before)
        held.check()


@settings(max_examples=300)
@given(
    tokens.filter(bool),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(0, 2), st.integers()), max_size=12),
    st.integers(0, 10),
)
def test_of_a_tree_only_what_continues_the_verified_tokens_is_usable(
    verified: list[int], root: int, nodes: list[tuple[int, int]], room: int
) -> None:
    """Whatever a lane publishes, from any moment of the past or out of thin air."""
    request = Request(0, 1, (), len(verified) + 1 + room, verified)
    token_ids = tuple(token for token, _ in nodes)
    parents = tuple(number % (place + 1) - 1 for place, (_, number) in enumerate(nodes))
    chances = tuple(0.01 * place for place in range(len(nodes)))
    line = likeliest_line(TokenTree(0, 0, 0, root, token_ids, parents, chances), request)
    node: int | None = -1 if root <= len(verified) else None
    for token in verified[root:]:
        children = [place for place, parent in enumerate(parents) if parent == node and token_ids[place] == token]
        node = children[0] if children and node is not None else None
    expected = []
    while node is not None and len(expected) < room:
        node = parents.index(node) if node in parents else None
        if node is not None:
            expected.append((token_ids[node], chances[node]))
    assert list(zip(line.token_ids, line.chances, strict=True)) == expected
    assert likeliest_line(None, request) == Line()
