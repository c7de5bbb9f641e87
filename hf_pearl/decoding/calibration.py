"""How likely a guess is to stand, learnt from the guesses that were judged."""

from __future__ import annotations

NUM_BINS = 16
MAX_RANKS = 4
PRIOR_WEIGHT = 4.0  # judgements that the prior counts for
MEMORY = 200.0  # judgements of a bin after which an old one counts half


class Calibration:
    """Chance that a guess stands, by its rank among the draft's guesses and by how sure the draft was.

    A histogram per rank. Every bin starts with the weight of a few judgements that say the draft is right about itself,
    and forgets slowly, because acceptance drifts along a text.
    """

    def __init__(self) -> None:
        centres = [(index + 0.5) / NUM_BINS for index in range(NUM_BINS)]
        self._stood = [[PRIOR_WEIGHT * centre / (1 + rank) for centre in centres] for rank in range(MAX_RANKS)]
        self._judged = [[PRIOR_WEIGHT] * NUM_BINS for _ in range(MAX_RANKS)]
        self._keep = 0.5 ** (1.0 / MEMORY)

    def chance(self, confidence: float, rank: int = 0) -> float:
        """Estimated chance that the guess of a rank (0 is the likeliest) stands."""
        index = self._bin(confidence)
        return self._stood[rank][index] / self._judged[rank][index]

    def judge(self, confidence: float, stood: bool, rank: int = 0) -> None:
        """Learn from one guess whose fate is known, given that all before it stood."""
        index = self._bin(confidence)
        self._stood[rank][index] = self._stood[rank][index] * self._keep + stood
        self._judged[rank][index] = self._judged[rank][index] * self._keep + 1.0

    @staticmethod
    def _bin(confidence: float) -> int:
        return min(NUM_BINS - 1, max(0, int(confidence * NUM_BINS)))
