"""How long schedules would take on a recorded text, exactly, if nothing but the two models took time.

traces = hf_pearl.record_traces(target, draft, [tokenizer(text).input_ids for text in texts])
times = hf_pearl.simulate(traces, draft_step=lambda guesses: 0.9e-3, target_forward=lambda tokens: 7e-3)
print(times, times.efficiency(measured_seconds))
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Sequence
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
from .decoding.simulation import Costs, Learnt, simulate_run
from .generation import pearl_generate
from .model_devices import input_device
from .pair_checks import check_numbers, checked_models, checked_prompts
from .parallel.lane import output_vocab_size

DRAFT_LENGTHS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32)  # as far as `PearlConfig` goes


class Trace(NamedTuple):
    """What the target said behind a prompt, and what the draft would have guessed at each position of that."""

    prompt_ids: tuple[int, ...]
    guesses: tuple[TracedGuess, ...]


class SimulatedTimes(NamedTuple):
    """Seconds that all traces take, one after the other.

    Attributes
    ----------
    plain : float
        The target alone.
    sequential : float
        Ordinary speculative decoding with its best fixed draft length (Leviathan et al. 2023, arXiv 2211.17192), of
        `DRAFT_LENGTHS`.
    sequential_length : int
        That length.
    lockstep : float
        PEARL with its best fixed draft length (arXiv 2408.11850), likewise.
    lockstep_length : int
        That length.
    pearl : float
        The default of this package: free-running, with a tree.
    bound : float
        The draft is never waited for: the target always verifies just as many of its likeliest guesses as stand, and
        nobody else takes time. No schedule of a single line is faster if a target forward over more tokens takes no
        less time, and one over tokens together no more than several over parts of them. Where one takes more, short
        windows, or none, may be faster. The draft's second guesses, and text that is looked up, may carry `pearl`
        beyond it, too.
    """

    plain: float
    sequential: float
    sequential_length: int
    lockstep: float
    lockstep_length: int
    pearl: float
    bound: float

    def efficiency(self, measured_seconds: float) -> float:
        """Which share of a measured time PEARL would take if nothing but the models took time.

        Raises
        ------
        ValueError
            A time that is not positive and finite.
        """
        if not 0.0 < measured_seconds < math.inf:
            raise ValueError(f"`measured_seconds` must be positive and finite, got {measured_seconds}.")
        return self.pearl / measured_seconds


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
    prompts : sequence of sequence of int
        Token ids, without padding.
    temperature : float
        0 is greedy.
    seed : int
        Of the noise that both models sample with.

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
    logits = draft(torch.tensor([known_ids], device=input_device(draft))).logits[0]
    prompt = torch.tensor([token_ids[:num_prompt_tokens]], device=input_device(target))
    options = generation_options(prompt, len(token_ids) - num_prompt_tokens, temperature)
    proposer = Proposer(output_vocab_size(target), draft_processors(_processors(target, options)))
    call_seed = request_seed(seed, 0) if temperature > 0 else None
    proposer.admit(Admission(0, tuple(token_ids[:num_prompt_tokens]), len(token_ids), 0, call_seed))
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


def simulate(
    traces: Sequence[Trace], draft_step: Callable[[int], float], target_forward: Callable[[int], float]
) -> SimulatedTimes:
    """How long every schedule would take on recorded traces, one after the other.

    PEARL's schedules are not modelled but run, under a virtual clock. What they learn of a trace they know in the next,
    as an engine does. Prompts are taken to be cached: they take no time.

    Parameters
    ----------
    traces : sequence of trace
        As `record_traces` makes them.
    draft_step : callable
        Seconds of a draft step over so many guesses.
    target_forward : callable
        Seconds of a target forward over so many tokens.

    Raises
    ------
    TypeError, ValueError
        No traces; or times that are no functions, or none that can pass.
    """
    traces = list(traces)
    if not traces or not all(trace.guesses for trace in traces):
        raise ValueError("`traces` must hold at least one trace, and every trace a position; got none.")
    costs = Costs(_timed("draft_step", draft_step), _timed("target_forward", target_forward))

    def seconds(draft_length: int | str | None, overlap: bool = True) -> float:
        learnt, rows = Learnt(), [([trace.guesses], [trace.prompt_ids]) for trace in traces]
        return sum(
            simulate_run(guesses, costs, draft_length, overlap, prompts=prompts, learnt=learnt).seconds
            for guesses, prompts in rows
        )

    sequential, sequential_length = _best(lambda length: seconds(length, overlap=False))
    lockstep, lockstep_length = _best(seconds)
    return SimulatedTimes(
        plain=seconds(None),
        sequential=sequential,
        sequential_length=sequential_length,
        lockstep=lockstep,
        lockstep_length=lockstep_length,
        pearl=seconds("auto"),
        bound=sum(_bound(trace, costs.target_forward) for trace in traces),
    )


def _timed(name: str, seconds: Any) -> Callable[[int], float]:
    """A function of seconds that refuses what is no time."""
    if not callable(seconds):
        raise TypeError(
            f"`{name}` must be a function from a number of tokens to seconds, such as `lambda tokens: 1e-3`; got a "
            f"{type(seconds).__name__}."
        )

    @functools.cache
    def timed(size: int) -> float:
        value = float(seconds(size))
        if not 0.0 <= value < math.inf:
            raise ValueError(f"`{name}` must return seconds, 0 or more and finite; for {size} it returned {value}.")
        return value

    return timed


def _best(seconds: Callable[[int], float]) -> tuple[float, int]:
    """The least time of `DRAFT_LENGTHS`, and the length that it comes of.

    All are tried: where a forward over two tokens takes much longer than one over one, only long ones gain.
    """
    return min((seconds(length), length) for length in DRAFT_LENGTHS)


def _bound(trace: Trace, target_forward: Callable[[int], float]) -> float:
    """Each forward verifies all guesses that stand, and its own token replaces the first that does not."""
    total, num_stood = 0.0, 0
    for guess in trace.guesses:
        if guess.stands:
            num_stood += 1
        else:
            total += target_forward(1 + num_stood)
            num_stood = 0
    return total + (target_forward(num_stood) if num_stood else 0.0)
