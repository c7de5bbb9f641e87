"""Steps of the two lanes of one model: a draft step over some guesses, a target forward over some tokens.

Both are made as the engine makes them. A draft step is the draft lane's own, with its tree and its guesses, on requests
whose guesses always stand; a target forward ends when the target's choices are known on the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from ...decoding.calibration import Calibration
from ...decoding.drafting import Drafter
from ...decoding.messages import Admission, DraftStep, TokenTree, Verdict, Window
from ...decoding.proposal import Proposer
from ...parallel.lane import ModelLane, lane_to_measure, output_vocab_size
from .observing import Observed, observe
from .parts import Attempts, Figures
from .timing import seconds_of

LAUNCHES_PER_VERDICT, MAX_STOOD = 4, 4
ROOM = 512  # positions behind the prompt

Rows = Sequence[Sequence[int]]


class WideDrafter(Drafter):
    """Makes its steps as wide as they may be, whatever that costs."""

    @property
    def row_cost(self) -> float:
        """Nothing."""
        return 0.0


def _launched(drafter: Drafter, rows: Rows, num_steps: int, per_launch: int) -> list[DraftStep]:
    """Admit the rows and draft, with a verdict now and then: the steps of launches that had as many as were asked."""
    made: list[DraftStep] = []
    for request_id, token_ids in enumerate(rows):
        drafter.handle(Admission(request_id, tuple(token_ids), len(token_ids) + ROOM, 0, None))
    verdicts = 0
    while len(drafter.timeline) < num_steps and verdicts * MAX_STOOD < ROOM - MAX_STOOD:
        for _ in range(LAUNCHES_PER_VERDICT):
            num_before = len(drafter.timeline)
            drafter.step(per_launch)
            launched = drafter.timeline[num_before:]
            made += launched if len(launched) == per_launch else []
        verdicts += 1
        for request_id in range(len(rows)):
            drafter.handle(Verdict(request_id, verdicts, best_line(drafter.token_tree(request_id))))
    return made


def draft_steps(
    model: PreTrainedModel,
    rows: Rows,
    num_guesses: int,
    num_steps: int,
    per_launch: int = 1,
    compiles: bool = False,
    watches: bool = True,
) -> Figures:
    """Draft steps over so many guesses, of one request or more: their median time, in seconds, and how many there were.

    Beside it stands how long the device was busy in the last ones, per step; None where it is not known.

    Parameters
    ----------
    per_launch : int
        Steps that are launched together; the seconds are None where they cannot be.
    compiles : bool
        Whether what is captured is compiled.
    watches : bool
        Whether the last steps are profiled, see `observe`.

    Raises
    ------
    RuntimeError
        No step was as wide: the model finds too few guesses likely.
    """
    lane = lane_to_measure(model, compiles)
    drafter = WideDrafter(
        lane, Proposer(output_vocab_size(model), LogitsProcessorList()), Calibration(), max_width=num_guesses
    )
    with lane.ready():
        made = _launched(drafter, rows, num_steps, per_launch)
        num_before = len(drafter.timeline)
        busy = None
        if watches:
            last = observe(lambda: [drafter.step(per_launch) for _ in range(LAUNCHES_PER_VERDICT)], lane.device)
            busy = last.device_seconds
    watched = drafter.timeline[num_before:]
    if busy is not None:
        busy = busy / len(watched) if {each.num_guesses for each in watched} == {num_guesses} else None
    wide = [step for step in made[LAUNCHES_PER_VERDICT:] if step.num_guesses == num_guesses]
    if not wide and per_launch == 1:
        raise RuntimeError(f"none of {len(drafter.timeline)} draft steps went over {num_guesses} guesses")
    seconds = statistics.median(step.ended - step.started for step in wide) if wide else None
    return {
        "requests": len(rows),
        "guesses": num_guesses,
        "per_launch": per_launch,
        "seconds": seconds,
        "device_seconds": busy,
        "num_steps": len(wide),
    }


def best_line(tree: TokenTree) -> tuple[int, ...]:
    """The first guesses of a tree's likeliest line."""
    line: list[int] = []
    before = -1
    for place, (token_id, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True)):
        if parent == before and len(line) < MAX_STOOD:
            line, before = [*line, token_id], place
    return tuple(line)


class TargetSteps:
    """Target forwards over one window per row, each behind the same prompt; inside the lane's scope."""

    def __init__(self, lane: ModelLane, rows: Rows) -> None:
        self.lane = lane
        self.rows = rows
        for request_id, token_ids in enumerate(rows):
            lane.admit(request_id, token_ids, len(token_ids) + ROOM)
            lane.forward([Window(request_id, tuple(token_ids), 1)])

    def step(self, num_tokens: int) -> list[int]:
        """Verify `num_tokens` tokens of every row: the target's choice behind each of them. They are dropped again."""
        windows = [
            Window(request_id, tuple(token_ids[-num_tokens:]), num_tokens)
            for request_id, token_ids in enumerate(self.rows)
        ]
        try:
            chosen: list[int] = self.lane.forward(windows).argmax(dim=-1).tolist()
        finally:
            for request_id, token_ids in enumerate(self.rows):
                self.lane.rollback(request_id, len(token_ids))
        return chosen


def target_steps(
    model: PreTrainedModel,
    rows: Rows,
    num_tokens: Sequence[int],
    num_runs: int,
    attempt: Attempts,
    compiles: bool = False,
    watches: bool = True,
) -> tuple[list[Figures], Observed | None]:
    """Median seconds of target forwards over so many tokens a row; and what ran in the smallest, if that is watched."""
    lane = lane_to_measure(model, compiles)
    device = lane.device
    with lane.ready():
        steps = TargetSteps(lane, rows)

        def step(num: int) -> Callable[[], list[int]]:
            return lambda: steps.step(num)

        def name(num: int) -> str:
            return f"target step, batch {len(rows)}, {num} tokens a row"

        times = {num: attempt(name(num), partial(seconds_of, step(num), device, num_runs)) for num in num_tokens}
        figures = [
            {"rows": len(rows), "tokens": num, "seconds": seconds}
            for num, seconds in times.items()
            if seconds is not None
        ]
        least = min(num_tokens)
        if not watches:
            return figures, None
        return figures, attempt(f"what runs in a {name(least)}", partial(observe, step(least), device))


def random_rows(num_rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens, the same ones every time, no two alike."""
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randint(1, vocab_size, (num_rows, length), generator=generator).tolist()
