"""Random calls of `generate` on random pairs of models: what greedy equality is tested on."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from callbacks import AllowedTokens, CallCriterion, CountingProcessor, RecordingStreamer, SumCriterion
from models import (
    ARCHITECTURES,
    DRAFT_KINDS,
    PAD_TOKEN_ID,
    VOCAB_SIZE,
    is_varied,
    make_draft,
    noisy_copy,
    random_prompts,
    tiny_model,
    tiny_tokenizer,
)
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList, WatermarkingConfig

import hf_pearl
from hf_pearl import PearlConfig

MIN_JUDGED = 5  # draft tokens of a run, from which its acceptance rate counts
PROMPT_LENGTHS = (*range(1, 9), 15, 16, 17, 31, 32, 33, 40, 64, 65)
NEW_TOKENS = (1, 2, *range(1, 33))


@dataclass
class Pair:
    """A target with a draft, and how they came about."""

    target: PreTrainedModel
    draft: PreTrainedModel
    origin: str


@dataclass
class Case:
    """One call: what it is given, and its callbacks by the `generate` argument that takes them, made anew per call."""

    inputs: dict[str, torch.Tensor]
    arguments: dict[str, Any]
    callbacks: dict[str, list[Callable[[], Any]]]
    config: PearlConfig

    def __str__(self) -> str:
        callbacks = {name: [str(make) for make in makers] for name, makers in self.callbacks.items()}
        return f"inputs={self.inputs}\narguments={self.arguments}\ncallbacks={callbacks}\nconfig={self.config}"

    @property
    def prompt_length(self) -> int:
        """Length of the prompts, padding included."""
        return self.inputs["input_ids"].shape[1]

    def make_callbacks(self) -> dict[str, Any]:
        """Fresh callbacks: they have a state."""
        made = {name: [make() for make in makers] for name, makers in self.callbacks.items()}
        lists = {"logits_processor": LogitsProcessorList, "stopping_criteria": StoppingCriteriaList}
        return {name: lists[name](each) if name in lists else each[0] for name, each in made.items()}


@dataclass
class Outcomes:
    """What a series of runs covered."""

    num_runs: int = 0
    acceptances: list[float] = field(default_factory=list)
    num_varied: int = 0
    num_long: int = 0
    num_refused: int = 0

    def add(self, case: Case, output: Any) -> None:
        """Count one run, unless it was refused."""
        self.num_runs += 1
        if output is None:
            self.num_refused += 1
            return
        if sum(output.pearl.judged_at) >= MIN_JUDGED:
            self.acceptances.append(output.pearl.acceptance_rate)
        generated = output.sequences[:, case.prompt_length :]
        if generated.shape[1] >= 10:
            self.num_long += 1
            self.num_varied += is_varied(generated)

    def assert_not_trivial(self) -> None:
        """Fail unless every part of the acceptance rates was hit, and nearly all outputs were varied."""
        num_parts = 10 if self.num_runs >= 500 else 5  # tenths of the acceptance rate; fifths in a short series
        hit = {min(num_parts - 1, int(num_parts * rate)) for rate in self.acceptances}
        assert hit == set(range(num_parts)), f"acceptance rates were hit only in parts {sorted(hit)} of {num_parts}"
        assert self.num_refused < 0.02 * self.num_runs, f"{self.num_refused} of {self.num_runs} calls were refused"
        assert self.num_varied >= 0.7 * self.num_long > 0, f"{self.num_varied} of {self.num_long} outputs are varied"


def draw_pair(chance: random.Random, quality: float) -> Pair:
    """A random target, and a draft of any kind, perhaps of another dtype, or of a vocabulary padded to another size.

    `quality` in [0, 1): 0 draws a draft that is nearly never right, 1 one that nearly always is.
    """
    architecture, seed = chance.choice(list(ARCHITECTURES)), chance.getrandbits(32)
    target = tiny_model(architecture, seed)
    kind = chance.choices(DRAFT_KINDS, weights=(1, 8, 1))[0]
    if kind != "noisy":
        return Pair(target, make_draft(target, kind, seed + 1), f"{architecture}, seed {seed}, {kind} draft")
    noise = 0.4 / 150**quality
    vocab_size = chance.choice((VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE - 7, VOCAB_SIZE + 9))
    dtype = chance.choice((torch.float64, torch.float64, torch.float32, torch.bfloat16))
    draft = noisy_copy(target, noise, seed + 1, vocab_size, dtype)
    return Pair(target, draft, f"{architecture}, seed {seed}, draft with noise {noise}, {vocab_size} tokens, {dtype}")


def draw_config(chance: random.Random, execution: str) -> PearlConfig:
    """Random settings, none of which may change the output."""
    return PearlConfig(
        draft_length=chance.choice(("auto", "auto", *range(1, 17))),
        execution=execution,
        overlap=chance.random() < 0.75,
        prefix_cache=chance.random() < 0.75,
    )


def draw_case(chance: random.Random, target: PreTrainedModel, execution: str) -> Case:
    """A random call. Stop rules and bans are drawn from what plain greedy decoding would say, so that they bite."""
    inputs = random_prompts(chance, chance.randint(1, 8), chance.sample(PROMPT_LENGTHS, 3))
    length, num_new = inputs["input_ids"].shape[1], chance.choice(NEW_TOKENS)
    limit = {"max_new_tokens": num_new} if chance.random() < 0.7 else {"max_length": length + num_new}
    case = Case(inputs, {"do_sample": False, **limit}, {}, draw_config(chance, execution))
    said = target.generate(**inputs, **case.arguments)[:, length:].tolist()
    for draw in (_draw_processors, _draw_user_processors, _draw_stop_rules, _draw_outputs):
        draw(chance, case, said)
    return case


def _draw_processors(chance: random.Random, case: Case, said: Sequence[Sequence[int]]) -> None:
    """Processors that transformers builds: none or some."""
    token, row = functools.partial(chance.randrange, VOCAB_SIZE), chance.choice(said)
    bias = {(chance.choice(row),): -2.0, (token(), chance.choice(row)): 3.0}
    options: dict[str, Any] = {
        "repetition_penalty": chance.choice((0.8, 1.2, 1.8)),
        "no_repeat_ngram_size": chance.choice((1, 2, 3)),
        "bad_words_ids": [[chance.choice(row)], [chance.choice(row), chance.choice(row)]],
        "sequence_bias": bias,
        "suppress_tokens": [chance.choice(row), token()],
        "begin_suppress_tokens": [row[0], token()],
        "remove_invalid_values": True,
        "renormalize_logits": True,
        "encoder_repetition_penalty": chance.choice((0.7, 1.5)),
        "encoder_no_repeat_ngram_size": chance.choice((2, 3)),
        "watermarking_config": WatermarkingConfig(bias=chance.choice((1.0, 4.0)), context_width=1),
        "forced_bos_token_id": token(),
    }
    num_drawn = chance.choice((0, 0, 0, 1, 1, 2, 3))
    case.arguments |= {name: options[name] for name in chance.sample(list(options), num_drawn)}


def _draw_user_processors(chance: random.Random, case: Case, said: Sequence[Sequence[int]]) -> None:
    """Processors of the user's own, which count their calls."""
    if chance.random() < 0.15:
        case.callbacks["logits_processor"] = [CountingProcessor] * chance.choice((1, 2))
    if chance.random() < 0.1:
        case.callbacks["prefix_allowed_tokens_fn"] = [functools.partial(AllowedTokens, VOCAB_SIZE)]


