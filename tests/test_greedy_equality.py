"""Greedy decoding gives the tokens of transformers' own `generate`, in float64, whatever the draft and the schedule."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from callbacks import AllowedTokens, CallCriterion, CountingProcessor, SumCriterion
from fuzz import run_fuzz
from models import (
    ARCHITECTURES,
    DRAFT_KINDS,
    EXECUTIONS,
    IN_PROCESS,
    SLIDING_WINDOW,
    VOCAB_SIZE,
    DraftKind,
    assert_equal,
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    left_padded,
    make_draft,
    noisy_copy,
    random_prompts,
    tiny_model,
    tiny_tokenizer,
)
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedModel,
    SequenceBiasLogitsProcessor,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from hf_pearl import PearlConfig

# Random calls in the normal tier, 500 in all: pairs of models, and calls on each.
NUM_CASES = {"inline": (64, 5), "threads": (24, 5), "processes": (5, 12)}

INLINE = PearlConfig(execution="inline")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_model("llama", 1)


@pytest.fixture(scope="module")
def drafts(target: PreTrainedModel) -> dict[DraftKind, PreTrainedModel]:
    return {kind: make_draft(target, kind, 2, noise=0.03) for kind in DRAFT_KINDS}


@pytest.fixture(scope="module")
def draft(drafts: dict[DraftKind, PreTrainedModel]) -> PreTrainedModel:
    """Right about three times in four."""
    return drafts["noisy"]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_random_calls(execution: str, seed: int) -> None:
    run_fuzz(seed, execution, *NUM_CASES[execution])


@pytest.mark.slow
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("part", range(7))
def test_ten_thousand_random_calls(part: int, execution: str, seed: int) -> None:
    run_fuzz(seed, execution, *{"inline": (140, 5), "threads": (120, 5), "processes": (8, 18)}[execution])


# Models and drafts.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str, seed: int) -> None:
    target = tiny_model(architecture, seed)
    draft = noisy_copy(target, 0.03, seed)
    inputs = random_prompts(random.Random(seed), 3, (5, SLIDING_WINDOW, 40))
    for draft_length in (1, 2, 3, 5, 8, 12, 16, "auto"):
        # With one draft step beside every forward, what was guessed is known before it could be verified.
        config = replace(INLINE, draft_length=draft_length, overlap=draft_length != 1)
        expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=2 * SLIDING_WINDOW)
        assert_varied(expected)
        assert draft_length == "auto" or 0 < output.pearl.acceptance_rate < 1
    assert_nothing_held(target)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", DRAFT_KINDS)
def test_every_kind_of_draft(
    kind: DraftKind, overlap: bool, execution: str, target: PreTrainedModel, drafts: dict[DraftKind, PreTrainedModel]
) -> None:
    draft = drafts[kind]
    inputs = random_prompts(random.Random(4), 8, range(1, 30))
    for draft_length in (1, 4, 16, "auto"):
        config = PearlConfig(draft_length=draft_length, overlap=overlap, execution=execution)
        expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=30)
        assert_varied(expected)
        if kind == "same" and draft_length in (4, 16):
            assert output.pearl.acceptance_rate == 1
            assert output.pearl.mean_accepted_tokens > 1


def test_no_draft_is_plain_decoding(target: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(5), 3, range(1, 30))
    expected, output = assert_equal(target, None, inputs, max_new_tokens=30)
    assert_varied(expected)
    assert output.pearl.mean_accepted_tokens == 1
    assert output.pearl.draft_steps == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drafts_of_another_dtype(dtype: torch.dtype, target: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(6), 3, range(1, 30))
    draft = noisy_copy(target, 0.01, 2, dtype=dtype)
    expected, output = assert_equal(target, draft, inputs, replace(INLINE, draft_length=4), max_new_tokens=30)
    assert_varied(expected)
    assert output.pearl.acceptance_rate > 0.3


@pytest.mark.parametrize("execution", IN_PROCESS)
@pytest.mark.parametrize("draft_vocab_size", [VOCAB_SIZE - 6, VOCAB_SIZE + 20])
def test_drafts_with_a_vocabulary_padded_to_another_size(
    draft_vocab_size: int, execution: str, target: PreTrainedModel
) -> None:
    """The draft meets tokens that it does not know, in the prompt and in the answer, and guesses some the target

    does not know.
    """
    draft = noisy_copy(target, 0.01, 2, draft_vocab_size)
    with torch.no_grad():
        draft.get_output_embeddings().weight[VOCAB_SIZE:].mul_(3)
    inputs = random_prompts(random.Random(7), 3, range(20, 30))
    config = PearlConfig(draft_length=4, execution=execution)
    expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=30)
    assert_varied(expected)
    assert output.pearl.acceptance_rate > 0
    known = min(draft_vocab_size, VOCAB_SIZE)
    assert (expected >= known).any() or draft_vocab_size > VOCAB_SIZE
    assert (inputs["input_ids"] >= known).any() or draft_vocab_size > VOCAB_SIZE


def test_a_draft_with_fewer_positions_than_the_answer_needs(target: PreTrainedModel) -> None:
    draft = tiny_model("gpt2", 3, n_positions=32)
    inputs = random_prompts(random.Random(8), 3, (5, 20, 40))
    for draft_length in (1, 8, "auto"):
        expected, _ = assert_equal(target, draft, inputs, replace(INLINE, draft_length=draft_length), max_new_tokens=40)
        assert_varied(expected)


# Prompts.


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_prompts_of_one_token(architecture: str) -> None:
    target = tiny_model(architecture, 9)
    draft = noisy_copy(target, 0.03, 2)
    for rows in ([[5]], [[5], [6], [7]], [[5], [6, 7, 8, 9]]):
        expected, _ = assert_equal(target, draft, left_padded(rows), max_new_tokens=20)
        assert_varied(expected)


def test_no_prompt_begins_with_the_bos_token(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    arguments = {"bos_token_id": 7, "max_new_tokens": 20, "do_sample": False}
    expected = target.generate(**arguments)
    assert target.generate(**arguments, assistant_model=draft, pearl=INLINE).tolist() == expected.tolist()


def test_without_a_mask_and_with_one_inferred_from_the_pad_token(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    for rows in ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 4, 5], [6, 7]]):
        inputs = {"input_ids": left_padded(rows)["input_ids"]}
        assert_varied(assert_equal(target, draft, inputs, max_new_tokens=20)[0])


def test_equal_rows_and_rows_that_share_a_prefix(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    chance = random.Random(10)
    prefix = [chance.randrange(1, VOCAB_SIZE) for _ in range(70)]
    rows = [prefix, prefix, prefix[:64], prefix[:33], [*prefix[:40], 1, 2], [*prefix[:40], 2, 1]]
    for _ in range(2):  # cold and warm
        assert_equal(target, draft, left_padded(rows), max_new_tokens=40)


def test_prompts_longer_than_one_forward(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """4096 tokens of the target or 1024 per row of the draft are computed at once: at, below and above the limits.

    A piece whose logits nobody wants crashed a forward, and then the verifier.
    """
    long_target = tiny_model("mistral", 1, num_hidden_layers=1, max_position_embeddings=5000)
    long_draft = noisy_copy(long_target, 0.03, 2)
    chance = random.Random(11)
    config = replace(INLINE, prefix_cache=False, draft_length=4)
    for lengths in ((4097,), (2500, 2000, 7), (4095, 1, 1)):
        rows = [[chance.randrange(1, VOCAB_SIZE) for _ in range(length)] for length in lengths]
        assert_equal(long_target, long_draft, left_padded(rows), config, max_new_tokens=6)
    rows = [[chance.randrange(1, VOCAB_SIZE) for _ in range(300)] for _ in range(14)]
    assert_varied(assert_equal(target, draft, left_padded(rows), config, max_new_tokens=6)[0])


# Processors.

PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.5},
    "no repeated n-gram": {"no_repeat_ngram_size": 2},
    "no repeated token": {"no_repeat_ngram_size": 1},
    "suppressed tokens": {"suppress_tokens": list(range(0, 64, 3))},
    "suppressed tokens at the beginning": {"begin_suppress_tokens": list(range(0, 64, 2))},
    "sequence bias": {"sequence_bias": {(token,): 4.0 for token in range(0, 64, 5)}},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "encoder repetition penalty": {"encoder_repetition_penalty": 2.0},
    "encoder n-grams": {"encoder_no_repeat_ngram_size": 1},
    "forced end": {"forced_eos_token_id": 1, "eos_token_id": 1},
}


@pytest.mark.parametrize("arguments", [pytest.param(each, id=name) for name, each in PROCESSORS.items()])
def test_every_processor(arguments: dict[str, Any], target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(12), 4, range(10, 30))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=30)[:, -30:]
    for guesser in (draft, target):
        for config in (replace(INLINE, draft_length=5), INLINE):
            expected, _ = assert_equal(target, guesser, inputs, config, max_new_tokens=30, **arguments)
            assert_varied(expected)
            assert expected.tolist() != plain.tolist(), "the processor changes nothing"


def test_bad_words_and_minimal_lengths(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(13), 4, range(10, 30))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=30)[:, -30:].tolist()
    ends = {"eos_token_id": [row[3] for row in plain]}
    length = inputs["input_ids"].shape[1]
    for arguments in (
        {"bad_words_ids": [[plain[0][2]], plain[1][4:6], plain[2][7:10]]},
        {**ends, "min_new_tokens": 10},
        {**ends, "min_length": length + 6},
        {**ends, "exponential_decay_length_penalty": (5, 1.5)},
    ):
        for guesser in (draft, target):
            expected, _ = assert_equal(target, guesser, inputs, max_new_tokens=30, **arguments)
            assert expected.tolist() != plain


@pytest.mark.parametrize("arguments", [{"sequence_bias": {(5,): 4.0, (6, 7): 9.0}}, {"bad_words_ids": [[5], [6, 7]]}])
def test_a_processor_that_makes_its_tensors_at_its_first_call_belongs_to_one_thread(
    arguments: dict[str, Any], target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a moment at which it has no bias yet: the target must not call it then."""
    made: list[tuple[str, SequenceBiasLogitsProcessor]] = []
    make = SequenceBiasLogitsProcessor._prepare_bias_variables

    def note_and_make(self: SequenceBiasLogitsProcessor, scores: torch.Tensor) -> None:
        made.append((threading.current_thread().name, self))
        make(self, scores)

    inputs = random_prompts(random.Random(27), 2, (3, 9))
    expected = target.generate(**inputs, **arguments, do_sample=False, max_new_tokens=20)
    monkeypatch.setattr(SequenceBiasLogitsProcessor, "_prepare_bias_variables", note_and_make)
    config = PearlConfig(execution="threads", draft_length=4)
    output = target.generate(
        **inputs, **arguments, do_sample=False, max_new_tokens=20, assistant_model=draft, pearl=config
    )
    assert output.tolist() == expected.tolist()
    assert sorted(name for name, _ in made) == ["MainThread", "hf_pearl draft lane"]
    assert made[0][1] is not made[1][1]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_processors_of_the_user_are_called_once_per_token_on_the_prefix_of_that_token(
    execution: str, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """One with a state of its own sees exactly what transformers shows it, however many tokens stand at once."""
    inputs = random_prompts(random.Random(14), 4, range(10, 30))
    for draft_length in (1, 6, "auto"):
        theirs, ours = CountingProcessor(0.5), CountingProcessor(0.5)
        arguments = {**inputs, "do_sample": False, "max_new_tokens": 30, "eos_token_id": [11, 12]}
        expected = target.generate(**arguments, logits_processor=[theirs])
        output = target.generate(
            **arguments,
            logits_processor=[ours],
            assistant_model=draft,
            pearl=PearlConfig(draft_length=draft_length, execution=execution),
            return_dict_in_generate=True,
        )
        assert output.sequences.tolist() == expected.tolist()
        assert ours.seen == theirs.seen


def test_functions_of_allowed_tokens_are_called_once_per_row_and_token(target: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(15), 3, range(10, 30))
    theirs, ours = AllowedTokens(VOCAB_SIZE), AllowedTokens(VOCAB_SIZE)
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 20}
    expected = target.generate(**arguments, prefix_allowed_tokens_fn=theirs)
    assert_varied(expected[:, -20:])
    output = target.generate(**arguments, prefix_allowed_tokens_fn=ours, assistant_model=target, pearl=INLINE)
    assert output.tolist() == expected.tolist()
    assert ours.seen == theirs.seen


