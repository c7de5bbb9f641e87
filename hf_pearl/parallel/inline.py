"""The draft lane in the caller's own thread: lanes take turns. For debugging, tests and as a fallback."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from ..decoding.drafting import Drafter
from ..decoding.messages import Admission, DraftReport, Removal, TokenTree, Verdict
from .ranks.lane import Lane


class InlineDraft:
    """Runs draft steps when somebody waits for them."""

    concurrent = False
    is_ready = True
    is_starting = False
    error: BaseException | None = None  # An error of the draft reaches the caller at once.

    def __init__(self, drafter: Drafter, lane: Lane) -> None:
        self._drafter = drafter
        self._scope = ExitStack()
        self._scope.enter_context(lane.ready())

    @property
    def num_steps(self) -> int:
        """Draft steps of this call so far."""
        return self._drafter.num_steps

    @property
    def step_seconds(self) -> float:
        """Running mean of a draft step's time; 0.0 while unknown."""
        return self._drafter.step_seconds

    @property
    def max_line(self) -> int:
        """Guesses at which a line waits for a verdict."""
        return self._drafter.max_line

    def send(self, message: Admission | Verdict | Removal) -> None:
        """Deliver a message, in order."""
        self._drafter.handle(message)

    def tree(self, request_id: int) -> TokenTree | None:
        """What is guessed of a request."""
        return self._drafter.token_tree(request_id)

    def grant(self, num_steps: int) -> None:
        """Nothing to do: steps are made in `wait`."""

    def rest(self, is_resting: bool) -> None:
        """Nothing to do: steps are made in `wait`."""

    def distribution(self, request_id: int, position: int, token_id: int) -> torch.Tensor | None:
        """What a guess was drawn from, in a call that keeps distributions; while the draft rests."""
        kept = self._drafter.proposer.distributions
        return kept.get(request_id, position, token_id) if kept is not None else None

    def wait(self, num_steps: int, timeout: float) -> bool:
        """Make draft steps until `num_steps` of this call are done."""
        while self._drafter.num_steps < num_steps:
            self._drafter.step(num_steps - self._drafter.num_steps)
        return True

    def finish(self) -> DraftReport:
        """End the call; say what the draft did."""
        report = self._drafter.report()
        self.abort()
        return report

    def abort(self) -> None:
        """End the call in whatever state it is; harmless to repeat."""
        self._scope.close()
