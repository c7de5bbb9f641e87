"""Models that compute nothing: a recorded trace says what they would say.

A trace says of every position whether the draft would have guessed the target's token there, and how sure it was. Token
ids are 1 where a token is the target's own and something else where it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from .drafting import MAX_LINE
from .messages import Window
from .proposal import Guess, Prefix, Proposer


class TracedGuess(NamedTuple):
    """The draft's guesses at one position.

    Attributes
    ----------
    stands : bool
        Whether the likeliest was the target's token.
    probability : float
        What the draft gave it.
    rank : int or None
        Which of its guesses was the target's token; None: none of them.
    others : tuple of float
        How near the second, third, ... came to the first (`Guess.confidence`).
    """

    stands: bool
    probability: float
    rank: int | None = None
    others: tuple[float, ...] = ()


class RecordedLane:
    """A lane that computes nothing: it keeps the lengths of its sequences, and its logits always say 1."""

    def __init__(self, advance: Callable[[Sequence[Window]], None]) -> None:
        self._lengths: dict[int, int] = {}
        self._advance = advance

    def admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> int:
        """Begin a sequence, with nothing cached."""
        self._lengths[request_id] = 0
        return 0

    def fork(self, request_id: int, new_id: int, length: int) -> None:
        """Begin a sequence with a part of another."""
        self._lengths[new_id] = length

    def length(self, request_id: int) -> int:
        """Tokens of a sequence so far."""
        return self._lengths[request_id]

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """Let the time of a forward pass; `(sum of num_logits, 2)`."""
        for window in windows:
            self._lengths[window.request_id] += len(window.token_ids)
        self._advance(windows)
        return torch.tensor([[0.0, 1.0]]).expand(sum(window.num_logits for window in windows), 2)

    def rollback(self, request_id: int, length: int) -> None:
        """Drop tokens."""
        self._lengths[request_id] = length

    def keep(self, request_id: int, num_first: int, places: Sequence[int]) -> None:
        """Drop tokens between others."""
        self._lengths[request_id] = num_first + len(places)

    def release(self, request_id: int, verified: Sequence[int]) -> None:
        """End a sequence."""
        del self._lengths[request_id]


class RecordedProposer(Proposer):
    """Guesses from a trace; behind a guess that is wrong, every further one is wrong too."""

    def __init__(self, traces: Sequence[Sequence[TracedGuess]]) -> None:
        super().__init__(2, LogitsProcessorList())
        self._traces = traces

    def propose(self, logits: torch.Tensor, prefixes: Sequence[Prefix], num_guesses: int = 1) -> list[list[Guess]]:
        """The traced guesses: token 1 is the target's, every other one is wrong."""
        return [self._guesses(prefix)[:num_guesses] for prefix in prefixes]

    def _guesses(self, prefix: Prefix) -> list[Guess]:
        traced = self._traces[prefix.request_id][prefix.length - 1]
        is_right = all(token == 1 for token in prefix.token_ids()[1:][-MAX_LINE:])
        rank = (0 if traced.stands else traced.rank) if is_right else None
        confidences = (traced.probability, *traced.others)
        return [Guess(1 if place == rank else 2 + place, each) for place, each in enumerate(confidences)]
