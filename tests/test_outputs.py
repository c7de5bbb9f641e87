"""What comes back besides the tokens: streams, scores, logits, statistics; and that nothing of the caller's changes."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from callbacks import RecordingStreamer
from models import (
    EXECUTIONS,
    IN_PROCESS,
    VOCAB_SIZE,
    assert_varied,
    enabled_for_tiny_models,
    noisy_copy,
    random_prompts,
    tiny_model,
    tiny_tokenizer,
)
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, TextIteratorStreamer, TextStreamer
from transformers.generation import GenerateDecoderOnlyOutput

from hf_pearl import PearlConfig, PearlGenerateOutput, PearlStats, generation

INLINE = PearlConfig(execution="inline", draft_length=5)
TIMEOUT = 60.0  # seconds


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return tiny_model("llama", 1)


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel) -> PreTrainedModel:
    """Right about three times in four."""
    return noisy_copy(target, 0.03, 2)


# Streamers.


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_streamer_gets_the_prompt_and_then_every_token_once_and_in_order(
    execution: str, batch_size: int, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """Also where an end-of-text token lies inside a stretch: nothing behind it is shown."""
    inputs = random_prompts(random.Random(3), batch_size, range(1, 20))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=30)[:, -30:]
    assert_varied(plain)
    for ends in ({}, {"eos_token_id": int(plain[0, 13])}):
        arguments = {**inputs, **ends, "do_sample": False, "max_new_tokens": 30}
        theirs, ours = RecordingStreamer(), RecordingStreamer()
        expected = target.generate(**arguments, streamer=theirs)
        config = replace(INLINE, execution=execution)
        guesser = target if execution == "inline" else draft
        output = target.generate(**arguments, streamer=ours, assistant_model=guesser, pearl=config)
        assert output.tolist() == expected.tolist()
        assert ours.seen == theirs.seen
        assert ours.seen[0] == inputs["input_ids"].tolist()
        assert ours.seen.index("end") == len(ours.seen) - 1
        generated = output[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(torch.tensor(ours.seen[1:-1]).T, generated)


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_text_streamers_of_transformers(
    skip_prompt: bool, target: PreTrainedModel, draft: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer(0)
    arguments = {**tokenizer("abc def", return_tensors="pt"), "do_sample": False, "max_new_tokens": 30}
    arguments.pop("token_type_ids", None)
    target.generate(**arguments, streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))
    expected = capsys.readouterr().out
    assert len(set(expected)) > 4
    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt)
    target.generate(**arguments, streamer=streamer, assistant_model=draft, pearl=INLINE)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_an_iterator_of_text_in_another_thread(execution: str, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    tokenizer = tiny_tokenizer(0)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=TIMEOUT)
    inputs = random_prompts(random.Random(4), 1, (5,))
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 30}
    config = replace(INLINE, execution=execution)
    outputs: list[torch.Tensor] = []

    def generate() -> None:
        outputs.append(target.generate(**arguments, streamer=streamer, assistant_model=draft, pearl=config))

    thread = threading.Thread(target=generate)
    thread.start()
    pieces = list(streamer)
    thread.join(TIMEOUT)
    assert "".join(pieces) == tokenizer.decode(outputs[0][0, 5:])
    assert len([piece for piece in pieces if piece]) > 3
    assert outputs[0].tolist() == target.generate(**arguments).tolist()


# Scores, logits, statistics.

SCORED: dict[str, dict[str, Any]] = {
    "no processor": {},
    "a processor of scores": {"suppress_tokens": [5, 6, 7]},
    "a processor of rows": {"repetition_penalty": 1.5},
    "a processor of the batch": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(row, VOCAB_SIZE))},
}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("arguments", [pytest.param(each, id=name) for name, each in SCORED.items()])
def test_scores_and_logits_are_those_of_generate(
    arguments: dict[str, Any], execution: str, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """At every position of a row that has not ended before; ours are computed in float64 and kept in float32, too."""
    inputs = random_prompts(random.Random(5), 4, range(1, 20))
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=20)[:, -20:]
    arguments = {
        **inputs,
        **arguments,
        "do_sample": False,
        "max_new_tokens": 20,
        "eos_token_id": plain[range(4), [3, 7, 11, 19]].tolist(),
        "pad_token_id": 63,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    expected = target.generate(**arguments)
    output = target.generate(**arguments, assistant_model=draft, pearl=replace(INLINE, execution=execution))
    assert output.sequences.tolist() == expected.sequences.tolist()
    generated = expected.sequences[:, inputs["input_ids"].shape[1] :]
    num_compared = 0
    for name in ("scores", "logits"):
        ours, theirs = getattr(output, name), getattr(expected, name)
        assert len(ours) == len(theirs) == generated.shape[1]
        live = torch.ones(4, dtype=torch.bool)
        for position in range(generated.shape[1]):
            assert ours[position].shape == theirs[position].shape == (4, VOCAB_SIZE)
            assert ours[position].dtype == theirs[position].dtype == torch.float32
            torch.testing.assert_close(ours[position][live], theirs[position][live], rtol=1e-5, atol=1e-5)
            num_compared += int(live.sum())
            live &= ~torch.isin(generated[:, position], torch.tensor(arguments["eos_token_id"]))
    assert num_compared < 2 * generated.numel(), "no row ended before the others"


def test_scores_with_a_pad_token_that_no_row_needs(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """A row alone is not padded: `generate` takes any number."""
    arguments = {**random_prompts(random.Random(5), 1, (5,)), "do_sample": False, "max_new_tokens": 5}
    arguments |= {"return_dict_in_generate": True, "output_scores": True, "pad_token_id": VOCAB_SIZE}
    expected, output = (
        target.generate(**arguments, assistant_model=each, pearl=each and INLINE) for each in (None, draft)
    )
    torch.testing.assert_close(output.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("penalty", [None, 1.1])
def test_what_is_kept_of_a_window_is_what_was_chosen(
    penalty: float | None, target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the scores of every guess, which would be many times as much until the call ends."""
    kept: list[torch.Tensor] = []
    stacked = generation._stacked

    def seen(rows: list[list[torch.Tensor]], *args: Any) -> Any:
        kept.extend(each for row in rows for each in row)
        return stacked(rows, *args)

    monkeypatch.setattr(generation, "_stacked", seen)
    arguments = {**random_prompts(random.Random(5), 2, (5,)), "do_sample": False, "max_new_tokens": 20}
    arguments |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    config = replace(INLINE, draft_length=8)
    target.generate(**arguments, repetition_penalty=penalty, assistant_model=draft, pearl=config)
    assert len(kept) == 2 * 2 * 20
    assert {each.untyped_storage().nbytes() for each in kept} == {4 * VOCAB_SIZE}


