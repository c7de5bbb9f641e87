"""Traces: how they are recorded of a pair of models, and which are none."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from . import compat
from .config import PearlConfig
from .decoding.calibration import MAX_RANKS
from .decoding.messages import Admission
from .decoding.noise import request_seed
from .decoding.processors import draft_processors
from .decoding.proposal import Prefix, Proposer
from .decoding.recorded import TracedGuess
from .generation import pearl_generate
from .model_devices import input_device
from .models import evaluating
from .pair_checks import check_numbers, checked_models, checked_prompts
from .parallel.lane import output_vocab_size

MAX_TOKENS = 2**20  # of a vocabulary: memory goes with it
ROUNDING = 1e-3  # by which a probability of a model may be above 1
_CURE = "Take what `record_traces` returns."


class Trace(NamedTuple):
    """What the target said behind a prompt, and what the draft would have guessed at each position of that.

    Attributes
    ----------
    prompt_ids : tuple of int
        The prompt, without padding.
    guesses : tuple of TracedGuess
        One for each position behind it, in order.
    """

    prompt_ids: tuple[int, ...]
    guesses: tuple[TracedGuess, ...]


def record_traces(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Trace]:
    """Let the target continue every prompt, and note at each position what the draft would have guessed.

    Parameters
    ----------
    target, draft : PreTrainedModel
        The pair; neither needs to be enabled.
    prompts : sequence of sequence of int
        Token ids, without padding.
    max_new_tokens : int
        Behind each prompt.
    temperature : float
        0 is greedy.
    seed : int
        Of the noise that both models sample with.

    Returns
    -------
    list of Trace
        One for each prompt, in order.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        What `tune` refuses: models, prompts or numbers that make no sense, or leave no room.
    """
    check_numbers(max_new_tokens, 1, temperature, seed)
    target, draft = checked_models(target, draft)
    traces = []
    for prompt in checked_prompts(prompts, (target, draft), max_new_tokens, batch_size=1):
        input_ids = torch.tensor([prompt], device=input_device(target))
        options = generation_options(input_ids, max_new_tokens, temperature)
        generate = types.MethodType(compat.original_generate(), target)
        token_ids = pearl_generate(generate, target, PearlConfig(seed=seed), (), options)[0].tolist()
        traces.append(trace_of(target, draft, token_ids, len(prompt), temperature, seed))
    return traces


def generation_options(input_ids: torch.Tensor, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Arguments of `generate` that continue `input_ids` and return token ids; the rest is the model's default."""
    options = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "max_new_tokens": max_new_tokens,
        "return_dict_in_generate": False,
    }
    if not temperature:
        return {**options, "do_sample": False}
    return {**options, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def _processors(target: PreTrainedModel, options: dict[str, Any]) -> LogitsProcessorList:
    """Those of a call of `generate`, as transformers makes them of its arguments and the model's defaults."""
    found: list[LogitsProcessorList] = []

    def take(
        model: Any, input_ids: torch.Tensor, *, logits_processor: LogitsProcessorList, **others: Any
    ) -> torch.Tensor:
        found.append(logits_processor)
        return input_ids

    compat.original_generate()(target, **options, custom_generate=take)
    return found[0]


@torch.no_grad()
def trace_of(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    token_ids: list[int],
    num_prompt_tokens: int,
    temperature: float,
    seed: int,
) -> Trace:
    """What the draft would have guessed at each position of a text behind its first `num_prompt_tokens` tokens.

    A token that the draft cannot know is 0 to it, as it is to a draft lane.
    """
    vocab_size = draft.get_input_embeddings().num_embeddings
    known_ids = [token_id if token_id < vocab_size else 0 for token_id in token_ids]
    with evaluating(draft):
        logits = draft(torch.tensor([known_ids], device=input_device(draft))).logits[0]
    prompt = torch.tensor([token_ids[:num_prompt_tokens]], device=input_device(target))
    options = generation_options(prompt, len(token_ids) - num_prompt_tokens, temperature)
    proposer = Proposer(output_vocab_size(target), draft_processors(_processors(target, options)))
    seed_of_request = request_seed(seed, 0) if temperature > 0 else None
    proposer.admit(Admission(0, tuple(token_ids[:num_prompt_tokens]), len(token_ids), 0, seed_of_request))
    traced = []
    for length in range(num_prompt_tokens, len(token_ids)):
        before = token_ids[:length]
        prefix = Prefix(0, length, lambda before=before: before)  # type: ignore[misc]
        guesses = proposer.propose(logits[length - 1 : length], [prefix], MAX_RANKS)[0]
        ranks = [rank for rank, guess in enumerate(guesses) if guess.token_id == token_ids[length]]
        confidence, *others = (guess.confidence for guess in guesses)
        rank = ranks[0] if ranks else None
        guess_ids = tuple(guess.token_id for guess in guesses)
        traced.append(TracedGuess(rank == 0, confidence, rank, tuple(others), token_ids[length], guess_ids))
    return Trace(tuple(token_ids[:num_prompt_tokens]), tuple(traced))


def checked_traces(traces: Any) -> list[Trace]:
    """Traces as a list; raises `TypeError` or `ValueError`, with the place, for what is none or cannot be decoded."""
    if isinstance(traces, (Trace, str)) or not isinstance(traces, Iterable):
        raise TypeError(f"`traces` must be a sequence of traces, got {type(traces).__name__}. {_CURE}")
    found = list(traces)
    if not found:
        raise ValueError("`traces` must hold at least one trace, got none.")
    for place, trace in enumerate(found):
        name = f"traces[{place}]"
        if not isinstance(trace, Trace):
            raise TypeError(f"`{name}` must be a `hf_pearl.Trace`, got {type(trace).__name__}. {_CURE}")
        for part, kind in ("prompt_ids", "token"), ("guesses", "position"):
            _check_tuple(f"{name}.{part}", getattr(trace, part))
            if not getattr(trace, part):
                raise ValueError(f"`{name}.{part}` must hold at least one {kind}, got none. {_CURE}")
        for token_id in trace.prompt_ids:
            _check_token(f"{name}.prompt_ids", token_id)
        for position, guess in enumerate(trace.guesses):
            _check_guess(f"{name}.guesses[{position}]", guess)
    return found


def _check_tuple(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"`{name}` must be a tuple, got {type(value).__name__}. {_CURE}")


def _check_guess(name: str, guess: Any) -> None:
    if not isinstance(guess, TracedGuess):
        raise TypeError(f"`{name}` must be a `TracedGuess`, got {guess!r}. {_CURE}")
    if not isinstance(guess.stands, bool):
        raise TypeError(f"`{name}.stands` must be True or False, got {guess.stands!r}. {_CURE}")
    _check_tuple(f"{name}.others", guess.others)
    _check_tuple(f"{name}.guess_ids", guess.guess_ids)
    for value in (guess.probability, *guess.others):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"`{name}` must have probabilities, got {value!r} among them. {_CURE}")
        if not 0.0 <= value <= 1.0 + ROUNDING:
            raise ValueError(f"`{name}` must have probabilities from 0 to 1, got {value} among them. {_CURE}")
    for token_id in (*guess.guess_ids, *(() if guess.token_id is None else (guess.token_id,))):
        _check_token(name, token_id)
    _check_rank(name, guess)


def _check_rank(name: str, guess: TracedGuess) -> None:
    """What stands is said up to three times, and has to be the same."""
    rank = guess.rank
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"`{name}.rank` must be an int or None; got {rank!r}. {_CURE}")
    if rank is not None and (rank < 0 or (rank == 0) != guess.stands):
        raise ValueError(f"`{name}` must have the rank 0 if it stands and no other; got {rank!r}. {_CURE}")
    if guess.guess_ids and (guess.guess_ids[0] == guess.token_id) != guess.stands:
        raise ValueError(
            f"`{name}` must have its `token_id` first among its `guess_ids` if it stands, and not otherwise; got "
            f"{guess}. {_CURE}"
        )


def _check_token(name: str, token_id: Any) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int):
        raise TypeError(f"`{name}` must hold token ids, got {token_id!r} among them. {_CURE}")
    if not 0 <= token_id < MAX_TOKENS:
        raise ValueError(f"`{name}` must hold token ids from 0 to {MAX_TOKENS - 1}, got {token_id} among them. {_CURE}")
