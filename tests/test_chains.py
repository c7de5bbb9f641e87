"""Several draft steps in one launch, on a CPU: everything but the capture itself.

The stand-in of these tests is as strict as a graph: it fails where a replay reads other addresses than the capture did.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import interpreter  # noqa: F401  (skips where there is no Triton)
import pytest
import torch
from models import (
    VOCAB_SIZE,
    assert_equal,
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from strict_capture import StrictCapture, capture_on_cpu, use_twins
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.cache import PagedPrefixCache
from hf_pearl.cache.sdpa import TreeMask
from hf_pearl.decoding import chaining
from hf_pearl.decoding.calibration import Calibration
from hf_pearl.decoding.chaining import LENGTHS, VerdictTimes, chain_length
from hf_pearl.decoding.choosing import make_chooser
from hf_pearl.decoding.draft_tree import Node
from hf_pearl.decoding.drafting import Drafter
from hf_pearl.decoding.messages import Admission, Removal, TokenTree, Verdict
from hf_pearl.decoding.noise import NoiseSource, gumbel_noise, noise_of_rows
from hf_pearl.decoding.proposal import Prefix, Proposer
from hf_pearl.parallel.graphs import cuda_graphs
from hf_pearl.parallel.graphs.capture import Capture, CudaCapture, RerunCapture
from hf_pearl.parallel.graphs.cuda_graphs import GraphRunner
from hf_pearl.parallel.lane import ModelLane
from hf_pearl.parallel.packed_windows import PackedWindows, chained
from hf_pearl.registry import engines_of

WARPERS: dict[str, list[LogitsProcessor]] = {
    "greedy": [],
    "sampled": [],
    "warped": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
}


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    """`pearl=` for tiny models."""
    with enabled_for_tiny_models():
        yield


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    use_twins(monkeypatch)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, twins: None) -> list[StrictCapture]:
    return capture_on_cpu(monkeypatch)


# -- the drafter ------------------------------------------------------------------------------------------------------


class Draft:
    """A drafter on captured forwards, and what it needs to be told."""

    def __init__(
        self, model: PreTrainedModel, choice: str, width: int = 1, num_blocks: int = 64, capture: Capture | None = None
    ) -> None:
        device = model.device
        self.cache = PagedPrefixCache(model.config, num_blocks, block_size=8, device=device)
        self.cache.backend.use("triton")
        self.runner = GraphRunner(model, self.cache, capture or StrictCapture())
        self.lane = ModelLane(model, self.cache, prefix_cache=False, graphs=self.runner)
        proposer = Proposer(model.config.vocab_size + 3, LogitsProcessorList(WARPERS[choice]))
        self.drafter = Drafter(self.lane, proposer, Calibration(), max_line=12, free_running=width > 1, max_width=width)
        if width > 1:
            self.drafter.step_times.record(1, 1.0), self.drafter.step_times.record(8, 1.0)  # a guess costs nothing
        self.is_greedy = choice == "greedy"

    def admit(self, chance: random.Random, request_id: int, max_length: int) -> None:
        """Begin a request; two drafts are told the same by two equal sources of chance."""
        prompt = tuple(chance.choices(range(1, 60), k=chance.choice([2, 9])))
        seed = None if self.is_greedy else chance.getrandbits(64)
        self.drafter.handle(Admission(request_id, prompt, max_length, 0, seed))

    def steps(self, number: int) -> None:
        """So many steps, as few launches as possible."""
        end = self.drafter.num_steps + number
        while self.drafter.num_steps < end:
            self.drafter.step(end - self.drafter.num_steps)

    def trees(self) -> list[TokenTree]:
        """What is guessed of all requests."""
        return [self.drafter.token_tree(request_id) for request_id in self.drafter.trees]

    def poison(self) -> None:
        """Make NaN of all that no sequence holds, and of what steps wrote to before."""
        slots = torch.ones(self.cache.num_slots, dtype=torch.bool)
        for sequence in self.lane._sequences.values():
            for place in range(sequence.length):
                slots[sequence.block_table[place // 8] * 8 + place % 8] = False
        for layer in self.cache.layers:
            for pool in layer.pools or ():
                pool.data[:, :, slots] = torch.nan
        for chain in self.runner.chains.values():
            chain._confidence.fill_(torch.nan)
            for static in chain.forwards:
                for output in static._step._outputs.values():
                    output.fill_(torch.nan)


def line(tree: TokenTree, most: int) -> list[int]:
    """The likeliest guesses, one behind the other."""
    found: list[int] = []
    place = -1
    while len(found) < most and place in tree.parents:
        place = tree.parents.index(place)
        found.append(tree.token_ids[place])
    return found


def verdicts(chance: random.Random, trees: list[TokenTree], numbers: dict[int, int], max_length: int) -> list[Verdict]:
    """Some of the guesses of some requests stand, and what follows is a guess, or is none."""
    told = []
    for tree in trees:
        if chance.random() < 0.6:
            stood = line(tree, min(chance.choice([0, 1, 2, 5]), max_length - tree.root - 1))
            if chance.random() < 0.7 or not stood:
                stood.append(chance.randrange(1, 60))
            numbers[tree.request_id] += 1
            told.append(Verdict(tree.request_id, numbers[tree.request_id], tuple(stood)))
    return told


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize(("architecture", "choice"), [("llama", "greedy"), ("llama", "sampled"), ("mistral", "warped")])
def test_chained_steps_guess_what_single_steps_guess(architecture: str, choice: str, seed: int) -> None:
    """Token for token and chance for chance, with three requests, one of which ends early, and verdicts in between.

    Some of the tokens that the model may choose have no embedding.
    """
    model = tiny_model(architecture, seed)
    head = torch.nn.Linear(32, VOCAB_SIZE + 3, bias=False, dtype=torch.float64)
    head.weight = torch.nn.Parameter(torch.cat([model.lm_head.weight, 1.5 * model.lm_head.weight[:3]]).detach())
    model.lm_head = head
    drafts = [Draft(model, choice) for _ in range(2)]
    chained_draft, single = drafts
    assert isinstance(chained_draft.runner._capture, StrictCapture)
    chained_draft.runner._capture.before_replay = chained_draft.poison
    chance, numbers, guessed = random.Random(seed), dict.fromkeys(range(3), 0), set()
    max_lengths = {0: 40, 1: 40, 2: 20}
    with chained_draft.lane.ready(), single.lane.ready():
        for request_id, max_length in max_lengths.items():
            for draft in drafts:
                draft.admit(random.Random(seed + request_id), request_id, max_length)
        while single.drafter.trees:
            number = chance.choice([1, 2, 3, 4, 6, 9])
            chained_draft.steps(number)
            for _ in range(number):
                single.drafter.step()
            trees = single.trees()
            assert chained_draft.trees() == trees
            for tree in trees:
                guessed.update(tree.token_ids)
                assert len({draft.lane.length(tree.request_id) for draft in drafts}) == 1
            for verdict in verdicts(chance, trees, numbers, 40):
                request_id = verdict.request_id
                is_over = (
                    single.drafter.trees[request_id].num_verified + len(verdict.token_ids) >= max_lengths[request_id]
                )
                for draft in drafts:
                    draft.drafter.handle(Removal(request_id) if is_over else verdict)
    kinds = chained_draft.runner.chains
    assert {kind.num_steps for kind in kinds} == set(LENGTHS) and len({kind.bucket for kind in kinds}) > 1
    assert chained_draft.runner.num_chains > 10 and single.runner.num_chains == 0
    assert len(guessed) > 20 and max(guessed) >= VOCAB_SIZE
    reports = [draft.drafter.report() for draft in drafts]
    assert reports[0][:3] == reports[1][:3]


def nodes_of(draft: Draft) -> list[tuple[int, Node]]:
    """All guesses behind which is guessed."""
    trees = draft.drafter.trees.items()
    return [(request_id, node) for request_id, tree in trees for node in tree.root.walk() if node.children]


@pytest.mark.usefixtures("twins")
@pytest.mark.parametrize("choice", ["greedy", "warped"])
def test_chains_of_branches_guess_what_the_model_says_behind_each(choice: str, seed: int) -> None:
    """Every guess of a tree is one of the likeliest behind its branch, as computed without a cache."""
    model = tiny_model("mistral", seed)
    draft = Draft(model, choice, width=8)
    assert isinstance(draft.runner._capture, StrictCapture)
    draft.runner._capture.before_replay = draft.poison
    chance, numbers, num_judged, depths = random.Random(seed), {0: 0, 1: 0}, 0, set()
    with draft.lane.ready(), torch.no_grad():
        for request_id in numbers:
            draft.admit(chance, request_id, 80)
        for _ in range(12):
            draft.steps(chance.choice([2, 4, 7]))
            for request_id, node in nodes_of(draft):
                tree, proposer = draft.drafter.trees[request_id], draft.drafter.proposer
                tokens = [token if token < model.config.vocab_size else 0 for token in tree.tokens(node)]
                logits = model(torch.tensor([tokens])).logits[0, -1:]
                chooser = proposer.chooser([_prefix(request_id, len(tokens))], draft.drafter.num_guesses)
                assert chooser is not None
                rows = proposer.noise_rows([_prefix(request_id, len(tokens))], 1, torch.device("cpu"))
                expected = chooser.choose(logits, torch.tensor(rows[0] if rows else []))
                assert [each.token_id for each in node.children] == expected.token_ids[0].tolist()
                confidences = [each.candidate.confidence for each in node.children if each.candidate]
                torch.testing.assert_close(confidences, expected.confidence[0].tolist(), rtol=1e-5, atol=1e-6)
                num_judged += 1
                depths.add(node.depth)
            for verdict in verdicts(chance, draft.trees(), numbers, 80):
                draft.drafter.handle(verdict)
    kinds = draft.runner.chains
    assert draft.runner.num_chains > 8 and num_judged > 200 and max(depths) > 4
    assert {kind.bucket.has_trees for kind in kinds} >= {True} and {kind.num_steps for kind in kinds} == set(LENGTHS)


def _prefix(request_id: int, length: int) -> Prefix:
    return Prefix(request_id, length, list)


@pytest.mark.usefixtures("twins")
def test_a_chain_for_which_memory_is_missing_is_made_step_by_step(seed: int) -> None:
    model = tiny_model("llama", seed)
    drafts = [Draft(model, "greedy", num_blocks=2) for _ in range(2)]
    chained_draft, single = drafts
    with chained_draft.lane.ready(), single.lane.ready():
        for draft in drafts:
            draft.drafter.max_line = 32
            draft.drafter.handle(Admission(0, (5, 6, 7, 8), 40, 0, None))
        for number, length in ((1, 4), (4, 8), (7, 15)):
            chained_draft.steps(number)
            assert chained_draft.lane.length(0) == length
        chained_draft.drafter.step(4)  # There is room for one of them.
        for _ in range(13):
            single.drafter.step()
        assert chained_draft.trees() == single.trees() and chained_draft.lane.length(0) == 16
        assert chained_draft.runner.num_chains == 3
        for draft in drafts:
            draft.steps(4)  # Now there is none.
            assert draft.drafter._is_out_of_memory and draft.lane.length(0) == 3
        chained_draft.cache.check_integrity(list(chained_draft.lane._sequences.values()))


@pytest.mark.usefixtures("twins")
def test_a_chain_that_cannot_be_captured_is_said_once_and_costs_no_guess(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", seed)
    # The first two captures are of forwards: the largest, then that of one token.
    drafts = [Draft(model, "warped", capture=StrictCapture(fails_at=3)), Draft(model, "warped")]
    with drafts[0].lane.ready(), drafts[1].lane.ready(), caplog.at_level(logging.INFO, logger="hf_pearl"):
        for draft in drafts:
            draft.admit(random.Random(seed), 0, 60)
            for _ in range(3):
                draft.drafter.step()
            draft.steps(4), draft.steps(4)
        assert drafts[0].trees() == drafts[1].trees() and len(drafts[0].trees()[0].token_ids) == 11
    assert [draft.runner.num_chains for draft in drafts] == [0, 2]
    assert drafts[0].runner.can_use() and drafts[0].runner.forwards and drafts[0].runner.num_replays > 8
    said = [each.getMessage() for each in caplog.records if "one by one" in each.getMessage()]
    assert len(said) == 1 and "LlamaForCausalLM" in said[0] and "stream is capturing" in said[0]


@pytest.mark.usefixtures("twins")
def test_processors_that_no_chain_can_have_are_said_once(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    draft = Draft(tiny_model("llama", seed), "greedy")
    draft.drafter.proposer.processors.append(SuppressTokensLogitsProcessor([3]))
    with draft.lane.ready(), caplog.at_level(logging.INFO, logger="hf_pearl"):
        draft.admit(random.Random(seed), 0, 60)
        draft.steps(9)
    assert draft.runner.num_chains == 0 and draft.runner.num_replays > 4
    said = [each.getMessage() for each in caplog.records if "one by one" in each.getMessage()]
    assert len(said) == 1 and "SuppressTokensLogitsProcessor" in said[0]


@pytest.mark.usefixtures("twins")
def test_nobody_finds_a_prefix_behind_which_a_chain_met_a_nan(seed: int) -> None:
    model = tiny_model("llama", seed)
    draft = Draft(model, "greedy")
    draft.lane.prefix_cache, prompts = True, [(5, 6, 7, 8), (9, 10, 11, 12)]
    with draft.lane.ready():
        for request_id in (0, 1):
            draft.drafter.handle(Admission(request_id, prompts[request_id], 60, 0, None))
            draft.steps(5)
            if request_id:
                with torch.no_grad():
                    model.lm_head.weight[3] = torch.nan
                draft.steps(4)
            draft.drafter.handle(Removal(request_id))
            assert draft.runner.num_chains == 1 + 2 * request_id
        assert [draft.cache.index.find(prompt).num_tail_tokens for prompt in prompts] == [3, 0]


# -- calls ------------------------------------------------------------------------------------------------------------


def runner_of(target: PreTrainedModel) -> GraphRunner:
    """What captures the draft's steps."""
    (engine,) = engines_of(target)
    return engine.graphs._runners["draft"]


