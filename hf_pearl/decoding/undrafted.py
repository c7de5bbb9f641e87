"""How many forwards a text would have taken without a draft: decoded once more on paper, by looking up alone.

Texts differ by more than ways of decoding do: where one repeats itself, ten tokens and more are looked up for a
forward, with a draft as without one. Tokens per second of a few cycles say more of the text they met than of the draft.
Seconds per forward that the same text would have taken say what the draft has saved.
"""

from __future__ import annotations

from .lookup import MAX_LOOKED_UP, LookupChances, PromptLookup
from .request import Request


class UndraftedForwards:
    """Counts them for the requests of a call.

    Parameters
    ----------
    chances : LookupChances or None
        What is known of tokens that are looked up; None: none are, and every token takes a forward.
    """

    def __init__(self, chances: LookupChances | None) -> None:
        self._chances = chances
        self._lookups: dict[int, PromptLookup] = {}  # of the tokens that decoding on paper has verified so far

    def follow(self, request: Request) -> None:
        """Begin behind what is verified of a request, if it is new and its prompt has been computed."""
        if request.request_id not in self._lookups and len(request.verified) > request.num_prompt_tokens:
            self._lookups[request.request_id] = lookup = PromptLookup()
            lookup.extend(request.verified)

    def count(self, request: Request, least: float) -> int:
        """Forwards that have ended within the tokens verified since the last time.

        One that the text so far does not end, since all that was looked up stood, counts the next time.

        Parameters
        ----------
        least : float
            Chance from which a guess would have been verified.
        """
        lookup, verified, num_forwards = self._lookups.get(request.request_id), request.verified, 0
        if lookup is None:
            return 0
        while (known := len(lookup.token_ids)) < len(verified):
            end = known + self._num_standing(lookup, verified, least) + 1
            if end > len(verified) and not request.finished:
                break
            lookup.extend(verified[known:end])
            num_forwards += 1
        return num_forwards

    def _num_standing(self, lookup: PromptLookup, verified: list[int], least: float) -> int:
        """How many looked-up guesses would have been verified and stood."""
        if self._chances is None:
            return 0
        known, path_chance = len(lookup.token_ids), 1.0
        found, match = lookup.continuation((), MAX_LOOKED_UP)
        for place, token_id in enumerate(found):
            path_chance *= self._chances.chance(match + place)
            if path_chance <= least or known + place == len(verified) or token_id != verified[known + place]:
                return place
        return len(found)
