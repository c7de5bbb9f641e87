"""Who runs when: the three schedules of draft and target.

Lockstep and free-running are PEARL: `k = 0` draft tokens right after a rejection is the paper's pre-verify, `k > 0`
with the draft already beyond the window its post-verify (arXiv 2408.11850, section 4). Sequential is ordinary
speculative decoding (Leviathan et al. 2023, arXiv 2211.17192).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from .guesses import Guesses
from .lines import Lines, Proposal, likeliest_line
from .lookup import LookupChances
from .messages import TokenTree
from .policy import Pace
from .request import Request


class DraftRunner(Protocol):
    """The engine's end of a draft lane that runs by itself, somewhere."""

    concurrent: bool

    @property
    def is_ready(self) -> bool:
        """Whether it has started."""

    @property
    def is_starting(self) -> bool:
        """Whether it is about to be ready."""

    def tree(self, request_id: int) -> TokenTree | None:
        """What the draft has published last for a request."""

    @property
    def num_steps(self) -> int:
        """Draft steps of this call so far."""

    @property
    def step_seconds(self) -> float:
        """Running mean of a draft step's time; 0.0 while unknown."""

    @property
    def max_line(self) -> int:
        """Guesses at which a line waits for a verdict."""

    def grant(self, num_steps: int) -> None:
        """Allow `num_steps` more draft steps (lockstep and sequential schedules)."""

    def rest(self, is_resting: bool) -> None:
        """Draft no more, or go on (free-running schedule)."""

    def wait(self, num_steps: int, timeout: float) -> bool:
        """True when `num_steps` steps of this call are done, False after `timeout` seconds or without a draft."""


# Seconds for the steps of a barrier. A lane that has ended ends the wait at once: this is for one that hangs, and the
# call goes on without it.
STEP_TIMEOUT = 60.0
# How long a free-running step is waited for: so many times its mean, and so many seconds, which whoever waits may take
# to wake where other load has the cores. What comes later than that no longer gains what the wait was for.
PATIENCE_STEPS = 4
PATIENCE_SECONDS = 0.005


class Schedule:
    """Which draft tokens to verify, and when; this one wants none.

    Attributes
    ----------
    is_resting : bool
        The draft neither drafts nor wants to hear of verdicts.
    waited_seconds : float
        How long the coming forward has been held back for draft tokens.
    """

    is_resting = False
    waited_seconds = 0.0

    def before_forward(self, requests: Sequence[Request]) -> dict[int, Guesses]:
        """No draft tokens."""
        return {}

    def queue(self, request: Request, logits: torch.Tensor, guesses: Guesses) -> None:
        """Hand over a window's logits `(num_rows, vocab_size)` and its guesses, to be judged."""
        request.queue(logits, guesses)

    def after_forward(self) -> None:
        """Nothing to do."""

    def learn(self, num_tokens: int, seconds: float, num_verified: int) -> None:
        """Nothing to learn from a cycle, see `FreeRunning`."""

    def learn_prefill(self, num_tokens: int, seconds: float) -> None:
        """Nothing to learn from a forward over prompts, see `WhilePays`."""


class PlainDecoding(Schedule):
    """The target alone."""


class Lockstep(Schedule):
    """PEARL with a fixed draft length: `draft_length` draft steps beside every target forward, then a barrier."""

    def __init__(self, draft: DraftRunner, draft_length: int, overlap: bool = True) -> None:
        self.draft = draft
        self.draft_length = draft_length
        self.overlap = overlap
        self._granted = 0

    def before_forward(self, requests: Sequence[Request]) -> dict[int, Guesses]:
        """The draft tokens of every request that the coming forward verifies."""
        if not self.overlap:
            self._draft()
            self.draft.wait(self._granted, STEP_TIMEOUT)
        guesses = {
            request.request_id: Guesses.line(line.token_ids[: self.draft_length])
            for request in requests
            if (line := likeliest_line(self.draft.tree(request.request_id), request)).token_ids
        }
        if self.overlap:
            self._draft()
        return guesses

    def _draft(self) -> None:
        self._granted += self.draft_length
        self.draft.grant(self.draft_length)

    def after_forward(self) -> None:
        """The barrier."""
        if self.overlap:
            self.draft.wait(self._granted, STEP_TIMEOUT)


class Choices(NamedTuple):
    """What the free-running schedule may do; what each gives is measured by leaving it out.

    Attributes
    ----------
    verifies_tree : bool
        Whether a forward may verify several lines of a request.
    waits : bool
        Whether a forward is held back for a draft step where that pays.
    """

    verifies_tree: bool = True
    waits: bool = True


ALL_CHOICES = Choices()


