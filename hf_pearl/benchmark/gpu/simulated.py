"""What schedules would take with the draft on a GPU of its own: simulated, from step times that were measured on one.

The text is the embedded pair's, recorded; the times are those of random models of real shapes. Nothing but the models
takes time: no hand-over, no host. Where the target has more than one GPU, reading its weights takes so much less time,
what its step takes beyond that stays, and its ranks' communication takes none: a bound, not a forecast.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from ...pair import load_demo_pair
from ...simulate import simulate
from ...traces import Trace, record_traces
from .pairs import texts
from .parts import Figures, NotMeasured
from .rivals import GENERATE

TARGET_GPUS = (1, 2, 4)

Seconds = Callable[[int], float]


def recorded(num_prompts: int, max_new_tokens: int, device: torch.device, dtype: torch.dtype) -> list[Trace]:
    """Traces of the embedded pair, greedy."""
    target, draft, tokenizer = load_demo_pair(device, dtype)
    return record_traces(target, draft, [tokenizer(text).input_ids for text in texts(num_prompts)], max_new_tokens)


def simulated_speed_ups(traces: Sequence[Trace], draft: Figures, target: Figures) -> list[Figures]:
    """Tokens per second of every schedule over those of `generate`, for each number of the target's GPUs.

    Parameters
    ----------
    draft, target : dict
        The measured figures of the two models, as `models.measure_model` makes them.

    Raises
    ------
    NotMeasured
        The draft's steps, the target's, or its time per token with `generate`, of one row, are missing.
    """
    drafted = [(each["guesses"], each["seconds"]) for each in draft["draft_steps"] if each["requests"] == 1]
    verified = [(each["tokens"], each["seconds"]) for each in target["target_steps"] if each["rows"] == 1]
    rates = [each for each in target["token_seconds"] if each["method"] == GENERATE and each["rows"] == 1]
    if not (drafted and verified and rates):
        raise NotMeasured("needs steps of both models and the time per token of `generate`, some of which failed")
    draft_step, one_gpu = between(drafted), between(verified)
    generate = rates[0]["seconds"] * sum(len(trace.guesses) for trace in traces)
    found = []
    for num_gpus in TARGET_GPUS:
        times = simulate(traces, draft_step, spread_over(num_gpus, one_gpu, target["bound_seconds"]))
        over_generate = {
            name: generate / getattr(times, name) for name in ("plain", "sequential", "lockstep", "pearl", "bound")
        }
        found.append({"is_simulated": True, "gpus": 1 + num_gpus, "over_generate": over_generate})
    return found


def spread_over(num_gpus: int, seconds: Seconds, bound_seconds: float) -> Seconds:
    """Times of a target whose weights lie on so many GPUs, without communication."""
    saved = bound_seconds * (1 - 1 / num_gpus)
    # A forward that was measured below its bound keeps its share of it.
    return lambda num_tokens: max(seconds(num_tokens) - saved, seconds(num_tokens) / num_gpus)


def between(points: Sequence[tuple[int, float]]) -> Seconds:
    """Times of any size, straight lines between those that were measured, and the last one's slope beyond."""
    sizes, seconds = zip(*sorted(points), strict=True)

    def at(size: int) -> float:
        if len(sizes) == 1:
            return float(seconds[0])
        right = min(max(bisect_left(sizes, size), 1), len(sizes) - 1)
        share = (size - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        line = seconds[right - 1] + share * (seconds[right] - seconds[right - 1])
        return float(max(line, min(seconds)))  # Noise may make the last one fall.

    return at