class Uncaptured(PearlConfig):
    """One launch per operation."""

    captures = False


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("execution", ["inline", "threads"])
def test_calls_with_chains_give_the_tokens_of_generate(
    execution: Any, batch_size: int, seed: int, captures: list[StrictCapture]
) -> None:
    """Also where a token of the answer is declared to end it; and they draft what calls without chains draft."""
    target = tiny_model("llama", seed)
    draft = noisy_copy(target, 0.03, seed)
    inputs = random_prompts(random.Random(seed), batch_size, (5, 20))
    settings: dict[str, Any] = {"draft_length": 4, "execution": execution, "attention": "triton"}
    arguments: dict[str, Any] = {"max_new_tokens": 26, "pad_token_id": 0}
    for _ in range(2):
        expected, output = assert_equal(target, draft, inputs, PearlConfig(**settings), **arguments)
    num_chains = runner_of(target).num_chains
    assert num_chains > 3
    assert_varied(expected)
    _, without = assert_equal(target, draft, inputs, Uncaptured(**settings), **arguments)
    assert runner_of(target).num_chains == num_chains
    counts = [
        (each.pearl.draft_steps, each.pearl.verified_draft_tokens, each.pearl.target_forwards)
        for each in (output, without)
    ]
    assert counts[0] == counts[1] and counts[0][1] > 0
    eos_token_id = int(expected[0, 11])
    ended, _ = assert_equal(target, draft, inputs, PearlConfig(**settings), eos_token_id=eos_token_id, **arguments)
    assert batch_size > 1 or ended.shape[1] <= 12
    assert_nothing_held(target)
    hf_pearl.release(target)
    assert [each.num_held for each in captures] == [0] * len(captures)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("length", [4, "auto"])