# Stop rules.


@pytest.mark.parametrize("draft_length", [1, 3, 8, "auto"])
@pytest.mark.parametrize("kind", ["noisy", "same"])
def test_an_end_of_text_token_anywhere_in_a_stretch(
    kind: DraftKind, draft_length: int | str, target: PreTrainedModel
) -> None:
    """Each token of plain greedy decoding is declared to be one in turn: with a draft that is always right this ends

    every answer inside a stretch, at its end, and at the bonus token.
    """
    draft = make_draft(target, kind, 3, noise=0.01)
    inputs = random_prompts(random.Random(16), 1, (12,))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=24)[0, 12:].tolist()
    lengths = set()
    for token in plain:
        config = replace(INLINE, draft_length=draft_length)
        expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=24, eos_token_id=token)
        assert expected[0, -1] == token
        assert output.pearl.generated_tokens == expected.shape[1]
        lengths.add(expected.shape[1])
    assert len(lengths) > 12


@pytest.mark.parametrize("pad_token_id", [None, 0, 33])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_rows_end_at_different_times_and_are_padded_as_in_generate(
    execution: str, pad_token_id: int | None, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    inputs = random_prompts(random.Random(17), 6, range(1, 20))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=30)[:, -30:]
    ends = [int(plain[row, 5 * row]) for row in range(6)]
    config = PearlConfig(draft_length=5, execution=execution)
    arguments: dict[str, Any] = {"eos_token_id": ends, "pad_token_id": pad_token_id, "max_new_tokens": 30}
    for guesser in (draft, target):
        expected, _ = assert_equal(target, guesser, inputs, config, **arguments)
        lengths = {int(torch.isin(row, torch.tensor(ends)).int().argmax()) for row in expected}
        assert len(lengths) > 2