def test_sampled_scores_are_without_noise(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """They are `generate`'s own processed scores of the sampled prefix."""
    inputs = random_prompts(random.Random(6), 2, (7,))
    output = target.generate(
        **inputs,
        do_sample=True,
        temperature=1.5,
        top_k=20,
        max_new_tokens=10,
        assistant_model=draft,
        pearl=INLINE,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    with torch.no_grad():
        logits = target(input_ids=output.sequences).logits[:, 6:-1].float()
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits, rtol=1e-5, atol=1e-5)
    scores = logits / 1.5
    scores = scores.masked_fill(scores < scores.topk(20).values[..., -1:], -torch.inf)
    torch.testing.assert_close(torch.stack(output.scores, dim=1), scores, rtol=1e-5, atol=1e-5)


def test_an_output_is_of_the_type_that_was_asked_for(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(7), 2, (5,))
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 5, "assistant_model": draft, "pearl": INLINE}
    plain = target.generate(**arguments)
    assert isinstance(plain, torch.Tensor)
    assert plain.dtype == torch.long
    arguments["input_ids"] = inputs["input_ids"].int()
    assert target.generate(**arguments).dtype == torch.long
    output = target.generate(**arguments, return_dict_in_generate=True)
    assert isinstance(output, PearlGenerateOutput)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert isinstance(output.pearl, PearlStats)
    assert output.scores is None
    assert output.logits is None
    assert output.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("overlap", [True, False])
def test_the_statistics_add_up(overlap: bool, execution: str, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(8), 3, (5, 9))
    stats = target.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=40,
        assistant_model=draft,
        pearl=PearlConfig(execution=execution, draft_length=4, overlap=overlap, prefix_cache=False),
        return_dict_in_generate=True,
    ).pearl
    assert stats.execution == execution
    assert stats.generated_tokens == 3 * 40
    assert stats.accepted_tokens == sum(stats.stood_at) <= sum(stats.judged_at) <= stats.verified_draft_tokens
    assert stats.verified_draft_tokens <= stats.drafted_tokens == stats.accepted_tokens + stats.wasted_draft_tokens
    assert stats.decode_tokens + 3 == stats.generated_tokens, "the first token of a row comes from its prefill"
    assert 1 < stats.mean_accepted_tokens < 5
    assert stats.target_forwards < 40
    assert 0 <= stats.overlap_seconds <= min(stats.target_seconds, stats.draft_seconds) <= stats.total_seconds
    assert len(stats.acceptance_per_position) == 4 - overlap
    assert all(0 < rate < 1 for rate in stats.acceptance_per_position)


