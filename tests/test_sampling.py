"""Sampled tokens are a function of target, processors, prompt and seed alone, and follow exactly the target's law."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from laws import chi_square_p_value, exact_law, law_holds
from models import (
    ARCHITECTURES,
    DRAFT_KINDS,
    EXECUTIONS,
    INLINE,
    DraftKind,
    assert_varied,
    enabled_for_tiny_models,
    make_draft,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from hf_pearl import PearlConfig
from hf_pearl.decoding.noise import gumbel_noise, request_seed


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_model("llama", 1)


@pytest.fixture(scope="module")
def drafts(target: PreTrainedModel) -> dict[DraftKind, PreTrainedModel]:
    return {kind: make_draft(target, kind, 2) for kind in DRAFT_KINDS}


@pytest.fixture(scope="module")
def draft(drafts: dict[DraftKind, PreTrainedModel]) -> PreTrainedModel:
    return drafts["noisy"]


def sample(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    inputs: dict[str, torch.Tensor],
    config: PearlConfig,
    **more: Any,
) -> Any:
    """Our output, as a dict."""
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, "return_dict_in_generate": True, **more}
    return target.generate(**inputs, **arguments, assistant_model=draft, pearl=config)


# The same tokens, whatever guesses them.

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.6},
    {"top_k": 8, "top_p": 0.9},
    {"temperature": 1.4, "min_p": 0.05},
    {"typical_p": 0.8, "repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2, "eta_cutoff": 0.01},
)


def run_invariance(seed: int, num_runs: int) -> None:
    """Draw calls at random; every one gives, with any draft and schedule, the tokens that it gives with none."""
    chance = random.Random(seed)
    rates = []
    for run in range(num_runs):
        if run % 10 == 0:
            target = tiny_model(chance.choice(list(ARCHITECTURES)), chance.getrandbits(32))
            kind = chance.choices(DRAFT_KINDS, weights=(1, 4, 1))[0]
            draft = make_draft(target, kind, chance.getrandbits(32), noise=0.003 * 100 ** chance.random())
        inputs = random_prompts(chance, chance.randint(1, 6), range(1, 40))
        settings = chance.choice(SETTINGS) | chance.choice(({}, {"eos_token_id": chance.sample(range(64), 3)}))
        config = PearlConfig(
            seed=chance.getrandbits(64),
            execution=chance.choice(("inline", "threads")),
            draft_length=chance.choice(("auto", *range(1, 17))),
            overlap=chance.random() < 0.7,
            prefix_cache=chance.random() < 0.7,
        )
        expected = sample(target, None, inputs, config, **settings).sequences
        output = sample(target, draft, inputs, config, **settings)
        assert output.sequences.tolist() == expected.tolist(), f"{run=} of {seed=}: {settings=} {config=}"
        if sum(output.pearl.judged_at) > 5:
            rates.append(output.pearl.acceptance_rate)
    assert {min(4, int(5 * rate)) for rate in rates} == set(range(5)), "not every fifth of the acceptance rates was hit"


def test_random_calls_give_the_same_tokens_with_any_draft_and_schedule_and_none(seed: int) -> None:
    run_invariance(seed, 200)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_two_thousand_random_calls_give_the_same_tokens_with_any_draft_and_none(part: int, seed: int) -> None:
    run_invariance(seed, 200)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("kind", DRAFT_KINDS)
def test_every_kind_of_draft_in_every_schedule(
    kind: DraftKind, execution: str, target: PreTrainedModel, drafts: dict[DraftKind, PreTrainedModel]
) -> None:
    """With the target itself as its draft every guess stands: both lanes see the same noise at the same positions."""
    draft = drafts[kind]
    inputs = random_prompts(random.Random(4), 4, range(1, 40))
    expected = sample(target, None, inputs, PearlConfig(seed=5)).sequences
    assert_varied(expected[:, -20:])
    for overlap in (True, False):
        for draft_length in (1, 5, 16, "auto"):
            config = PearlConfig(seed=5, execution=execution, overlap=overlap, draft_length=draft_length)
            output = sample(target, draft, inputs, config)
            assert output.sequences.tolist() == expected.tolist()
            if kind == "same" and sum(output.pearl.judged_at):
                assert output.pearl.acceptance_rate == 1


def test_a_row_s_tokens_depend_neither_on_its_padding_nor_on_the_other_rows(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    config = replace(INLINE, seed=6)
    alone = random_prompts(random.Random(7), 1, (5,))
    expected = sample(target, draft, alone, config).sequences[0, 5:]
    others = random_prompts(random.Random(8), 3, (9, 12))["input_ids"]
    length = others.shape[1]
    inputs = {
        "input_ids": torch.cat([torch.nn.functional.pad(alone["input_ids"], (length - 5, 0)), others]),
        "attention_mask": torch.cat([torch.arange(length)[None] >= length - 5, torch.ones(3, length)]).long(),
    }
    assert sample(target, draft, inputs, config).sequences[0, length:].tolist() == expected.tolist()


# Seeds.


def test_manual_seed_repeats_a_call_and_two_calls_in_a_row_differ(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    inputs = random_prompts(random.Random(9), 2, (5,))
    outputs = []
    for _ in range(2):
        torch.manual_seed(10)
        for guesser in (draft, None, target):
            outputs.append(sample(target, guesser, inputs, INLINE).sequences.tolist())
    assert outputs[:3] == outputs[3:]
    assert outputs[0] != outputs[1] != outputs[2] != outputs[0]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_explicit_seed_repeats_a_call_and_draws_nothing_from_torch(
    execution: str, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    inputs = random_prompts(random.Random(11), 2, (5,))
    before = torch.get_rng_state()
    outputs = []
    for seed in (0, 0, 1, 2**64 - 1):
        config = PearlConfig(seed=seed, execution=execution)
        outputs.append(sample(target, draft, inputs, config).sequences.tolist())
    assert outputs[0] == outputs[1]
    assert len({str(each) for each in outputs}) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_prompts_in_one_batch_give_different_rows(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = {name: each.expand(8, -1) for name, each in random_prompts(random.Random(12), 1, (5,)).items()}
    rows = sample(target, draft, inputs, INLINE).sequences[:, 5:].tolist()
    assert len({tuple(row) for row in rows}) == 8
    assert len({row[0] for row in rows}) > 2
    config = replace(INLINE, seed=1)
    one = {name: each[:1] for name, each in inputs.items()}
    returned = sample(target, draft, one, config, num_return_sequences=8).sequences.tolist()
    assert returned == sample(target, draft, inputs, config).sequences.tolist()


# The noise is the law.


class NoiseProcessor(LogitsProcessor):
    """Adds the noise of every row's next position: stock greedy decoding then takes our sampled tokens."""

    def __init__(self, call_seed: int, paddings: list[int]) -> None:
        self.seeds = [request_seed(call_seed, row) for row in range(len(paddings))]
        self.paddings = paddings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        length, vocab_size = input_ids.shape[1], scores.shape[1]
        rows = zip(self.seeds, self.paddings, strict=True)
        return scores + torch.cat([gumbel_noise(seed, length - padding, 1, vocab_size) for seed, padding in rows])