@pytest.mark.parametrize("draft_length", [1, 4, "auto"])
def test_a_stop_string_anywhere_in_a_stretch(draft_length: int | str, target: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer(0)
    inputs = random_prompts(random.Random(18), 1, (12,))
    text = tokenizer.decode(target.generate(**inputs, do_sample=False, max_new_tokens=24)[0, 12:])
    lengths = set()
    for start in range(len(text) - 3):
        config = replace(INLINE, draft_length=draft_length)
        strings = {"stop_strings": ["zz", text[start : start + 3]], "tokenizer": tokenizer}
        expected, _ = assert_equal(target, target, inputs, config, max_new_tokens=24, **strings)
        lengths.add(expected.shape[1])
    assert len(lengths) > 10


def test_stop_strings_in_a_batch_with_and_without_end_of_text_tokens(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    tokenizer = tiny_tokenizer(0)
    inputs = random_prompts(random.Random(19), 4, range(1, 20))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=24)[:, -24:]
    strings = {"stop_strings": [tokenizer.decode(plain[1])[8:11], tokenizer.decode(plain[2])[15:17]]}
    for ends in ({}, {"eos_token_id": int(plain[0, 6])}):
        expected, _ = assert_equal(target, draft, inputs, max_new_tokens=24, tokenizer=tokenizer, **strings, **ends)
        assert (expected.tolist() != plain.tolist()) == bool(ends), "ended rows go on, unless there is something to pad"


class Holding(BaseStreamer):
    """Says that its call has begun, and lets it go on when it is told to."""

    def __init__(self) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def put(self, value: torch.Tensor) -> None:
        self.has_begun.set()
        assert self.may_go_on.wait(60.0)

    def end(self) -> None:
        pass


def test_the_model_s_own_stop_strings_hold_for_every_thread(draft: PreTrainedModel) -> None:
    """They are hidden from transformers while it prepares a call, not for as long as the call takes."""
    target, tokenizer = tiny_model("llama", 1), tiny_tokenizer(0)
    inputs = random_prompts(random.Random(18), 1, (12,))
    text = tokenizer.decode(target.generate(**inputs, do_sample=False, max_new_tokens=24)[0, 12:])
    target.generation_config.stop_strings = [text[9:12]]
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 24, "tokenizer": tokenizer}
    expected = target.generate(**arguments)
    assert 12 < expected.shape[1] < 36
    streamer, outputs = Holding(), []

    def call(**others: Any) -> None:
        outputs.append(target.generate(**arguments, **others))

    threads = [threading.Thread(target=call, kwargs={"pearl": INLINE, "streamer": streamer})]
    threads[0].start()
    assert streamer.has_begun.wait(60.0)
    second = Holding()
    second.may_go_on.set()
    threads.append(threading.Thread(target=call, kwargs={"pearl": INLINE, "streamer": second}))
    threads[-1].start()
    assert second.has_begun.wait(60.0)
    threads.append(threading.Thread(target=call, kwargs={"pearl": False}))
    threads[-1].start()
    threads[-1].join(60.0)
    streamer.may_go_on.set()
    for thread in threads:
        thread.join(60.0)
    assert [each.tolist() for each in outputs] == [expected.tolist()] * 3
    assert target.generation_config.stop_strings == [text[9:12]]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("ends", [{}, {"eos_token_id": [11, 12, 13]}])
