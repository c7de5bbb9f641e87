"""Where the time of one call goes: its parts, one after the other, and the times of both models' steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from ..decoding.loop import DecodingLoop
from ..decoding.messages import DraftStep
from ..decoding.verification import Verifier
from ..parallel.inline import InlineDraft
from ..parallel.lane import ModelLane
from ..parallel.processes import ProcessDraft
from ..parallel.threads import ThreadDraft
from .completion import Batch, Completion, Workload, complete
from .methods import Setting

RUNNERS = (ProcessDraft, ThreadDraft, InlineDraft)


class Span(NamedTuple):
    """One call of a method: when it began and ended, in seconds, and what went in and came out."""

    started: float
    ended: float
    args: tuple[Any, ...]
    result: Any

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started


class Parts(NamedTuple):
    """Seconds of one call, in parts that follow each other in the target's thread and make up all of it.

    Attributes
    ----------
    outside : float
        Before and behind the loop: transformers' preparation, the engine's, and the end of the draft's call.
    prefill, forwards : float
        The target's first forward, which reads the prompts, and all others.
    waiting : float
        For the draft.
    judging : float
        Choosing the target's tokens and comparing the guesses with them.
    rest : float
        The remainder of the loop: what to verify, verdicts, the cache.
    """

    outside: float
    prefill: float
    forwards: float
    waiting: float
    judging: float
    rest: float


class Profile(NamedTuple):
    """One call: what it wrote, its parts, and both models' steps.

    Attributes
    ----------
    target_steps : list of tuple of int and float
        Tokens and seconds of every target forward but the first.
    draft_steps : list of tuple of int and float
        Guesses and seconds of every draft step but the first, which reads the prompts.
    draft_prefill : float
        Seconds of that.
    """

    completion: Completion
    parts: Parts
    target_steps: list[tuple[int, float]]
    draft_steps: list[tuple[int, float]]
    draft_prefill: float


@contextmanager
def watched(owner: type, name: str) -> Iterator[list[Span]]:
    """Note every call of a method that `owner` defines; takes a fraction of a microsecond each."""
    original, spans = vars(owner)[name], []

    def watch(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        spans.append(Span(started, time.perf_counter(), args, result))
        return result

    setattr(owner, name, watch)
    try:
        yield spans
    finally:
        setattr(owner, name, original)


def profile(workload: Workload, setting: Setting, batch: Batch) -> Profile:
    """One call of `generate` with a draft, watched."""
    with ExitStack() as stack:
        runs, judgements, forwards = (
            stack.enter_context(watched(owner, name))
            for owner, name in ((DecodingLoop, "run"), (Verifier, "judge"), (ModelLane, "forward"))
        )
        waits, ends = ([stack.enter_context(watched(owner, name)) for owner in RUNNERS] for name in ("wait", "finish"))
        completion = complete(workload, setting, batch)
    first, *others = [span for span in forwards if span.args[0].model is workload.target]
    timeline: tuple[DraftStep, ...] = next(span.result.timeline for spans in ends for span in spans)
    waiting = sum(span.seconds for spans in waits for span in spans)
    judging, in_forwards = (sum(span.seconds for span in spans) for spans in (judgements, others))
    in_loop = runs[0].seconds
    rest = in_loop - first.seconds - in_forwards - waiting - judging
    return Profile(
        completion,
        Parts(completion.seconds - in_loop, first.seconds, in_forwards, waiting, judging, rest),
        [(sum(len(window.token_ids) for window in span.args[1]), span.seconds) for span in others],
        [(step.num_guesses, step.ended - step.started) for step in timeline[1:]],
        timeline[0].ended - timeline[0].started if timeline else 0.0,
    )