class FreeRunning(Schedule):
    """No barrier: the target takes what is there when it becomes free, or waits for more when that pays.

    Without `overlap` the draft makes a step only when it is waited for: ordinary speculative decoding whose draft
    length follows the cost model.

    Parameters
    ----------
    lookup_chances : LookupChances, optional
        What is known of guesses that are looked up in the text so far; without it there are none.
    choices : Choices
        What it may do.
    clock : callable
        Seconds.
    """

    def __init__(
        self,
        draft: DraftRunner,
        pace: Pace,
        overlap: bool = True,
        lookup_chances: LookupChances | None = None,
        choices: Choices = ALL_CHOICES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.draft = draft
        self.pace = self._pace = pace
        self.overlap = overlap
        self.lookup_chances = lookup_chances
        self._choices = choices
        self._lines = Lines(lookup_chances, choices.verifies_tree)
        self._clock = clock
        self._num_rows = 1

    def before_forward(self, requests: Sequence[Request]) -> dict[int, Guesses]:
        """The draft tokens of every request that the coming forward verifies; waits for them where that pays."""
        least = self._begin(requests, self.pace)
        proposals = self._propose(requests, least)
        surplus = None
        for _ in range(self.draft.max_line):
            hoped = self._hoped(requests, proposals)
            if not self._wait_pays(hoped):
                break
            before, began = self._surplus(proposals, least) if surplus is None else surplus, self._clock()
            has_come = self._wait()
            waited = self._clock() - began
            self.waited_seconds += waited
            proposals = self._propose(requests, least, proposals)
            if not has_come:
                break
            surplus, step_seconds = self._surplus(proposals, least), self.draft.step_seconds
            if step_seconds > 0.0:
                self.pace.record_wait(hoped, surplus - before, waited / step_seconds)
        return self._trimmed({request_id: proposal.guesses for request_id, proposal in proposals.items()})

    def _wait(self) -> bool:
        """Wait for a draft step; False where none came."""
        num_steps = self.draft.num_steps + 1
        if not self.overlap:
            self.draft.grant(1)
        return self.draft.wait(num_steps, timeout=PATIENCE_SECONDS + PATIENCE_STEPS * self.draft.step_seconds)

    def without_draft(self, requests: Sequence[Request], pace: Pace) -> dict[int, Guesses]:
        """What can be looked up for every request, while the draft rests; `pace` is that of decoding meanwhile."""
        least = self._begin(requests, pace)
        return self._trimmed({each.request_id: self._lines.propose(each, None, least).guesses for each in requests})

    def _trimmed(self, guesses: dict[int, Guesses]) -> dict[int, Guesses]:
        """Without the unlikeliest ones where a narrower forward yields more: it is known what it takes."""
        chances = _all_chances(guesses.values())
        best = self._pace.best_of(self._num_rows, chances) if chances else None
        if best is None or best.num_guesses == len(chances):
            return guesses
        likeliest = sorted(  # Of equal ones the first of a request: none is likelier than its parent, or before it.
            (-chance, request_id, place)
            for request_id, each in guesses.items()
            for place, chance in enumerate(each.chances)
        )[: best.num_guesses]
        kept: dict[int, list[int]] = {request_id: [] for request_id in guesses}
        for _, request_id, place in likeliest:
            kept[request_id].append(place)
        return {request_id: each.only(sorted(kept[request_id])) for request_id, each in guesses.items()}

    def _begin(self, requests: Sequence[Request], pace: Pace) -> float:
        """Begin a cycle at a pace; return the chance from which a guess is worth verifying."""
        self._pace, self._num_rows, self.waited_seconds = pace, max(1, len(requests)), 0.0
        for request in requests:
            self._lines.settle(request)
        return pace.worth_verifying_above(self._num_rows)

    def _propose(
        self, requests: Sequence[Request], least: float, known: dict[int, Proposal] | None = None
    ) -> dict[int, Proposal]:
        """A proposal for every request; the known one where the draft has published nothing since."""
        proposals = {}
        for request in requests:
            request_id = request.request_id
            tree = self.draft.tree(request_id)
            if known is not None and known[request_id].tree is tree:
                proposals[request_id] = known[request_id]
            else:
                proposals[request_id] = self._lines.propose(request, tree, least)
        return proposals

    def _wait_pays(self, hoped: float) -> bool:
        if not self._choices.waits and self.overlap:
            return False
        step_seconds = self.draft.step_seconds
        if not step_seconds:  # A lane of its own has not started, or not yet made a step: it is not waited for.
            return hoped > 0.0 and not (self.draft.concurrent and self.overlap)
        return self.pace.wait_pays(hoped, self._num_rows, step_seconds)

    def _hoped(self, requests: Sequence[Request], proposals: dict[int, Proposal]) -> float:
        """How many tokens a draft step would gain if all that it guesses stood."""
        total = 0.0
        for request in requests:
            line = proposals[request.request_id].line
            if line.token_ids and not line.num_drafted:
                continue  # It was looked up as a whole: no draft step makes it longer.
            if len(request.verified) > request.num_prompt_tokens and len(line.token_ids) < min(
                request.room, self.draft.max_line
            ):
                total += line.chance
        return total

    def _surplus(self, proposals: dict[int, Proposal], least: float) -> float:
        """How many tokens are expected of the guesses, less what verifying them costs."""
        chances = _all_chances(proposal.guesses for proposal in proposals.values())
        best = self._pace.best_of(self._num_rows, chances) if chances else None
        if best is None or best.num_guesses == len(chances):
            return sum(chance - least for chance in chances)
        return best.gain

    def learn(self, num_tokens: int, seconds: float, num_verified: int) -> None:
        """Learn from a cycle: its forward over `num_tokens` tokens and all else that it took, waiting left out."""
        waited = self.waited_seconds
        self._pace.record_cycle(self._num_rows, num_tokens, num_verified, seconds + waited, waited)


def _all_chances(guesses: Iterable[Guesses]) -> list[float]:
    """Those of all guesses, the likeliest first."""
    return sorted((chance for each in guesses for chance in each.chances), reverse=True)