def test_criteria_of_the_user_are_asked_after_every_token(
    ends: dict[str, Any], execution: str, target: PreTrainedModel
) -> None:
    """Also those that end rows one by one, and also where no end-of-text token is there to pad ended rows with."""
    inputs = random_prompts(random.Random(20), 4, range(1, 20))
    arguments = {**inputs, **ends, "do_sample": False, "max_new_tokens": 30}
    for make in (lambda: SumCriterion(9), lambda: CallCriterion(14)):
        theirs, ours = make(), make()
        expected = target.generate(**arguments, stopping_criteria=[theirs])
        config = PearlConfig(draft_length=6, execution=execution)
        output = target.generate(**arguments, stopping_criteria=[ours], assistant_model=target, pearl=config)
        assert output.tolist() == expected.tolist()
        assert ours.seen == theirs.seen


def test_every_limit_on_new_tokens(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(21), 3, (3, 9))
    length = inputs["input_ids"].shape[1]
    for num_new in (*range(1, 13), 33):
        for guesser in (draft, target):
            for config in (replace(INLINE, draft_length=4), INLINE):
                expected, _ = assert_equal(target, guesser, inputs, config, max_new_tokens=num_new)
                assert expected.shape[1] == num_new
                assert_equal(target, guesser, inputs, config, max_length=length + num_new)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("arguments", [{}, {"repetition_penalty": 1.3}, {"eos_token_id": [11, 12]}])
