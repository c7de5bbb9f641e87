"""One request: its verified tokens, and the logits that wait for their turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .guesses import Guesses
from .noise import NoiseSource


class PendingChoice(NamedTuple):
    """The target's raw logits `(vocab_size,)` behind a token, and the likeliest guess for what comes there, if any.

    `behind` is the place of that token among the guesses of the window (-1: it is verified), and `depth` counts the
    guesses up to it. `q` is what the guess was drawn from, where that matters.
    """

    logits: torch.Tensor
    guess: int | None
    behind: int
    depth: int
    q: torch.Tensor | None = None


class JudgedGuess(NamedTuple):
    """What became of the guesses for a position, the `place`-th of its window: whether one stood, and whose it was."""

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
    guesses : Guesses
        What the present window verifies.
    stood : list of int
        Places of those that have been found to stand.
    pending : deque of PendingChoice
        Logits that are computed but not judged, those behind the verified tokens first: rows of a slab wait for each
        other.
    judged : list of JudgedGuess
        Draft tokens judged since the loop last counted them.
    num_verdicts, num_told : int
        Verdicts that the draft was sent, and the verified tokens it knows.
    was_drafted : bool
        The last verified token had been guessed by the draft, not only looked up.
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
    guesses: Guesses = field(default_factory=Guesses)
    stood: list[int] = field(default_factory=list)
    pending: deque[PendingChoice] = field(default_factory=deque)
    judged: list[JudgedGuess] = field(default_factory=list)
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

    def queue(self, logits: torch.Tensor, guesses: Guesses, distributions: Sequence[torch.Tensor] = ()) -> None:
        """Take the logits `(num_rows, vocab_size)` of a window: behind its last verified token, then behind each guess.

        The last guess may have none. `distributions`, if given, are what the guesses of a line were drawn from.
        """
        self.guesses, self.stood = guesses, []
        depths = [0]
        for row, of_row in enumerate(logits.unbind()):
            behind = guesses.behind(row - 1)
            if row:
                depths.append(depths[guesses.parents[row - 1] + 1] + 1)
            guess = guesses.token_ids[behind[0]] if behind else None
            q = distributions[row] if row < len(distributions) else None
            self.pending.append(PendingChoice(of_row, guess, row - 1, depths[row], q))

    def take(self, token_id: int) -> None:
        """One more verified token; the logits behind guesses that do not stand are dropped."""
        choice = self.pending.popleft()
        self.verified.append(token_id)
        behind = self.guesses.behind(choice.behind)
        stood = next((place for place in behind if self.guesses.token_ids[place] == token_id), None)
        self.was_drafted = stood is not None and not self.guesses.are_looked_up[stood]
        if behind:
            is_looked_up = self.guesses.are_looked_up[behind[0] if stood is None else stood]
            self.judged.append(JudgedGuess(choice.depth, stood is not None, is_looked_up))
        if stood is None:
            self.pending.clear()
        else:
            self.stood.append(stood)
            self._keep_behind(stood)

    def _keep_behind(self, place: int) -> None:
        """Drop the logits that are not behind the guess at `place`, nor behind one that follows it."""
        kept = {place}
        for choice in list(self.pending):
            if choice.behind in kept or self.guesses.parents[choice.behind] in kept:
                kept.add(choice.behind)
        self.pending = deque(choice for choice in self.pending if choice.behind in kept)
