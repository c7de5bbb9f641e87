"""How many threads a draft in a process of its own should have: tried once, before the process starts.

On two or three cores there is nothing to find out: the draft has one. On more, a draft that is slow beside its target
guesses too little on one core, and a target waits for nobody but is slower on fewer.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..cache import PagedPrefixCache
from ..decoding.messages import Window
from ..model_devices import input_device
from ..planning.planner import ASSUMED_ACCEPTANCE, expected_tokens
from .cores import available_cores, leaving_cores
from .lane import ModelLane
from .ranks.models import link_of, rank_model_of

logger = logging.get_logger(__name__)

MAX_SECONDS = 1.5  # after which nothing more is tried; what has begun then takes its time
NUM_RUNS = 3  # of which the fastest counts: beside other load nothing is faster than it is
NUM_CONTEXT, NUM_VERIFIED = 16, 4  # tokens before a forward, and tokens of one of the target
MIN_GAIN = 1.05  # times as fast with twice as many threads of the draft, or it has fewer

Seconds = tuple[float, float]  # of a draft step, and of a target forward beside it


def threads_of_draft(target: PreTrainedModel, draft: PreTrainedModel) -> int:
    """The number of threads of the draft with which this pair is expected to be fastest here.

    Parts of a model have what `launch` gave them, and are not tried.
    """
    cores = len(available_cores())
    most = min(cores // 2, torch.get_num_threads())
    models = target, draft
    if most < 2 or any(input_device(each).type != "cpu" or rank_model_of(each) or link_of(each) for each in models):
        return 1
    draft_seconds, target_seconds = _Trial(draft, 1), _Trial(target, NUM_VERIFIED)
    found = best_split(lambda threads: (draft_seconds(threads), target_seconds(cores - threads)), most)
    logger.info(f"Of {cores} cores {found} {'serves' if found == 1 else 'serve'} the draft, the others the target.")
    return found


def best_split(seconds: Callable[[int], Seconds], most: int, clock: Callable[[], float] = time.perf_counter) -> int:
    """Threads of the draft, a power of two up to `most`: doubled as long as that gains.

    Parameters
    ----------
    seconds : callable
        What both lanes' forwards take if the draft has so many threads.
    clock : callable
        Seconds; `MAX_SECONDS` after the beginning nothing more is asked.
    """
    deadline = clock() + MAX_SECONDS
    best, rate = 1, expected_rate(*seconds(1))
    while 2 * best <= most and clock() < deadline:
        doubled = expected_rate(*seconds(2 * best))
        if doubled < MIN_GAIN * rate:
            break
        best, rate = 2 * best, doubled
    return best


def expected_rate(draft_step: float, target_forward: float) -> float:
    """Tokens per second of overlapping lanes: a forward verifies what was drafted beside the one before."""
    return expected_tokens(target_forward / draft_step, ASSUMED_ACCEPTANCE) / target_forward


class _Trial:
    """Forwards of one model over `num_tokens` tokens, behind a short text that means nothing."""

    def __init__(self, model: PreTrainedModel, num_tokens: int) -> None:
        self._lane = ModelLane(model, PagedPrefixCache(model.config, 16, device=input_device(model)))
        self._tokens = tuple(token % self._lane.vocab_size for token in range(1, NUM_CONTEXT + num_tokens + 1))

    def __call__(self, num_threads: int) -> float:
        """Seconds of one with so many threads."""
        with leaving_cores(num_threads), self._lane.ready():
            self._lane.admit(0, (), len(self._tokens))
            self._lane.forward([Window(0, self._tokens[:NUM_CONTEXT], 1)])
            new = self._tokens[NUM_CONTEXT:]
            return min(self._seconds(Window(0, new, len(new))) for _ in range(NUM_RUNS))

    def _seconds(self, window: Window) -> float:
        started = time.perf_counter()
        self._lane.forward([window])
        seconds = time.perf_counter() - started
        self._lane.rollback(0, NUM_CONTEXT)
        return seconds
