"""What it costs to begin a call with the draft at work: the target reads the prompts on fewer cores.

No cycle of decoding shows it, and a short answer to a long prompt may take longer for it than its draft saves.
"""

from __future__ import annotations

from .policy import Fading

MEMORY = 16.0  # beginnings after which one counts half


class Beginnings:
    """Times of prefills with and without the draft, and how many cycles of decoding come behind them."""

    def __init__(self) -> None:
        self._spent = {is_drafted: Fading(2, MEMORY) for is_drafted in (False, True)}  # prompt tokens, seconds
        self._calls = Fading(2, MEMORY)  # prompt tokens, cycles
        self._has_asked = False

    def record_prefill(self, is_drafted: bool, num_tokens: int, seconds: float) -> None:
        """Learn from a forward that read `num_tokens` of prompts."""
        self._spent[is_drafted].fade()
        self._spent[is_drafted].add(num_tokens, seconds)
        self._calls.fade()
        self._calls.add(num_tokens, 0.0)

    def record_delay(self, seconds: float) -> None:
        """Learn what a cycle lost in which the draft still read the prompts."""
        self._spent[True].add(0.0, seconds)

    def record_cycle(self) -> None:
        """A cycle of decoding has passed."""
        self._calls.add(0.0, 1.0)

    def asks_for_plain(self) -> bool:
        """Whether a call should begin without the draft, so that it is known what that takes; once at most.

        It may have nothing to read: then it stays unknown.
        """
        has_asked, self._has_asked = self._has_asked, True
        return not has_asked and not self._spent[False].values[0]

    @property
    def seconds_per_cycle(self) -> float:
        """How much longer calls take to begin with the draft, spread over their cycles; 0.0 while unknown."""
        (tokens, seconds), (drafted_tokens, drafted_seconds) = (self._spent[each].values for each in (False, True))
        prompt_tokens, num_cycles = self._calls.values
        if not tokens or not drafted_tokens or not num_cycles:
            return 0.0
        return max(0.0, drafted_seconds / drafted_tokens - seconds / tokens) * prompt_tokens / num_cycles
