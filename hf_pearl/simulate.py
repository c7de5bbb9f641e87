"""How long schedules would take on a recorded text, exactly, if nothing but the two models took time.

traces = hf_pearl.record_traces(target, draft, [tokenizer(text).input_ids for text in texts])
times = hf_pearl.simulate(traces, draft_step=lambda guesses: 0.9e-3, target_forward=lambda tokens: 7e-3)
print(times, times.efficiency(measured_seconds))
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper

from . import compat
from .config import PearlConfig
from .decoding.calibration import MAX_RANKS
from .decoding.messages import Admission
from .decoding.noise import request_seed
from .decoding.proposal import Prefix, Proposer
from .decoding.recorded import TracedGuess
from .decoding.simulation import Costs, Learnt, simulate_run
from .generation import pearl_generate
from .model_devices import input_device
from .parallel.lane import output_vocab_size
from .parallel.rank_models import check_whole

MAX_DRAFT_LENGTH = 16
PATIENCE = 3  # draft lengths without a gain after which longer ones are not tried


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
        Ordinary speculative decoding with its best fixed draft length (Leviathan et al. 2023, arXiv 2211.17192).
    sequential_length : int
        That length.
    lockstep : float
        PEARL with its best fixed draft length (arXiv 2408.11850).
    lockstep_length : int
        That length.
    pearl : float
        The default of this package: free-running, with a tree.
    bound : float
        No draft that guesses as well could be faster: the target never waits, always verifies just as many guesses as
        stand, and nobody else takes time.
    """

    plain: float
    sequential: float
    sequential_length: int
    lockstep: float
    lockstep_length: int
    pearl: float
    bound: float

    def efficiency(self, measured_seconds: float) -> float:
        """Which share of a measured time PEARL would take if nothing but the models took time."""
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
    ValueError
        `temperature` is negative.
    NotImplementedError
        A model of `launch` that is not whole in this process.
    """
    for name, model in (("target", target), ("draft", draft)):
        check_whole(name, model, "Load it by `from_pretrained`.")
    if temperature < 0:
        raise ValueError(f"`temperature` must be 0 (greedy) or positive, got {temperature}.")
    generate = types.MethodType(compat.original_generate(), target)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    traces = []
    for prompt in prompts:
        input_ids = torch.tensor([list(prompt)], device=input_device(target))
        options |= {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        token_ids = pearl_generate(generate, target, PearlConfig(seed=seed), (), options)[0].tolist()
        traces.append(trace_of(target, draft, token_ids, len(prompt), temperature, seed))
    return traces


@torch.no_grad()
def trace_of(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    token_ids: list[int],
    num_prompt_tokens: int,
    temperature: float,
    seed: int,
) -> Trace:
    """What the draft would have guessed at each position of a text behind its first `num_prompt_tokens` tokens."""
    logits = draft(torch.tensor([token_ids], device=input_device(draft))).logits[0]
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature > 0 else [])
    proposer = Proposer(output_vocab_size(target), processors)
    call_seed = request_seed(seed, 0) if temperature > 0 else None
    proposer.admit(Admission(0, tuple(token_ids[:num_prompt_tokens]), len(token_ids), 0, call_seed))
    traced = []
    for length in range(num_prompt_tokens, len(token_ids)):
        prefix = Prefix(0, length, lambda: token_ids)
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
    """
    if not traces or not all(trace.guesses for trace in traces):
        raise ValueError("`traces` must hold at least one trace, and every trace a position; got none.")
    costs = Costs(draft_step, target_forward)

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
        bound=sum(_bound(trace, target_forward) for trace in traces),
    )


def _best(seconds: Callable[[int], float]) -> tuple[float, int]:
    best, best_length = seconds(1), 1
    for length in range(2, MAX_DRAFT_LENGTH + 1):
        if (now := seconds(length)) < best:
            best, best_length = now, length
        elif length - best_length >= PATIENCE:
            break
    return best, best_length


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
