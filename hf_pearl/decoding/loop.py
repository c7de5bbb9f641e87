"""The loop: launch the target on what the draft has guessed, judge, commit; until every row has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from ..errors import PearlOutOfBlocksError
from .guesses import Guesses
from .lanes import Lane
from .messages import Removal, Verdict, Window
from .request import Request
from .schedule import Schedule
from .scheduler import Scheduler
from .stats import PearlStats, TargetForward
from .verification import Verifier

MAX_TOKENS_PER_FORWARD = 4096  # Longer prompts are read in pieces: what a forward takes beside its weights is bounded.
MAX_TOKENS_PER_VERDICT = 4096  # What a resting draft has not heard may be longer than its lane's messages.


class VerdictSink(Protocol):
    """Who must hear of verdicts: the draft."""

    def send(self, message: Verdict | Removal) -> None:
        """Deliver a message, in order."""


class Launch(NamedTuple):
    """One target forward: its windows, and the guesses at the end of each."""

    windows: list[Window]
    guesses: list[Guesses]
    is_decode: bool


class DecodingLoop:
    """One call's requests, from prompt to last token.

    Parameters
    ----------
    target : Lane
        The target on its cache.
    verifier : Verifier
        Judges the target's logits.
    schedule : Schedule
        Which draft tokens to verify, and when.
    draft : VerdictSink or None
        Hears of verdicts and ended requests.
    clock : callable
        Seconds; a test may put a virtual one in.
    """

    def __init__(
        self,
        target: Lane,
        requests: Sequence[Request],
        verifier: Verifier,
        schedule: Schedule,
        draft: VerdictSink | None,
        stats: PearlStats,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.target = target
        self.requests = requests
        self.verifier = verifier
        self.schedule = schedule
        self.draft = draft
        self.stats = stats
        self.clock = clock
        self.scheduler = Scheduler(target, requests, not verifier.advances_together, stats)

    def run(self) -> None:
        """Decode until every row has ended."""
        while not self.verifier.finished:
            self.step()

    def step(self) -> None:
        """One target forward and its verdicts."""
        began, num_warm_ups = self.clock(), self.target.num_warm_ups
        waiting = self.scheduler.waiting()
        guesses = self.schedule.before_forward(waiting)
        started = self.clock()
        try:
            launch, logits = self._forward(waiting, guesses)
        except PearlOutOfBlocksError:
            if self.scheduler.preempt():
                return
            raise
        ended = self.clock() if logits.device.type == "cpu" else None
        self.stats.target_forwards += 1
        self.stats.undrafted_forwards += self.schedule.is_resting
        self.schedule.after_forward()
        self._queue(launch, logits)
        verdicts, num_accepted = self.verifier.judge(), self.stats.accepted_tokens
        ended = self.clock() if ended is None else ended  # Elsewhere a forward has ended when its tokens are known.
        self._tell(verdicts)  # First of all: the draft may be guessing behind a token that did not stand.
        self._count(launch, verdicts)
        self._commit(verdicts)
        num_tokens = sum(len(window.token_ids) for window in launch.windows)
        num_accepted = self.stats.accepted_tokens - num_accepted
        self.stats.target_timeline.append(TargetForward(started, ended, num_tokens, num_accepted))
        if self.target.num_warm_ups == num_warm_ups:
            seconds = self.clock() - began - self.schedule.waited_seconds
            if launch.is_decode:
                self.schedule.learn(num_tokens, seconds, sum(map(len, verdicts.values())))
            else:
                self.schedule.learn_prefill(num_tokens, seconds)

    def _forward(self, waiting: Sequence[Request], guesses: dict[int, Guesses]) -> tuple[Launch, torch.Tensor]:
        launch = self._launch(waiting, guesses)
        try:
            return launch, self.target.forward(launch.windows)
        except PearlOutOfBlocksError:
            if not any(launch.guesses):
                raise
        launch = self._launch(waiting, {})  # Guesses may need more memory than the text that comes of them.
        return launch, self.target.forward(launch.windows)

    def _launch(self, waiting: Sequence[Request], guesses: dict[int, Guesses]) -> Launch:
        """The windows of the coming forward: what is verified but not computed, then the guesses."""
        windows: list[Window] = []
        taken: list[Guesses] = []
        budget, is_decode = MAX_TOKENS_PER_FORWARD, True
        for request in waiting:
            request_id = request.request_id
            length = self.target.length(request_id)
            new = request.verified[length:]
            may_guess = len(new) == 1 and not self.scheduler.is_awaited(request)
            guess = guesses.get(request_id, Guesses()).first(max(0, budget - 1)) if may_guess else Guesses()
            is_decode = is_decode and len(new) == 1
            if len(new) + len(guess) > budget:
                if budget:  # A long prompt is computed in pieces; its logits come with the last one.
                    windows.append(Window(request_id, tuple(new[:budget]), 0))
                    taken.append(Guesses())
                break
            budget -= len(new) + len(guess)
            windows.append(Window(request_id, (*new, *guess.token_ids), 1 + len(guess), guess.branches(length)))
            taken.append(guess)
        return Launch(windows, taken, is_decode)

    def _queue(self, launch: Launch, logits: torch.Tensor) -> None:
        row = 0
        for window, guess in zip(launch.windows, launch.guesses, strict=True):
            if window.num_logits:
                request = self.scheduler.resident[window.request_id]
                self.schedule.queue(request, logits[row : row + window.num_logits], guess)
                for follower in self.scheduler.fork_followers(request):
                    self.schedule.queue(follower, logits[row : row + 1], Guesses())
                row += window.num_logits

    def _count(self, launch: Launch, verdicts: dict[int, tuple[int, ...]]) -> None:
        judged = [guess for request in self.requests for guess in request.judged]
        for request in self.requests:
            request.judged.clear()
        for guess in judged:
            self.stats.judge(*guess)
        self.stats.verified_draft_tokens += sum(len(guess) for guess in launch.guesses)
        if launch.is_decode:
            self.stats.decode_windows += len(launch.windows)
            self.stats.decode_tokens += sum(map(len, verdicts.values()))

    def _tell(self, verdicts: dict[int, tuple[int, ...]]) -> None:
        """Send the draft all that is verified and that it has not heard of: while it rested, it heard nothing."""
        if self.draft is None or self.schedule.is_resting:
            return
        for request in (each for each in self.requests if each.request_id in verdicts):
            while request.num_told < len(request.verified):
                new = tuple(request.verified[request.num_told :][:MAX_TOKENS_PER_VERDICT])
                request.num_verdicts += 1
                request.num_told += len(new)
                self.draft.send(Verdict(request.request_id, request.num_verdicts, new))

    def _commit(self, verdicts: dict[int, tuple[int, ...]]) -> None:
        """Drop from the target's cache what did not stand, and end what has ended."""
        for request in self.requests:
            tokens = verdicts.get(request.request_id)
            if tokens is None:
                continue
            self.stats.generated_tokens += len(tokens)
            if request.finished or not request.pending:
                self._drop_guesses(request)
        for request in self.requests:
            if request.finished and not request.is_released:
                request.is_released = True
                self.scheduler.end(request)
                if self.draft is not None:
                    self.draft.send(Removal(request.request_id))

    def _drop_guesses(self, request: Request) -> None:
        """Drop from the target's cache what did not stand of the last window."""
        if not request.guesses.is_line:
            first = self.target.length(request.request_id) - len(request.guesses)
            self.target.keep(request.request_id, first, [first + place for place in request.stood])
        valid = min(self.target.length(request.request_id), len(request.verified) - 1)
        self.target.rollback(request.request_id, valid)
