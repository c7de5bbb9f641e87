"""The default schedule: the free-running one, as long as it is faster than decoding without a draft."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .benefit import Benefit, Benefits
from .guesses import Guesses
from .request import Request
from .schedule import DraftRunner, FreeRunning, Schedule
from .undrafted import UndraftedForwards

PATIENCE = 64  # forwards after which a draft counts although nothing was heard of it: it may have failed


class WhilePays(Schedule):
    """Lets the draft rest until it is ready, while decoding without it is measured, and where that is faster.

    It has to be made before the draft hears of the requests, so that it can keep the draft from beginning with them.

    Parameters
    ----------
    call : sequence of Request
        All requests of the call.
    drafting : FreeRunning
        The schedule where it does not rest.
    draft : DraftRunner
        The draft of both.
    benefits : Benefits
        What is known of the pair.
    leave_cores : callable
        Called with whether the target should leave cores to the draft.
    clock : callable
        Seconds.
    """

    def __init__(
        self,
        call: Sequence[Request],
        drafting: FreeRunning,
        draft: DraftRunner,
        benefits: Benefits,
        leave_cores: Callable[[bool], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._call = call
        self._drafting = drafting
        self._draft = draft
        self._benefits = benefits
        self._leave_cores = leave_cores
        self._clock = clock
        self._benefit = Benefit()
        self._undrafted = UndraftedForwards(drafting.lookup_chances)
        self._num_rows = 0
        self._has_caught_up = False
        self._num_drafting = 0
        self._waits_for: dict[int, int] = {}  # request -> tokens that the draft must know before it counts
        self._began = 0.0
        self._is_first = self._is_beginning = True
        self._leaves_cores: bool | None = None
        draft.rest(True)  # A draft that is not wanted does not read the prompts: that would slow the target's reading.

    def before_forward(self, requests: Sequence[Request]) -> dict[int, Guesses]:
        """The guesses of every request that the coming forward verifies; those looked up while the draft rests."""
        self._began = self._clock()
        for request in requests:
            self._undrafted.follow(request)
        self._num_rows = max(1, sum(not request.finished for request in self._call))  # Some may be ahead and wait.
        self._benefit = self._benefits.of(self._num_rows)
        is_wanted = self._benefit.mode == "drafted" and self._draft.is_ready
        if is_wanted and self._is_first and self._benefits.beginnings.asks_for_plain():
            is_wanted = False
        self._rest(requests, not is_wanted)
        self._share_cores(not self.is_resting or self._draft.is_starting)
        if self.is_resting:
            return self._drafting.without_draft(requests, self._benefits.plain_pace)
        self._num_drafting += 1
        if not self._has_caught_up:
            self._has_caught_up = self._num_drafting > PATIENCE or any(self._knows(request) for request in requests)
        return self._drafting.before_forward(requests)

    @property
    def waited_seconds(self) -> float:  # type: ignore[override]
        """How long the coming forward has been held back for draft tokens."""
        return self._drafting.waited_seconds

    def _rest(self, requests: Sequence[Request], is_resting: bool) -> None:
        if is_resting == self.is_resting and not self._is_first:
            return
        self._is_beginning = self._is_first
        self.is_resting, self._has_caught_up, self._is_first, self._num_drafting = is_resting, False, False, 0
        self._waits_for = {request.request_id: len(request.verified) for request in requests}
        self._draft.rest(is_resting)

    def _share_cores(self, leaves: bool) -> None:
        if leaves != self._leaves_cores:
            self._leaves_cores = leaves
            self._leave_cores(leaves)

    def _knows(self, request: Request) -> bool:
        """Whether the draft has guessed behind what was verified when it began: it may have had much to read."""
        tree = self._draft.tree(request.request_id)
        return tree is not None and tree.root >= self._waits_for.get(request.request_id, 0)

    def learn(self, num_tokens: int, seconds: float, num_verified: int) -> None:
        """Learn from a decode forward, and from how long its cycle took."""
        self._drafting.learn(num_tokens, seconds, num_verified)
        least = self._benefits.plain_pace.worth_verifying_above(self._num_rows)
        num_forwards = sum(self._undrafted.count(request, least) for request in self._call)
        is_of_mode = (self._benefit.mode == "plain") == self.is_resting
        # A draft that is starting slows the target down: what that decodes meanwhile says nothing of either mode.
        if not is_of_mode:
            return
        beginnings = self._benefits.beginnings
        beginnings.record_cycle()
        text, seconds = num_forwards / self._num_rows, self._clock() - self._began
        if self.is_resting and self._draft.is_ready:
            self._benefit.record(text, seconds)
        elif self._has_caught_up and not self.is_resting:
            self._is_beginning = False
            self._benefit.record(text, seconds + beginnings.seconds_per_cycle)
        elif self._is_beginning and not self.is_resting:
            plain_rate = self._benefit.found["plain"]
            beginnings.record_delay(seconds - text / plain_rate if plain_rate else 0.0)
        elif not self.is_resting:
            self._benefit.record_catching_up(text, seconds)

    def learn_prefill(self, num_tokens: int, seconds: float) -> None:
        """Learn from a forward over prompts; beside a draft that is starting, it says nothing."""
        if self._draft.is_ready:
            self._benefits.beginnings.record_prefill(not self.is_resting, num_tokens, seconds)