def test_sampled_tokens_are_the_same_with_chains(
    length: Any, batch_size: int, seed: int, twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "auto" the draft runs freely, in chains as long as they may be, so that verdicts come in the middle."""
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: RerunCapture())
    monkeypatch.setattr(chaining, "MOST_OF_A_CYCLE", 1e6)
    target = tiny_model("llama", seed)
    draft = noisy_copy(target, 0.05, seed)
    inputs = random_prompts(random.Random(seed), batch_size, (5, 9))
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 30, "assistant_model": draft}
    settings: dict[str, Any] = {"draft_length": length, "execution": "threads", "attention": "triton", "seed": 3}
    expected = target.generate(**inputs, **options, pearl=Uncaptured(**settings))
    assert_varied(expected[:, inputs["input_ids"].shape[1] :])
    for _ in range(2):
        assert target.generate(**inputs, **options, pearl=PearlConfig(**settings)).tolist() == expected.tolist()
    assert runner_of(target).num_chains > 0
    assert_nothing_held(target)


def test_rejection_sampling_draws_every_guess_by_itself(seed: int, captures: list[StrictCapture]) -> None:
    target = tiny_model("llama", seed)
    draft = noisy_copy(target, 0.05, seed)
    inputs = random_prompts(random.Random(seed), 1, (5,))
    config = PearlConfig(draft_length=4, execution="inline", attention="triton", seed=1, verification="rejection")
    target.generate(**inputs, do_sample=True, max_new_tokens=12, assistant_model=draft, pearl=config)
    assert runner_of(target).num_replays > 0 == runner_of(target).num_chains


# -- their parts ------------------------------------------------------------------------------------------------------


def test_what_follows_in_a_chain_is_known_beforehand() -> None:
    """The example of the docstring, beside a line of another sequence; both have room for three steps."""
    cache_rows = [_Row(11), _Row(20)]
    first = PackedWindows([1, 2, 3], [5, 5, 17], [0, 1, 2], [2, 1], [TreeMask(4, ((4, 5), (4, 6))), None])
    steps = chained(cache_rows, first, 3)  # type: ignore[arg-type]
    assert [each.trees for each in steps] == [
        [TreeMask(4, ((4, 5), (4, 6))), None],
        [TreeMask(4, ((4, 5, 7), (4, 6, 8))), None],
        [TreeMask(4, ((4, 5, 7, 9), (4, 6, 8, 10))), None],
    ]
    assert [each.positions for each in steps] == [[5, 5, 17], [6, 6, 18], [7, 7, 19]]
    assert all(each[4:] != first[4:] or each == first for each in steps) and steps[0] == first


class _Row:
    """What has the length of a sequence."""

    def __init__(self, length: int) -> None:
        self.length = length


def test_choosers_are_equal_where_they_choose_alike() -> None:
    def chooser(*processors: LogitsProcessor, num_guesses: int = 1) -> Any:
        return make_chooser(50, num_guesses, True, LogitsProcessorList(processors))

    warm = chooser(TemperatureLogitsWarper(0.7), TopKLogitsWarper(5))
    again = chooser(TemperatureLogitsWarper(0.7), TopKLogitsWarper(5))
    assert warm == again and hash(warm) == hash(again)
    others = [
        chooser(TemperatureLogitsWarper(0.8), TopKLogitsWarper(5)),
        chooser(TopKLogitsWarper(5), TemperatureLogitsWarper(0.7)),
        chooser(TemperatureLogitsWarper(0.7)),
        chooser(TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), num_guesses=2),
        chooser(TemperatureLogitsWarper(0.7), TopHLogitsWarper(0.4)),
    ]
    assert len({warm, *others}) == 6
    assert chooser(SuppressTokensLogitsProcessor([3])) is None  # It holds a tensor.
    assert chooser(RepetitionPenaltyLogitsProcessor(1.2)) is None  # It reads tokens.


def test_the_noise_of_rows_is_that_of_their_sources(seed: int) -> None:
    chance = random.Random(seed)
    rows, expected = [], []
    for _ in range(20):
        source_seed, stream, position = chance.getrandbits(64), chance.choice([0, 1, 2**32 - 1]), chance.getrandbits(31)
        rows.append(NoiseSource(source_seed, 1, stream=stream).row(position))
        expected.append(gumbel_noise(source_seed, position, 1, 1001, stream=stream))
    noise = noise_of_rows(torch.tensor(rows), 1001)
    differ = noise != torch.cat(expected)  # where a last bit of a float64 logarithm decides
    assert differ.sum() <= 1
    torch.testing.assert_close(noise, torch.cat(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("most", "length"), [(1, 1), (2, 2), (3, 2), (4, 4), (9, 4)])
def test_a_chain_is_as_long_as_it_may_be(most: int, length: int) -> None:
    assert chain_length(most) == length


def test_a_chain_ends_before_half_of_the_time_between_two_verdicts() -> None:
    now = 0.0
    times = VerdictTimes(lambda: now)
    assert times.num_steps(0.001) == 1
    times.hear(0), times.hear(1)
    assert times.num_steps(0.001) == 1  # Nobody knows yet how long the target takes.
    now = 0.010
    times.hear(0), times.hear(1)
    assert [times.num_steps(seconds) for seconds in (0.0, 0.001, 0.002, 0.004, 0.1)] == [1, 5, 2, 1, 1]
    times.forget(0)
    now = 5.0
    times.hear(0)  # Another request of that number begins.
    assert times.num_steps(0.001) == 5


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("choice", WARPERS)
def test_on_a_gpu_chains_guess_what_single_steps_guess(choice: str, width: int, seed: int) -> None:
    """Of the likeliest line: beside it, single steps grow other guesses than chains do."""
    model = tiny_model("llama", seed, dtype=torch.float32).to("cuda:0")
    drafts = [Draft(model, choice, width, capture=CudaCapture(torch.device("cuda:0"))) for _ in range(2)]
    lines = []
    with torch.cuda.stream(torch.cuda.Stream()), drafts[0].lane.ready(), drafts[1].lane.ready():
        for draft in drafts:
            draft.admit(random.Random(seed), 0, 100)
        for _ in range(6):
            for _ in range(8):
                drafts[1].drafter.step()
            drafts[0].drafter.step()
            drafts[0].steps(7)
            lines.append([line(draft.trees()[0], 3) for draft in drafts])
            for draft in drafts:
                draft.drafter.handle(Verdict(0, len(lines), (*lines[-1][1], 7)))
    assert all(chained_line == single_line for chained_line, single_line in lines)
    assert drafts[0].runner.num_chains > 3 and drafts[1].runner.num_chains == 0
    for draft in drafts:
        draft.runner.release()
