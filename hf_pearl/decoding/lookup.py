"""Free guesses: what followed the last time that the same tokens occurred in prompt and output.

Prompt lookup decoding (Saxena 2023; transformers' `prompt_lookup_num_tokens`), with one difference: how far it is
trusted is learnt, by how many tokens match.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_MATCH, MAX_MATCH = 2, 12
MAX_LOOKED_UP = 16
PRIOR_WEIGHT = 4.0  # judgements that the prior counts for
MEMORY = 100.0  # judgements after which an old one counts half


class LookupChances:
    """Chance that a looked-up token stands, by the number of tokens before it that match, learnt online.

    It starts from `1 - 1 / match` with the weight of a few judgements, and forgets slowly.
    """

    def __init__(self) -> None:
        self._judged = [PRIOR_WEIGHT] * (MAX_MATCH + 1)
        self._stood = [PRIOR_WEIGHT * (1.0 - 1.0 / max(1, match)) for match in range(MAX_MATCH + 1)]
        self._keep = 0.5 ** (1.0 / MEMORY)

    def chance(self, match: int) -> float:
        """Estimated chance that the token behind `match` matching ones stands."""
        match = min(match, MAX_MATCH)
        return self._stood[match] / self._judged[match]

    def judge(self, match: int, stood: bool) -> None:
        """Learn from one looked-up token whose fate is known, given that all before it stood."""
        match = min(match, MAX_MATCH)
        self._judged[match] = self._judged[match] * self._keep + 1.0
        self._stood[match] = self._stood[match] * self._keep + stood


class PromptLookup:
    """Where every n-gram of a request's verified tokens occurred last, with a token behind it."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token behind its last occurrence

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take more verified tokens."""
        for token_id in token_ids:
            place = len(self.token_ids)
            for size in (MIN_MATCH, MIN_MATCH + 1):
                if place >= size:
                    self._behind[tuple(self.token_ids[-size:])] = place
            self.token_ids.append(token_id)

    def continuation(self, line: Sequence[int], num_tokens: int) -> tuple[list[int], int]:
        """What followed the last occurrence of the end of the verified tokens and `line`.

        Returns
        -------
        tuple
            At most `num_tokens` tokens, and how many before the first of them match. A continuation that reaches the
            end goes on with itself: text that repeats itself is continued for ever.
        """
        tail = [*self.token_ids[-MAX_MATCH:], *line]
        place = None
        for size in (MIN_MATCH + 1, MIN_MATCH):
            place = self._behind.get(tuple(tail[-size:])) if len(tail) >= size else None
            if place is not None:
                break
        if place is None:
            return [], 0
        match = 0
        while match < min(MAX_MATCH, place, len(tail)) and self.token_ids[place - 1 - match] == tail[-1 - match]:
            match += 1
        found: list[int] = []
        num_verified = len(self.token_ids)
        for source in range(place, place + num_tokens):
            behind = source - num_verified
            if behind < 0:
                found.append(self.token_ids[source])
            else:
                found.append(line[behind] if behind < len(line) else found[behind - len(line)])
        return found, match