def test_a_length_criterion_of_the_user_takes_the_place_of_the_config_s(
    arguments: dict[str, Any], execution: str, target: PreTrainedModel
) -> None:
    """Whether it ends earlier or later, or is fulfilled by the prompt; of several, the least counts."""
    inputs = random_prompts(random.Random(24), 3, (3, 9))
    length = inputs["input_ids"].shape[1]
    for limits in ((length + 7,), (length + 40,), (1,), (length + 11, length + 30), (length + 30, length + 11)):
        for draft_length in (5, "auto"):
            config = PearlConfig(draft_length=draft_length, execution=execution)
            criteria = {"stopping_criteria": [MaxLengthCriteria(limit) for limit in limits]}
            expected, _ = assert_equal(target, target, inputs, config, max_new_tokens=20, **criteria, **arguments)
            if "eos_token_id" not in arguments:
                assert expected.shape[1] == max(1, min(limits) - length)


def test_that_a_criterion_takes_another_s_place_is_said_as_often_as_in_generate(
    target: PreTrainedModel, draft: PreTrainedModel, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.get_logger("transformers.generation.utils")
    inputs = random_prompts(random.Random(25), 2, (3, 9))
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 9, "stopping_criteria": [MaxLengthCriteria(15)]}
    said = []
    for more in ({}, {"assistant_model": draft, "pearl": INLINE}):
        logger.warning_once.cache_clear()
        caplog.clear()
        with caplog.at_level("WARNING"):
            logging.enable_propagation()
            try:
                target.generate(**arguments, **more)
            finally:
                logging.disable_propagation()
        said.append([record.getMessage() for record in caplog.records])
    assert said[0] == said[1]
    assert any("MaxLengthCriteria" in message for message in said[0])


