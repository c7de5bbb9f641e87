"""How likely a guess is to stand, learnt from the guesses that were judged."""

from __future__ import annotations

NUM_BINS = 16


class Calibration:
    """Chance that a guess stands, by the probability the draft gave it.

    A histogram over the draft's own probability. Every bin starts with the weight of a few judgements that say the
    draft is right about itself, and forgets slowly, because acceptance drifts along a text.

    Parameters
    ----------
    prior_weight : float
        Judgements that the prior counts for.
    memory : float
        Judgements of a bin after which an old one counts half.
    """

    def __init__(self, prior_weight: float = 4.0, memory: float = 200.0) -> None:
        centres = [(index + 0.5) / NUM_BINS for index in range(NUM_BINS)]
        self._stood = [prior_weight * centre for centre in centres]
        self._judged = [prior_weight] * NUM_BINS
        self._keep = 0.5 ** (1.0 / memory)

    def chance(self, probability: float) -> float:
        """Estimated chance that a guess stands to which the draft gave `probability`."""
        index = self._bin(probability)
        return self._stood[index] / self._judged[index]

    def judge(self, probability: float, stood: bool) -> None:
        """Learn from one guess whose fate is known, given that all before it stood."""
        index = self._bin(probability)
        self._stood[index] = self._stood[index] * self._keep + stood
        self._judged[index] = self._judged[index] * self._keep + 1.0

    @staticmethod
    def _bin(probability: float) -> int:
        return min(NUM_BINS - 1, max(0, int(probability * NUM_BINS)))
