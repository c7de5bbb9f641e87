"""Bad input is refused: by a typed error that names argument, value and cure, or as transformers refuses it itself.

Whole calls, with values of the wrong type, shape, dtype or range, contradictory options, models whose logits are NaN.
`test_arguments.py` has the cases one by one.
"""

from __future__ import annotations

import copy
import math
import random
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB_SIZE, assert_nothing_held, enabled_for_tiny_models, make_draft, random_prompts, tiny_model
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.errors import PearlError
from hf_pearl.fingerprint import fingerprint

TYPED = (ValueError, TypeError, NotImplementedError, PearlError)
NEW_TOKENS = 3
OURS = r"`pearl` refuses `([^`]*)` \(|`(pearl|generation_config)` must be "


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    target = tiny_model("llama", 1)
    yield target, make_draft(target, "noisy", 2)
    hf_pearl.release(target)


IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

# Of anything, for anything.
ANYTHING: list[Any] = [
    True, False, 0, 1, -1, 3, 2**70, 2.5, -0.5, 1j, math.nan, math.inf, "", "a", "auto", b"a", [], [3], [[3, 4]],
    [None], ["a"], (), (2, 1.1), {}, {"a": 1}, {(3,): 1.0}, {3}, print, int, object(), DynamicCache(), np.array([1, 2]),
    torch.tensor(3), torch.zeros(0), torch.ones(2), IDS, MASK, MASK.flip(1), IDS.double(), torch.ones(1, 2, 3),
    torch.zeros(2, 0, dtype=torch.long), IDS.to(torch.complex64), torch.full((2, 4), 1e9), torch.full((1, 2), math.nan),
]  # fmt: skip
NAMES = [
    "input_ids", "attention_mask", "position_ids", "inputs_embeds", "past_key_values", "logits_processor",
    "streamer", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "generation_config",
    "synced_gpus", "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "do_sample", "num_beams", "use_cache", "cache_implementation", "temperature", "top_k", "top_p", "min_p",
    "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "renormalize_logits", "num_return_sequences", "output_scores",
    "output_logits", "output_attentions", "return_dict_in_generate", "pad_token_id", "eos_token_id", "bos_token_id",
    "guidance_scale", "pixel_values", "max_new_token", "watermarking_config", "token_healing",
]  # fmt: skip
ENDLESS = ("max_new_tokens", "max_length", "num_return_sequences")  # Very large is right there, and takes its time.
ENDLESS_FREE = [-1, 0, 3, 2.5, -0.5, 1j, math.nan, "", "a", b"a", [], [3], {}, print, object(), torch.zeros(0), IDS]
IDS_OF_NO_TOKEN = [IDS - 5, IDS + VOCAB_SIZE, torch.full((1, 3), 2**40), IDS.int(), IDS.short(), IDS[0], IDS[None]]
CONTRADICTIONS: list[dict[str, Any]] = [
    {"min_length": 30, "max_length": 20},
    {"min_new_tokens": 9},
    {"do_sample": False, "num_return_sequences": 2},
    {"temperature": 0.0, "do_sample": True},
    {"inputs": IDS},
    {"attention_mask": MASK[:1]},
    {"max_length": 2},
    {"suppress_tokens": list(range(VOCAB_SIZE))},
    {"output_scores": True, "return_dict_in_generate": False},
]
SETTINGS = ["draft_length", "execution", "overlap", "verification", "cache_memory", "cache_dtype", "prefix_cache",
            "cache_salt", "seed", "compile", "gamma"]  # fmt: skip


def state(models: tuple[PreTrainedModel, ...], arguments: dict[str, Any]) -> list[Any]:
    """What a refused call must leave as it was."""
    owned = [(fingerprint(model), repr(vars(model.generation_config)), model.training) for model in models]
    implementations = [model.config._attn_implementation for model in models]
    tensors = [value.clone() for value in arguments.values() if isinstance(value, torch.Tensor)]
    return [owned, implementations, [(each.shape, each.nan_to_num().tolist()) for each in tensors], list(arguments)]


