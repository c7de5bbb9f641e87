"""The decoding under a virtual clock: the same loop, schedule, policy and draft tree, with recorded models."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from .benefit import Benefits
from .calibration import Calibration
from .draft_tree import longest_line
from .drafting import MAX_WIDTH, Drafter
from .lookup import LookupChances
from .loop import DecodingLoop
from .messages import Admission, Grant, Removal, TokenTree, Verdict, Window
from .policy import Pace
from .recorded import RecordedLane, RecordedProposer, TracedGuess, has_tokens
from .request import Request
from .rules import Rules
from .schedule import FreeRunning, Lockstep, PlainDecoding, Schedule
from .stats import PearlStats
from .verification import Verifier
from .while_pays import WhilePays

NO_TIME = 1e-12  # seconds of a draft step that takes none: the schedule has to know what it takes


@dataclass(frozen=True)
class Costs:
    """Seconds of a draft step by the number of guesses in it, and of a target forward by the number of its tokens.

    The latter takes `contention` times as long beside a draft that does not rest. The first step and the first forward,
    which read the prompts and verify nothing, take what `draft_prefill` and `target_prefill` say; without, prompts
    are cached.
    """

    draft_step: Callable[[int], float]
    target_forward: Callable[[int], float]
    contention: float = 1.0
    draft_prefill: float | None = None
    target_prefill: float | None = None


@dataclass(frozen=True)
class KeptBetweenRuns:
    """What an engine knows of its pair; given to one run after the other, it is kept between them as an engine does."""

    calibration: Calibration = field(default_factory=Calibration)
    pace: Pace = field(default_factory=Pace)
    lookup_chances: LookupChances = field(default_factory=LookupChances)


class SimulatedRun(NamedTuple):
    """Virtual seconds that a trace took, and the call's statistics."""

    seconds: float
    stats: PearlStats


