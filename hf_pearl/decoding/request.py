"""One request: its verified tokens, and the logits that wait for their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .noise import NoiseSource


class PendingChoice(NamedTuple):
    """The target's raw logits `(vocab_size,)` for a position, and the draft token that was put there (None: none).

    `place` counts the positions of the window from 0; `q` is what the draft token was drawn from, where that matters.
    """

    logits: torch.Tensor
    guess: int | None
    place: int
    q: torch.Tensor | None = None


class JudgedGuess(NamedTuple):
    """A guess whose fate is known: its place in its window (0 is the first), whether it stood, and whose it was."""

    place: int
    stood: bool
    is_looked_up: bool = False


@dataclass(eq=False)
class Request:
    """One row of a call.

    Attributes
    ----------
    request_id : int
        Its row in the batch.
    num_prompt_tokens : int
        Length of its prompt without padding.
    padding : tuple of int
        What stands before its prompt in the user's batch: processors and criteria see it too.
    max_length : int
        Length without padding at which it ends at the latest.
    verified : list of int
        Prompt and all verified tokens.
    seed, noise : int, NoiseSource or None
        Its Gumbel noise; None when greedy.
    finished : bool
        A stopping rule has fired.
    pending : deque of PendingChoice
        Logits that are computed but not judged: rows of a slab wait for each other.
    judged : list of JudgedGuess
        Draft tokens judged since the loop last counted them.
    num_verdicts, num_told : int
        Verdicts that the draft was sent, and the verified tokens it knows.
    first_looked_up : int or None
        Place in the present window from which on guesses come from the text so far, not from the draft; None: nowhere.
    was_drafted : bool
        The last verified token stands because the draft had guessed it.
    """

    request_id: int
    num_prompt_tokens: int
    padding: tuple[int, ...]
    max_length: int
    verified: list[int]
    seed: int | None = None
    noise: NoiseSource | None = None
    finished: bool = False
    is_released: bool = False
    num_verdicts: int = 0
    num_told: int = 0
    pending: deque[PendingChoice] = field(default_factory=deque)
    judged: list[JudgedGuess] = field(default_factory=list)
    first_looked_up: int | None = None
    was_drafted: bool = False
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_told = len(self.verified)

    @property
    def num_padding(self) -> int:
        """Tokens before its prompt in the user's batch."""
        return len(self.padding)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.verified[self.num_prompt_tokens :]

    @property
    def room(self) -> int:
        """Draft tokens that may be verified at most: the target's own last choice needs a place too."""
        return max(0, self.max_length - len(self.verified) - 1)

    def queue(self, logits: torch.Tensor, guesses: tuple[int, ...], distributions: Sequence[torch.Tensor] = ()) -> None:
        """Take the logits `(num_rows, vocab_size)` of a window: each row waits for its turn, with its guess.

        The last rows may have none. `distributions`, if given, are what the guesses were drawn from.
        """
        for row in range(logits.shape[0]):
            guess = guesses[row] if row < len(guesses) else None
            q = distributions[row] if row < len(distributions) else None
            self.pending.append(PendingChoice(logits[row], guess, row, q))

    def take(self, token_id: int) -> None:
        """One more verified token; the logits behind a guess that does not stand are dropped."""
        choice = self.pending.popleft()
        self.verified.append(token_id)
        self.was_drafted = choice.guess == token_id
        if choice.guess is not None:
            is_looked_up = self.first_looked_up is not None and choice.place >= self.first_looked_up
            self.judged.append(JudgedGuess(choice.place, self.was_drafted, is_looked_up))
        if not self.was_drafted:
            self.pending.clear()