def draw_warpers(chance: random.Random) -> tuple[dict[str, Any], list[LogitsProcessor]]:
    """Settings of a sampled call, and the processors that transformers makes of them, in its order."""
    temperature, top_k, top_p = chance.choice((0.5, 0.8, 1.3)), chance.choice((3, 10, 50)), chance.choice((0.5, 0.9))
    min_p, typical = chance.choice((0.02, 0.2)), chance.choice((0.5, 0.9))
    warpers = {
        "temperature": (temperature, TemperatureLogitsWarper(temperature)),
        "top_k": (top_k, TopKLogitsWarper(top_k)),
        "top_p": (top_p, TopPLogitsWarper(top_p)),
        "min_p": (min_p, MinPLogitsWarper(min_p)),
        "typical_p": (typical, TypicalLogitsWarper(typical)),
    }
    drawn = {name: each for name, each in warpers.items() if chance.random() < 0.4}
    return {name: value for name, (value, _) in drawn.items()}, [warper for _, warper in drawn.values()]


def run_reference(seed: int, num_runs: int) -> None:
    """Draw sampled calls at random, and compare each with stock greedy decoding under our noise."""
    chance = random.Random(seed)
    num_varied = 0
    for run in range(num_runs):
        if run % 10 == 0:
            target = tiny_model(chance.choice(list(ARCHITECTURES)), chance.getrandbits(32))
            draft = noisy_copy(target, 0.003 * 100 ** chance.random(), chance.getrandbits(32))
        inputs = random_prompts(chance, chance.randint(1, 6), range(1, 40))
        config = replace(INLINE, seed=chance.getrandbits(64), draft_length=chance.choice(("auto", 1, 3, 7)))
        warper_settings, warpers = draw_warpers(chance)
        common: dict[str, Any] = {"max_new_tokens": 15, "eos_token_id": chance.sample(range(64), 2), "pad_token_id": 0}
        common |= chance.choice(({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 8}))
        noise = NoiseProcessor(config.seed or 0, (inputs["attention_mask"] == 0).sum(dim=1).tolist())
        processors = LogitsProcessorList([*warpers, noise])
        expected = target.generate(**inputs, **common, do_sample=False, logits_processor=processors)
        output = sample(target, draft, inputs, config, **common, **warper_settings).sequences
        assert output.tolist() == expected.tolist(), f"{run=} of {seed=}: {common=} {warper_settings=} {config=}"
        num_varied += len(set(expected[:, inputs["input_ids"].shape[1] :].flatten().tolist())) > 5
    assert num_varied > 0.5 * num_runs