class VirtualClock:
    """Seconds that pass only when somebody lets them."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedDrafter(Drafter):
    """A drafter that takes the costs for the times of its steps.

    Attributes
    ----------
    virtual_seconds : float
        Of the last step.
    """

    def __init__(self, costs: Costs, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._costs = costs
        self.virtual_seconds = 0.0

    def step(self, most: int = 1) -> list[TokenTree]:
        """One draft step: there are no launches here."""
        trees, prefill = super().step(), self._costs.draft_prefill
        if len(self.timeline) == 1 and prefill is not None:
            self.virtual_seconds = prefill
        elif trees:
            self.virtual_seconds = self._costs.draft_step(self.timeline[-1].num_guesses)
        else:
            self.virtual_seconds = 0.0
        return trees

    def time_step(self, num_guesses: int, seconds: float) -> None:
        """Learn the virtual time of a step."""
        super().time_step(num_guesses, self._costs.draft_step(num_guesses))


class VirtualDraft:
    """A draft lane in virtual time: a step that began before a message was sent ends without having heard it."""

    concurrent = True
    is_ready = True
    is_starting = False

    def __init__(self, drafter: TimedDrafter, costs: Costs, clock: VirtualClock, free_running: bool) -> None:
        self._drafter = drafter
        self._costs = costs
        self._clock = clock
        self._free_running = free_running
        self._inbox: deque[Admission | Verdict | Removal | Grant] = deque()
        self._granted = 0
        self.is_resting = False
        self._trees: dict[int, TokenTree] = {}
        self._step_ends: float | None = None
        self._made: list[TokenTree] = []
        self.num_steps = 0

    @property
    def step_seconds(self) -> float:
        """The true time of a draft step; 0.0, which is unknown, while the prompts are read."""
        is_reading = self._costs.draft_prefill is not None and not self.num_steps
        return 0.0 if is_reading else max(NO_TIME, self._costs.draft_step(1))

    @property
    def max_line(self) -> int:
        """Guesses at which a line waits for a verdict."""
        return self._drafter.max_line

    def send(self, message: Admission | Verdict | Removal) -> None:
        """Deliver a message; it is heard at the end of the step in progress."""
        self._inbox.append(message)
        self._begin()

    def grant(self, num_steps: int) -> None:
        """Allow `num_steps` more draft steps."""
        self._inbox.append(Grant(num_steps))
        self._begin()

    def rest(self, is_resting: bool) -> None:
        """Draft no more, or go on."""
        self.is_resting = is_resting
        self._begin()

    def tree(self, request_id: int) -> TokenTree | None:
        """What was published last for a request."""
        return self._trees.get(request_id)

    def wait(self, num_steps: int, timeout: float) -> bool:
        """Let time pass until `num_steps` steps are done."""
        deadline = self._clock.now + timeout
        while self.num_steps < num_steps and self._step_ends is not None and self._step_ends <= deadline:
            self.run_until(self._step_ends)
        if self.num_steps < num_steps:
            self._clock.now = deadline
        return self.num_steps >= num_steps

    def run_until(self, end: float) -> None:
        """Let time pass until `end`, with all draft steps that end by then."""
        while self._step_ends is not None and self._step_ends <= end:
            self._clock.now = self._step_ends
            self._publish()
            self._begin()
        self._clock.now = end

    def _publish(self) -> None:
        for tree in self._made:
            self._trees[tree.request_id] = tree
        self.num_steps = self._drafter.num_steps
        self._step_ends = None

    def _begin(self) -> None:
        """Hear what is there, and begin a step if there is one to make."""
        if self._step_ends is not None:
            return
        while not self._granted and self._inbox:
            message = self._inbox.popleft()
            if isinstance(message, Grant):
                self._granted += message.num_steps
            else:
                self._drafter.handle(message)
        if self._granted or (self._free_running and not self.is_resting and self._drafter.has_work()):
            self._granted = max(0, self._granted - 1)
            self._made = self._drafter.step()
            self._step_ends = self._clock.now + self._drafter.virtual_seconds


def simulate_run(
    traces: Sequence[Sequence[TracedGuess]],
    costs: Costs,
    draft_length: int | str | None = "auto",
    overlap: bool = True,
    max_width: int = MAX_WIDTH,
    benefits: Benefits | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    learnt: KeptBetweenRuns | None = None,
) -> SimulatedRun:
    """Decode traces, one per row, in virtual time.

    Parameters
    ----------
    draft_length : int, "auto" or None
        As in `PearlConfig`; None is plain decoding.
    overlap : bool
        As in `PearlConfig`.
    max_width : int
        Guesses in a draft step at most; 1 is one line.
    benefits : Benefits, optional
        Let the draft rest where it does not pay, and keep here what is learnt of that.
    prompts : sequence of sequence of int, optional
        The tokens before each trace, in which guesses are looked up, too; the default is a token of each row's own.
    learnt : KeptBetweenRuns, optional
        What is known already, and learns more; the default is nothing.
    """
    prompts = [[row] for row in range(len(traces))] if prompts is None else prompts
    learnt = KeptBetweenRuns() if learnt is None else learnt
    clock = VirtualClock()
    target_seconds: list[float] = []
    draft: VirtualDraft | None = None

    def advance_target(windows: Sequence[Window]) -> None:
        seconds = costs.target_forward(sum(len(window.token_ids) for window in windows))
        if not target_seconds and costs.target_prefill is not None:
            seconds = costs.target_prefill
        target_seconds.append(seconds)
        if draft is not None and overlap:
            seconds *= 1.0 if draft.is_resting else costs.contention
            draft.run_until(clock.now + seconds)
        else:
            clock.now += seconds

    if draft_length is not None:
        free_running = draft_length == "auto" and overlap
        lane = RecordedLane(prompts, traces, reads_prompts=costs.draft_prefill is not None)
        models = lane, RecordedProposer(prompts, traces)
        max_line = longest_line(draft_length)
        drafter = TimedDrafter(costs, *models, learnt.calibration, max_line, free_running, max_width)
        draft = VirtualDraft(drafter, costs, clock, free_running)
    requests = _requests(prompts, max(len(trace) for trace in traces))
    lookup_chances = learnt.lookup_chances if overlap and has_tokens(traces) else None
    schedule = _schedule(requests, draft, draft_length, overlap, clock, benefits, learnt, lookup_chances)
    target = RecordedLane(prompts, traces, advance_target, reads_prompts=costs.target_prefill is not None)
    stats = _run(requests, target, draft, clock, schedule)
    stats.target_seconds = sum(target_seconds)
    return SimulatedRun(clock.now, stats)


def _requests(prompts: Sequence[Sequence[int]], num_new: int) -> list[Request]:
    """A batch in which every row has room for `num_new` tokens behind its prompt, padded to the longest one."""
    longest = max(map(len, prompts))
    return [
        Request(row, len(prompt), (0,) * (longest - len(prompt)), len(prompt) + num_new, list(prompt))
        for row, prompt in enumerate(prompts)
    ]


def _schedule(
    requests: Sequence[Request],
    draft: VirtualDraft | None,
    draft_length: int | str | None,
    overlap: bool,
    clock: VirtualClock,
    benefits: Benefits | None,
    learnt: KeptBetweenRuns,
    lookup_chances: LookupChances | None,
) -> Schedule:
    if draft is None:
        return PlainDecoding()
    if isinstance(draft_length, int):
        return Lockstep(draft, draft_length, overlap)
    drafting = FreeRunning(draft, learnt.pace, overlap, lookup_chances, clock=clock)
    if benefits is None:
        return drafting
    return WhilePays(requests, drafting, draft, benefits, lambda is_leaving: None, clock)


def _run(
    requests: Sequence[Request],
    target: RecordedLane,
    draft: VirtualDraft | None,
    clock: VirtualClock,
    schedule: Schedule,
) -> PearlStats:
    max_length = requests[0].num_padding + requests[0].max_length
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length)])
    rules = Rules(LogitsProcessorList(), criteria, do_sample=False, max_length=max_length)
    for request in requests:
        if draft is not None:
            verified, num_padding = tuple(request.verified), request.num_padding
            draft.send(Admission(request.request_id, verified, request.max_length, num_padding, None))
    stats = PearlStats()
    verifier = Verifier(requests, rules, torch.device("cpu"))
    DecodingLoop(target, requests, verifier, schedule, draft, stats, clock).run()
    return stats
