"""Lockstep and sequential schedules for rejection sampling: a guess comes with what it was drawn from."""

from __future__ import annotations

from typing import Protocol

import torch

from .guesses import Guesses
from .lines import likeliest_line
from .request import Request
from .schedule import DraftRunner, Lockstep


class DrawingDraft(DraftRunner, Protocol):
    """A draft lane that keeps the distributions of its guesses."""

    def distribution(self, request_id: int, position: int, token_id: int) -> torch.Tensor | None:
        """What a guess was drawn from: `(vocab_size,)`, float32; None where that is not known."""


class RejectionLockstep(Lockstep):
    """`Lockstep` whose windows are judged together with the first guess behind them.

    A guess whose distribution has not come (the draft's process has failed, say) is left out; that does not depend on
    the guess.
    """

    draft: DrawingDraft

    def queue(self, request: Request, logits: torch.Tensor, guesses: Guesses) -> None:
        """Hand over a window's logits, when the draft steps beside its forward are done."""
        line = likeliest_line(self.draft.tree(request.request_id), request).token_ids[: logits.shape[0]]
        if line[: len(guesses)] != guesses.token_ids:  # The draft has failed.
            line = guesses.token_ids
        drawn: list[torch.Tensor] = []
        for position, token_id in enumerate(line, start=len(request.verified)):
            q = self.draft.distribution(request.request_id, position, token_id)
            if q is None:
                break
            drawn.append(q)
        request.queue(logits[: len(drawn) + 1], Guesses.line(line[: len(drawn)]), drawn)