def test_stock_greedy_decoding_with_our_noise_as_a_processor_gives_our_sampled_tokens(seed: int) -> None:
    run_reference(seed, 200)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_a_length_criterion_of_the_user_ends_sampled_answers(
    verification: str, settings: dict[str, Any], target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """Earlier than the config's limit, or later."""
    inputs = random_prompts(random.Random(13), 3, range(1, 20))
    length = inputs["input_ids"].shape[1]
    config = replace(INLINE, seed=14, draft_length=4, verification=verification)
    for limit in (length + 7, length + 30):
        criteria = {"stopping_criteria": [MaxLengthCriteria(limit)]}
        output = sample(target, draft, inputs, config, **criteria, **settings).sequences
        assert output.shape[1] == limit
        if verification == "coupled":
            noise = NoiseProcessor(14, (inputs["attention_mask"] == 0).sum(dim=1).tolist())
            arguments = {**criteria, **settings, "max_new_tokens": 20, "logits_processor": [noise]}
            assert output.tolist() == target.generate(**inputs, do_sample=False, **arguments).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_five_thousand_stock_greedy_calls_with_our_noise_give_our_sampled_tokens(part: int, seed: int) -> None:
    run_reference(seed, 500)


# The law of whole answers.

ROWS_PER_CALL = 1000


@dataclass(frozen=True)
class LawCase:
    """A target of a small vocabulary with a draft, and how it is sampled."""

    architecture: str
    vocab_size: int
    num_tokens: int
    kind: DraftKind
    config: PearlConfig
    settings: dict[str, Any]
    processors: tuple[LogitsProcessor, ...] = ()


def flat_model(architecture: str, seed: int, vocab_size: int) -> PreTrainedModel:
    """A tiny model whose next token is hard to foresee: many answers are about as likely."""
    model = tiny_model(architecture, seed, vocab_size)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.4)
    return model