def _draw_stop_rules(chance: random.Random, case: Case, said: Sequence[Sequence[int]]) -> None:
    """End-of-text tokens and stop strings that plain decoding would come to, criteria of the user's own, a time limit.

    Every token said by any row is as likely: inside, at the end of, and beyond whatever the draft has guessed.
    """
    everything = [token for row in said for token in row]
    if chance.random() < 0.5:
        case.arguments["eos_token_id"] = chance.sample(everything, min(len(everything), chance.choice((1, 1, 2, 3))))
        case.arguments["pad_token_id"] = chance.choice((PAD_TOKEN_ID, case.arguments["eos_token_id"][0]))
        options: dict[str, Any] = {
            "min_new_tokens": chance.choice((2, 5, 10)),
            "min_length": case.prompt_length + 3,
            "forced_eos_token_id": case.arguments["eos_token_id"][0],
            "exponential_decay_length_penalty": (chance.choice((1, 4)), 1.1),
        }
        case.arguments |= {name: options[name] for name in chance.sample(list(options), chance.choice((0, 0, 1, 2)))}
    if chance.random() < 0.2:
        tokenizer = tiny_tokenizer(0)
        text = tokenizer.decode(chance.choice(said))
        start = chance.randrange(max(1, len(text) - 3))
        strings = [text[start : start + chance.choice((1, 2, 3))], "no such text"]
        case.arguments |= {"stop_strings": strings, "tokenizer": tokenizer}
    if chance.random() < 0.15:
        case.callbacks["stopping_criteria"] = [
            functools.partial(SumCriterion, chance.choice((3, 7, 20))),
            functools.partial(CallCriterion, chance.randint(1, 40)),
        ][: chance.choice((1, 2))]
    if chance.random() < 0.1:
        case.arguments["max_time"] = 1e6


