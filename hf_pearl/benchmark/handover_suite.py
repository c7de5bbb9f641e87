"""How long the lanes take to hand over to each other, and the executions whose speed depends on it.

A draft of its own is granted one step after the other, as in the lockstep schedule. While it is not granted one it
sleeps, so that a hand-over includes waking the other side. *To the draft* is from the engine's grant to the beginning
of the step: the message is encoded, checked, put into the ring, the worker woken, the message read. *To the engine* is
from the end of the step to the engine's next line of Python: guesses and progress are encoded and published, the
engine woken, the progress read. Both sides read the same monotonic clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from transformers import LogitsProcessorList, PreTrainedModel

from ..cache import PagedPrefixCache
from ..config import PearlConfig
from ..decoding.calibration import Calibration
from ..decoding.drafting import Drafter
from ..decoding.messages import Admission, Verdict
from ..decoding.proposal import Proposer
from ..parallel.lane import ModelLane, output_vocab_size
from ..parallel.processes import ProcessDraft
from ..parallel.threads import ThreadDraft
from ..parallel.workers.draft_workers import DraftWorker
from .methods import COLD, ENGINE, GENERATE, Method, Setting

EXECUTIONS = ("threads", "processes")
NUM_BLOCKS = 512
ASLEEP_SECONDS = 0.002  # after a verdict, until the draft waits again
START_SECONDS = 120.0
STEP_SECONDS = 10.0
WARM_UP = 20
MIN_STEPS, MAX_STEPS = 2, 4000  # Percentiles lie between two; all steps write one text, and drafts read so many tokens.

Figures = dict[str, Any]
Draft = ThreadDraft | ProcessDraft


def _with(execution: str) -> PearlConfig:
    return replace(COLD, execution=execution)  # type: ignore[arg-type]


METHODS = (
    GENERATE,
    *(
        Method(name, f"PEARL's default, `execution={name!r}`", (Setting(_with(name), True),), False)
        for name in ("inline", *EXECUTIONS, "auto")
    ),
)
SAMPLED_METHODS = (*METHODS, ENGINE)  # transformers draws other noise: texts are compared with our engine's.


def measure_handovers(draft: PreTrainedModel, num_steps: int) -> list[Figures]:
    """Microseconds of a hand-over, to the draft and to the engine, for every execution with lanes beside each other.

    Medians and 99th percentiles of `num_steps` steps, from `MIN_STEPS` to `MAX_STEPS`.
    """
    found = []
    for execution in EXECUTIONS:
        with _lane(draft, execution) as lane:
            to_draft, to_engine = _hand_over(lane, WARM_UP + num_steps)
        found.append({"execution": execution, "to_draft": _summary(to_draft), "to_engine": _summary(to_engine)})
    return found


@contextmanager
def _lane(draft: PreTrainedModel, execution: str) -> Iterator[Draft]:
    """A draft lane in a call of its own, in lockstep."""
    vocab_size = output_vocab_size(draft)
    with ExitStack() as stack:
        lane: Draft
        if execution == "processes":
            worker = DraftWorker(draft, NUM_BLOCKS)
            stack.callback(worker.close)
            if not worker.wait_until_ready(START_SECONDS):
                raise TimeoutError(f"the worker was not ready within {START_SECONDS:.0f} s: {worker.why_it_ended()}")
            lane = worker.call(vocab_size, LogitsProcessorList(), 0, free_running=False)
        else:
            model = ModelLane(draft, PagedPrefixCache(draft.config, NUM_BLOCKS, device=draft.device))
            drafter = Drafter(model, Proposer(vocab_size, LogitsProcessorList(), 0), Calibration(), free_running=False)
            lane = ThreadDraft(drafter, model, free_running=False)
        stack.callback(lane.abort)
        yield lane


def _hand_over(lane: Draft, num_steps: int) -> tuple[list[float], list[float]]:
    """Seconds to the draft and to the engine, of every step but the first ones."""
    lane.send(Admission(0, (1, 2, 3), num_steps + 64, 0, None))
    granted, returned = [], []
    for number in range(1, num_steps + 1):
        time.sleep(ASLEEP_SECONDS)
        granted.append(time.perf_counter())
        lane.grant(1)
        if not lane.wait(number, STEP_SECONDS):
            raise TimeoutError(f"draft step {number} did not end within {STEP_SECONDS:.0f} s: {lane.error}")
        returned.append(time.perf_counter())
        tree = lane.tree(0)
        if tree is not None and tree.token_ids:
            lane.send(Verdict(0, number, tree.token_ids[:1]))
    steps = lane.finish().timeline
    to_draft = [step.started - at for step, at in zip(steps, granted, strict=True)]
    to_engine = [at - step.ended for step, at in zip(steps, returned, strict=True)]
    return to_draft[WARM_UP:], to_engine[WARM_UP:]


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in microseconds."""
    return {"median_us": 1e6 * statistics.median(seconds), "p99_us": 1e6 * statistics.quantiles(seconds, n=100)[98]}