def draw_law_case(chance: random.Random, index: int) -> LawCase:
    """The `index`-th of a series in which every execution, kind of draft and schedule has its turn."""
    vocab_size, num_tokens = ((5, 4), (6, 3), (7, 3), (8, 3))[index % 4]
    config = PearlConfig(
        execution=("threads", "inline")[index // 2 % 2],
        draft_length=("auto", 2, 3, 1)[index // 3 % 4],
        overlap=index % 5 < 2,
        prefix_cache=False,
    )
    settings: dict[str, Any] = {"max_new_tokens": num_tokens}
    processors: list[LogitsProcessor] = []
    if index % 3 == 1:
        settings |= {"temperature": 0.7, "top_k": vocab_size - 1}
        processors += [TemperatureLogitsWarper(0.7), TopKLogitsWarper(vocab_size - 1)]
    if index % 4 == 3:
        settings["top_p"] = 0.95
        processors.append(TopPLogitsWarper(0.95))
    if index % 4 == 2:
        settings |= {"eos_token_id": vocab_size - 1, "pad_token_id": 0}
    kind = ("noisy", "unrelated", "noisy", "noisy", "same")[index % 5]
    architecture = chance.choice(list(ARCHITECTURES))
    return LawCase(architecture, vocab_size, num_tokens, kind, config, settings, tuple(processors))


def count_outcomes(
    case: LawCase,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompt: list[int],
    seeds: random.Random,
    num_samples: int,
) -> tuple[Counter[tuple[int, ...]], int, int]:
    """Sample rows of large batches through the whole loop; count answers, guesses judged, and guesses that stood."""
    counts: Counter[tuple[int, ...]] = Counter()
    ids = torch.tensor([prompt] * ROWS_PER_CALL)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    end, num_stood, num_judged = case.settings.get("eos_token_id"), 0, 0
    for _ in range(0, num_samples, ROWS_PER_CALL):
        output = sample(target, draft, inputs, replace(case.config, seed=seeds.getrandbits(64)), **case.settings)
        for row in output.sequences[:, len(prompt) :].tolist():
            counts[tuple(row[: row.index(end) + 1] if end in row else row)] += 1
        num_stood += output.pearl.accepted_tokens
        num_judged += sum(output.pearl.judged_at)
    return counts, num_judged, num_stood


def assert_law(seed: int, index: int, num_samples: int, num_laws: int) -> None:
    chance = random.Random(f"{seed} {index}")
    case = draw_law_case(chance, index)
    target = flat_model(case.architecture, chance.getrandbits(32), case.vocab_size)
    draft = make_draft(target, case.kind, chance.getrandbits(32), noise=0.3)
    prompt = [chance.randrange(case.vocab_size - 1) for _ in range(chance.randint(1, 4))]
    processors = LogitsProcessorList(case.processors)
    law = exact_law(target, prompt, case.num_tokens, processors, case.settings.get("eos_token_id"))

    def p_value(stage: int, num_samples: int) -> float:
        seeds = random.Random(f"{seed} {index} {stage}")
        counts, num_judged, num_stood = count_outcomes(case, target, draft, prompt, seeds, num_samples)
        # What an unrelated draft guesses beside forwards may be known to be wrong before it could be verified.
        if case.config.draft_length in (2, 3) and case.kind != "unrelated":
            assert 0 < num_stood < num_judged or (case.kind == "same" and num_stood == num_judged > 0)
        return chi_square_p_value(counts, law)

    assert law_holds(p_value, num_samples, num_laws), f"law {index} of {seed=}: {case}"


@pytest.mark.parametrize("index", range(12))
def test_whole_answers_follow_the_law_of_the_target(index: int, seed: int) -> None:
    """Chi-square of the counts of 3 or 4 tokens' joint outcomes against enumeration; 5,000 answers, then 20,000.

    p < 1e-3 / 12 leads to the second stage, p < 1e-4 / 12 there fails: false-alarm rate below 1e-8 for all laws.
    """
    assert_law(seed, index, 5_000, num_laws=12)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(100))
def test_a_hundred_laws_of_whole_answers(index: int, seed: int) -> None:
    """As above, with 20,000 answers, then 80,000; thresholds 1e-3 / 100 and 1e-4 / 100."""
    assert_law(seed, index, 20_000, num_laws=100)


def test_the_test_of_laws_can_fail() -> None:
    """Counts of the draft's law, and of the target's with one pair of tokens exchanged, are told apart."""
    target = flat_model("llama", 13, 5)
    draft = noisy_copy(target, 0.3, 14)
    laws = [exact_law(model, [1, 2], 3, LogitsProcessorList()) for model in (target, draft)]
    outcomes = list(laws[0])
    generator = torch.Generator().manual_seed(15)
    drawn = torch.multinomial(torch.tensor(list(laws[0].values())), 5_000, replacement=True, generator=generator)
    counts = Counter(outcomes[index] for index in drawn.tolist())
    assert chi_square_p_value(counts, laws[0]) > 1e-4
    assert chi_square_p_value(counts, laws[1]) < 1e-6
    exchanged = Counter({(b, a, c): count for (a, b, c), count in counts.items()})
    assert chi_square_p_value(exchanged, laws[0]) < 1e-6
    assert chi_square_p_value(counts, {outcome: float(outcome == (0, 0, 0)) for outcome in outcomes}) == 0