def test_a_length_criterion_of_the_user_must_be_whole(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(26), 1, (3,))
    for limit in (9.5, float("nan")):
        criteria = [MaxLengthCriteria(limit)]  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"`MaxLengthCriteria` says, is {limit}. Pass an int"):
            target.generate(**inputs, stopping_criteria=criteria, assistant_model=draft, pearl=INLINE)


def test_settings_in_a_config_in_the_model_s_own_and_overridden_by_none(draft: PreTrainedModel) -> None:
    """`eos_token_id=None` takes back what the model's own config says, as in `generate`."""
    target = tiny_model("llama", 1)
    inputs = random_prompts(random.Random(23), 3, (3, 9))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=20)[:, -20:].tolist()
    target.generation_config.eos_token_id = [row[5] for row in plain]
    target.generation_config.repetition_penalty = 1.1
    own, _ = assert_equal(target, draft, inputs, max_new_tokens=20)
    assert own.tolist() != plain
    taken_back, _ = assert_equal(target, draft, inputs, max_new_tokens=20, eos_token_id=None, repetition_penalty=None)
    assert taken_back.tolist() == plain
    tokenizer = tiny_tokenizer(0)
    given = GenerationConfig(
        max_new_tokens=20, eos_token_id=plain[0][9], stop_strings=[tokenizer.decode(plain[1][7:9])], pad_token_id=3
    )
    configured, _ = assert_equal(target, draft, inputs, generation_config=given, tokenizer=tokenizer)
    assert configured.tolist() not in (own.tolist(), plain)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_time_limit_ends_an_answer_early_with_a_prefix_of_it(
    execution: str, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """With no time at all it is one token, as in `generate`; in between, where it ends is the clock's business."""
    inputs = random_prompts(random.Random(22), 2, (3, 9))
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 400}
    whole = target.generate(**arguments)
    config = PearlConfig(execution=execution)
    for max_time in (1e-9, 0.05, 1e6):
        output = target.generate(**arguments, max_time=max_time, assistant_model=draft, pearl=config)
        assert output.tolist() == whole[:, : output.shape[1]].tolist()
        if max_time < 1e-6:
            assert output.shape[1] == inputs["input_ids"].shape[1] + 1
        if max_time == 1e6:
            assert output.shape == whole.shape