def _draw_outputs(chance: random.Random, case: Case, said: Sequence[Sequence[int]]) -> None:
    """What else is handed back."""
    if chance.random() < 0.25:
        case.callbacks["streamer"] = [RecordingStreamer]
    if chance.random() < 0.25:
        case.arguments |= {"output_scores": True, "output_logits": chance.random() < 0.5}


def run_case(pair: Pair, case: Case) -> Any:
    """Call transformers' `generate` and ours; fail unless tokens, scores and all that callbacks saw are equal.

    What transformers refuses (some processors contradict others), we refuse as well; None is returned then.
    """
    expected_callbacks, callbacks = case.make_callbacks(), case.make_callbacks()
    common = {**case.inputs, **case.arguments, "return_dict_in_generate": True}
    ours = {**common, **callbacks, "assistant_model": pair.draft, "pearl": case.config}
    try:
        expected = pair.target.generate(**common, **expected_callbacks)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            pair.target.generate(**ours)
        return None
    output = pair.target.generate(**ours)
    assert torch.equal(output.sequences, expected.sequences), f"\n{output.sequences}\nis not\n{expected.sequences}"
    for name, seen in seen_by(expected_callbacks).items():
        assert seen_by(callbacks)[name] == seen, f"{name} saw\n{seen_by(callbacks)[name]}\nand not\n{seen}"
    assert_same_scores(case, output, expected)
    return output


def seen_by(callbacks: dict[str, Any]) -> dict[str, list[Any]]:
    """What every callback kept of its calls."""
    return {
        name: [one.seen for one in each] if isinstance(each, list) else [each.seen] for name, each in callbacks.items()
    }


def assert_same_scores(case: Case, output: Any, expected: Any) -> None:
    """Fail unless scores and logits equal transformers' at every position of a row that had not ended before."""
    for name in ("scores", "logits"):
        ours, theirs = getattr(output, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is None:
            continue
        assert len(ours) == len(theirs)
        for row, length in enumerate(num_unpadded(case, expected.sequences)):
            for position in range(length):
                torch.testing.assert_close(ours[position][row], theirs[position][row], rtol=1e-5, atol=1e-5)


def num_unpadded(case: Case, sequences: torch.Tensor) -> list[int]:
    """New tokens of every row without the padding behind them (nor the end-of-text token where that pads, too)."""
    lengths = []
    for row in sequences[:, case.prompt_length :].tolist():
        length = len(row)
        while length and row[length - 1] == case.arguments.get("pad_token_id"):
            length -= 1
        lengths.append(length)
    return lengths


def run_fuzz(seed: int, execution: str, num_pairs: int, cases_per_pair: int) -> None:
    """Run `num_pairs * cases_per_pair` random calls; those on one pair share its engine, its cache and its worker."""
    outcomes = Outcomes()
    for pair_index in range(num_pairs):
        chance = random.Random(f"{seed} {pair_index}")
        pair = draw_pair(chance, (pair_index + chance.random()) / num_pairs)
        for case_index in range(cases_per_pair):
            case = draw_case(random.Random(f"{seed} {pair_index} {case_index}"), pair.target, execution)
            try:
                outcomes.add(case, run_case(pair, case))
            except Exception as error:
                where = f"call {case_index} on pair {pair_index} of fuzz seed {seed}: {pair.origin}\n{case}"
                raise AssertionError(f"{where}\n{error}") from error
        hf_pearl.release(pair.target)
    outcomes.assert_not_trivial()
