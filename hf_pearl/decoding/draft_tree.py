"""What the draft guesses beyond the verified tokens of one request, and how a verdict prunes it.

With one line the tree is the paper's draft (PEARL, section 4). Its root is the last verified token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class DraftTree:
    """Verified tokens of a request as far as the draft knows them, and one line of guesses behind them.

    Parameters
    ----------
    token_ids : sequence of int
        The prompt, all of it verified.
    max_length : int
        The length at which the request ends; no token is guessed that no verdict could confirm.
    """

    def __init__(self, token_ids: Sequence[int], max_length: int) -> None:
        self.verified = list(token_ids)
        self.line: list[int] = []
        self.chances: list[float] = []
        self.max_length = max_length
        self.verdict_number = 0
        self.num_drafted = 0
        self.num_wasted = 0

    @property
    def root(self) -> int:
        """How many tokens are verified."""
        return len(self.verified)

    @property
    def length(self) -> int:
        """Verified and guessed tokens together."""
        return len(self.verified) + len(self.line)

    @property
    def chance(self) -> float:
        """Estimated chance that all of the line stands."""
        return math.prod(self.chances)

    @property
    def room(self) -> int:
        """Guesses that could still be added: a verdict ends in a token of the target's own, so one place stays free."""
        return self.max_length - 1 - self.length

    def tokens_from(self, start: int) -> list[int]:
        """Verified and guessed tokens from position `start` on."""
        if start >= self.root:
            return self.line[start - self.root :]
        return self.verified[start:] + self.line

    def extend(self, token_id: int, chance: float) -> None:
        """Add a guess at the end of the line."""
        self.line.append(token_id)
        self.chances.append(chance)
        self.num_drafted += 1

    def prune(self, number: int, token_ids: Sequence[int]) -> int:
        """Apply a verdict: move the root behind `token_ids`, keep what agrees with them.

        Returns
        -------
        int
            How many tokens, counted from the start of the request, are still what they were.
        """
        agreed = 0
        while agreed < min(len(token_ids), len(self.line)) and self.line[agreed] == token_ids[agreed]:
            agreed += 1
        unchanged = self.root + agreed
        stands = agreed == len(token_ids)
        if not stands:
            self.num_wasted += len(self.line) - agreed
        self.line = self.line[agreed:] if stands else []
        self.chances = self.chances[agreed:] if stands else []
        self.verified.extend(token_ids)
        self.verdict_number = number
        return unchanged + len(self.line) if stands else unchanged