def hostile_call(chance: random.Random) -> dict[str, Any]:
    """Arguments of a call, some of which are wrong."""
    arguments: dict[str, Any] = {"input_ids": IDS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    kind = chance.randrange(10)
    if kind == 0:
        return arguments | {"input_ids": chance.choice(IDS_OF_NO_TOKEN)}
    if kind == 1:
        return arguments | chance.choice(CONTRADICTIONS)
    for name in chance.sample(NAMES, chance.choice((1, 1, 1, 2, 4))):
        arguments[name] = chance.choice(ENDLESS_FREE if name in ENDLESS else ANYTHING)
    return arguments


def outcome(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    """The tokens of a call, or its error."""
    arguments = {name: copy.copy(value) for name, value in arguments.items()}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model.generate(**arguments)
    except Exception as error:
        return error
    return output if isinstance(output, torch.Tensor) else output.sequences


def check_refused(error: Exception, arguments: dict[str, Any], plain: Any) -> None:
    """By us, naming one of the arguments, with a cure; or as transformers does."""
    message = str(error)
    if isinstance(error, TYPED) and (ours := re.match(OURS, message)):
        assert (ours[1] or ours[2]) in {*arguments, "pearl", "attention_mask"}, f"{arguments}: {error!r}"
        assert "\n" not in message and len(message) < 600 and message.count(". ") >= 1, message
    else:
        is_named = isinstance(error, TYPED) and any(name in message for name in arguments)
        is_theirs = type(error) is type(plain) or (isinstance(error, TYPED) and isinstance(plain, Exception))
        assert is_named or is_theirs, f"{arguments}: {error!r}, and of transformers {plain!r}"


def check_calls(pair: tuple[PreTrainedModel, PreTrainedModel], number: int, seed: int) -> None:
    target, draft = pair
    chance = random.Random(seed)
    good = {"input_ids": IDS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected, num_refused, num_done = target.generate(**good).tolist(), 0, 0
    for index in range(number):
        arguments = hostile_call(chance)
        config = PearlConfig(execution=chance.choice(("inline", "inline", "threads")), draft_length=2)
        before = state(pair, arguments)
        found = outcome(target, {"assistant_model": draft, **arguments, "pearl": config})
        assert state(pair, arguments) == before, arguments
        if arguments["max_new_tokens"] is math.nan:
            assert isinstance(found, Exception), arguments  # `generate` itself would never end.
            continue
        plain = outcome(target, {name: value for name, value in arguments.items() if name != "assistant_model"})
        if isinstance(found, Exception):
            num_refused += 1
            check_refused(found, arguments, plain)
        elif isinstance(plain, torch.Tensor) and not arguments["do_sample"]:
            num_done += 1
            assert found.tolist() == plain.tolist(), arguments
        if index % 50 == 0:
            assert_nothing_held(target, draft)
            assert target.generate(**good, assistant_model=draft, pearl=config).tolist() == expected
    assert num_refused > number / 4 and num_done > number / 20, (num_refused, num_done)


def check_settings(number: int, seed: int) -> None:
    """Settings are valid, or refused by name with the value that was seen."""
    chance, num_refused = random.Random(seed), 0
    good = {"draft_length": 3, "execution": "inline", "overlap": False, "verification": "rejection",
            "cache_memory": "1MiB", "cache_dtype": "auto", "prefix_cache": False, "cache_salt": "x",
            "seed": 7, "compile": False}  # fmt: skip
    for _ in range(number):
        names = chance.sample(SETTINGS, chance.choice((1, 2, 4)))
        settings = {name: good.get(name, 1) if chance.random() < 0.4 else chance.choice(ANYTHING) for name in names}
        try:
            PearlConfig(**settings)
        except (ValueError, TypeError) as error:
            num_refused += 1
            named = re.search(r"`(\w+)`", str(error)) or re.search(r"argument '(\w+)'", str(error))
            assert named and named[1] in (*settings, "draft_length"), f"{settings}: {error!r}"
    assert number / 4 < num_refused < number


def test_a_thousand_hostile_calls(pair: tuple[PreTrainedModel, PreTrainedModel], seed: int) -> None:
    check_calls(pair, 500, seed)
    check_settings(500, seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_twenty_thousand_hostile_calls(part: int, pair: tuple[PreTrainedModel, PreTrainedModel], seed: int) -> None:
    check_calls(pair, 4000, seed)
    check_settings(1000, seed)


@pytest.mark.parametrize("execution", ["inline", "threads"])
@pytest.mark.parametrize("which", ["target", "draft"])
def test_logits_that_are_nan_end_as_in_generate(which: str, execution: str, seed: int) -> None:
    """A draft's cost guesses only; a target's are argmax over NaN, as transformers takes it."""
    target = tiny_model("llama", 5)
    draft = make_draft(target, "noisy", 6)
    inputs = random_prompts(random.Random(seed), 2, (5, 20))
    with torch.no_grad():
        (target if which == "target" else draft).lm_head.weight[7] = math.nan
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = target.generate(**inputs, **options)
    config = PearlConfig(execution=execution, draft_length=3)
    assert target.generate(**inputs, **options, assistant_model=draft, pearl=config).tolist() == expected.tolist()
    assert_nothing_held(target, draft)
    hf_pearl.release(target)


def test_a_hostile_config_object_is_refused(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    target, draft = pair
    for pearl in ("yes", 1, {"draft_length": 3}, GenerationConfig(), PearlConfig):
        with pytest.raises(TypeError, match="`pearl` must be True, False or a PearlConfig"):
            target.generate(IDS, max_new_tokens=2, assistant_model=draft, pearl=pearl)