@pytest.mark.parametrize("overlap", [True, False])
def test_lockstep_does_the_same_in_every_execution(
    overlap: bool, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """Every count, not only the tokens: a line that a verdict has overtaken would cost guesses and nothing else."""
    inputs = random_prompts(random.Random(8), 3, (5, 9))
    for draft_length in (3, 6):
        seen = []
        for execution in EXECUTIONS:
            config = PearlConfig(execution=execution, draft_length=draft_length, overlap=overlap, prefix_cache=False)
            arguments = {**inputs, "do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
            stats = target.generate(**arguments, assistant_model=draft, pearl=config).pearl
            seen.append(
                (stats.target_forwards, stats.judged_at, stats.stood_at, stats.drafted_tokens, stats.accepted_tokens)
            )
        assert 0 < seen[0][-1] < sum(seen[0][1])
        assert seen == seen[:1] * len(EXECUTIONS)


def test_a_draft_that_is_always_right_saves_every_forward_it_can(target: PreTrainedModel) -> None:
    """Every forward but the prefill gives all its draft tokens and the bonus token: one fewer would still be right."""
    inputs = random_prompts(random.Random(8), 1, (5,))
    for draft_length in (1, 4, 7):
        config = PearlConfig(execution="inline", draft_length=draft_length, overlap=False, prefix_cache=False)
        arguments = {**inputs, "do_sample": False, "max_new_tokens": 1 + 5 * (draft_length + 1)}
        output = target.generate(**arguments, assistant_model=target, pearl=config, return_dict_in_generate=True)
        assert output.sequences.tolist() == target.generate(**arguments).tolist()
        assert output.pearl.target_forwards == 1 + 5
        assert output.pearl.mean_accepted_tokens == draft_length + 1


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_the_longest_draft_is_verified_as_a_whole_while_the_next_one_is_drafted(
    verification: str, execution: str, target: PreTrainedModel
) -> None:
    """A draft that is always right gives so many tokens per forward; rejection needs the distributions of all."""
    inputs = random_prompts(random.Random(8), 1, (5,))
    config = PearlConfig(execution=execution, draft_length=32, verification=verification, seed=3, prefix_cache=False)
    output = target.generate(
        **inputs,
        do_sample=True,
        max_new_tokens=1 + 4 * 32,
        assistant_model=target,
        pearl=config,
        return_dict_in_generate=True,
    )
    assert output.pearl.target_forwards == 1 + 4
    assert output.pearl.mean_accepted_tokens == 32


def test_several_sequences_are_returned_per_prompt(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(9), 2, (3, 7))
    output = target.generate(
        **inputs, do_sample=True, num_return_sequences=3, max_new_tokens=12, assistant_model=draft, pearl=INLINE
    )
    length = inputs["input_ids"].shape[1]
    assert output.shape == (6, length + 12)
    assert output[:, :length].tolist() == inputs["input_ids"].repeat_interleave(3, dim=0).tolist()
    assert_varied(output[:, length:])


# What is the caller's.


def test_nothing_of_the_callers_is_changed(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(10), 3, range(1, 20))
    tokenizer = tiny_tokenizer(0)
    generation_config = GenerationConfig(
        do_sample=True, max_new_tokens=10, eos_token_id=[5, 6], pad_token_id=0, stop_strings=["abc"], temperature=0.9
    )
    processors = LogitsProcessorList([lambda input_ids, scores: scores])
    state = target.state_dict()
    before = copy.deepcopy((inputs, generation_config.to_dict(), state))
    descriptions = [(each.config.to_dict(), each.generation_config.to_dict()) for each in (target, draft)]
    own = [(each.config._attn_implementation, each.training, dict(vars(each))) for each in (target, draft)]
    for execution in EXECUTIONS:
        target.generate(
            **inputs,
            generation_config=generation_config,
            logits_processor=processors,
            tokenizer=tokenizer,
            assistant_model=draft,
            pearl=replace(INLINE, execution=execution),
        )
    assert generation_config.to_dict() == before[1]
    assert len(processors) == 1
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[0][name])
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in state.items())
    assert [(each.config.to_dict(), each.generation_config.to_dict()) for each in (target, draft)] == descriptions
    assert [(each.config._attn_implementation, each.training, dict(vars(each))) for each in (target, draft)] == own


@pytest.mark.parametrize("execution", IN_PROCESS)
def test_models_in_training_mode_stay_in_it_and_decode_without_dropout(execution: str) -> None:
    target = tiny_model("gpt2", 11, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    draft = noisy_copy(target, 0.03, 2)
    inputs = random_prompts(random.Random(11), 2, (5,))
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 20}
    expected = target.generate(**arguments)
    for model in (target, draft):
        model.train()
        model.transformer.h[0].eval()  # part of it, on purpose
    modes = [module.training for model in (target, draft) for module in model.modules()]
    config = replace(INLINE, execution=execution)
    assert target.generate(**arguments, assistant_model=draft, pearl=config).tolist() == expected.tolist()
    assert [module.training for model in (target, draft) for module in model.modules()] == modes


def test_torch_s_random_state_is_left_alone_by_greedy_calls(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(12), 2, (5,))
    before = torch.get_rng_state()
    target.generate(**inputs, do_sample=False, max_new_tokens=10, assistant_model=draft, pearl=INLINE)
    assert torch.equal(torch.get_rng_state(), before)
