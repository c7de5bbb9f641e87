"""When to launch the target, and on how many draft tokens: measured times, measured yield, and two comparisons.

A token that is verified delays all rows by what a wider forward takes, a draft step that is waited for by what it
takes. Either pays where it gains more tokens than decoding yields in that time. A policy that does what beats its own
rate, and measures its rate, climbs to the best one (Dinkelbach 1967, "On nonlinear fractional programming").
"""

from __future__ import annotations

from collections.abc import Sequence

from .forward_curve import Best, ForwardCurve, best_count

CYCLE_MEMORY = 64.0  # cycles
WAIT_MEMORY = 256.0  # cycles
# What is expected of waits before there were any, and again when there were none for long.
PRIOR_WAITS, PRIOR_GAIN, PRIOR_STEPS = 4.0, 0.5, 1.0
UNMEASURED = 0.1  # chance from which guesses are verified before any time is known


class ForwardTimes:
    """Running linear fit of a target forward's seconds over its tokens; old forwards are forgotten slowly.

    A curve that is flat at first and then is not is followed where it is in use: the line is that of the sizes that
    came last, and so is its slope.
    """

    def __init__(self, memory: float = 64.0) -> None:
        self._keep = 0.5 ** (1.0 / memory)
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from one forward over `num_tokens` tokens."""
        keep = self._keep
        self._weight = self._weight * keep + 1.0
        self._x = self._x * keep + num_tokens
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + num_tokens * num_tokens
        self._xy = self._xy * keep + num_tokens * seconds

    @property
    def is_known(self) -> bool:
        """Whether any forward was recorded."""
        return self._weight > 0.0

    @property
    def per_token(self) -> float:
        """Seconds that one more token costs; 4% of a forward until forwards of different sizes were seen."""
        if not self.is_known:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        if variance < 0.25:
            return 0.04 * mean_y
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        return min(max(slope, 0.0), mean_y / mean_x)

    def seconds(self, num_tokens: float) -> float:
        """Expected seconds of a forward over `num_tokens` tokens."""
        if not self.is_known:
            return 0.0
        return self._y / self._weight + self.per_token * (num_tokens - self._x / self._weight)


class Fading:
    """Sums in which what was added long ago counts little.

    Parameters
    ----------
    memory : float
        Additions, or fadings, after which an old one counts half.
    """

    def __init__(self, size: int, memory: float) -> None:
        self.values = [0.0] * size
        self._keep = 0.5 ** (1.0 / memory)

    def fade(self) -> None:
        """All that was added counts a little less."""
        self.values = [value * self._keep for value in self.values]

    def add(self, *values: float) -> None:
        """Add to every sum."""
        self.values = [old + new for old, new in zip(self.values, values, strict=True)]


class Cycles:
    """Cycles of one width: what they took, and what they yielded."""

    def __init__(self) -> None:
        self.times = ForwardTimes()
        self.curve = ForwardCurve()
        self._yield = Fading(2, CYCLE_MEMORY)  # tokens per row, seconds

    def record(self, num_rows: int, num_verified: int, seconds: float) -> None:
        """Learn from one that gave all rows `num_verified` tokens, waiting included."""
        self._yield.fade()
        self._yield.add(num_verified / num_rows, seconds)

    def rate(self, num_rows: int) -> float:
        """Tokens per second of all rows; 0.0 while unknown."""
        tokens, seconds = self._yield.values
        return num_rows * tokens / seconds if seconds > 0.0 else 0.0


class Pace:
    """What decoding with a draft yields per second, what verifying a guess costs, and what waiting for more gains.

    All of it is measured where it is used, so that it holds whatever a machine, a pair and a text are like: how much a
    verdict in the middle of a draft step delays the guesses behind it, and how uncertain the place is at which a line
    has ended, no closed form knows.
    """

    def __init__(self) -> None:
        self._cycles: dict[int, Cycles] = {}  # by rows, in powers of two: a row costs more than a guess
        self._waits = Fading(3, WAIT_MEMORY)  # hoped, gained, steps

    def cycles(self, num_rows: int) -> Cycles:
        """Those with `num_rows` rows, and about so many."""
        size = num_rows.bit_length()
        if size not in self._cycles:
            self._cycles[size] = Cycles()
        return self._cycles[size]

    def record_cycle(self, num_rows: int, num_tokens: int, num_verified: int, seconds: float, waited: float) -> None:
        """Learn from a cycle: a forward over `num_tokens` tokens, and `seconds` of which it `waited` for guesses."""
        cycles = self.cycles(num_rows)
        cycles.record(num_rows, num_verified, seconds)
        cycles.curve.record(num_tokens, seconds - waited)
        if num_tokens > num_rows:  # The first guess makes windows ragged, which costs more than those behind it.
            cycles.times.record(num_tokens, seconds - waited)
        self._waits.fade()

    def record_wait(self, hoped: float, gained: float, num_steps: float) -> None:
        """Learn from a wait of `num_steps` draft steps' time: `gained` tokens are expected more than before it."""
        self._waits.add(hoped, gained, num_steps * hoped)

    def worth_verifying_above(self, num_rows: int) -> float:
        """The chance from which verifying a guess yields more than all rows do in the time that it takes."""
        cycles = self.cycles(num_rows)
        # Whatever was measured, a guess that is likelier than not is verified: times mislead for a while.
        return min(0.5, cycles.rate(num_rows) * cycles.times.per_token) if cycles.times.is_known else UNMEASURED

    def best_of(self, num_rows: int, chances: Sequence[float]) -> Best | None:
        """How many of the likeliest guesses a forward should verify; None while no forward was seen."""
        cycles = self.cycles(num_rows)
        seconds = cycles.curve.seconds(num_rows, num_rows + len(chances))
        return best_count(num_rows, chances, seconds, cycles.rate(num_rows))

    def wait_pays(self, hoped: float, num_rows: int, step_seconds: float) -> bool:
        """Whether waiting for the next draft step gains more than decoding yields in that time.

        One-step look-ahead: what the draft makes after the launch is the same either way, so that only the coming
        window differs, by the tokens waited for.

        Parameters
        ----------
        hoped : float
            Sum of the chances that those lines stand that a draft step may lengthen: what it gains if all of it stands.
        """
        known_hoped, known_gained, known_steps = self._waits.values
        weight = PRIOR_WAITS + known_hoped
        gained = (PRIOR_WAITS * PRIOR_GAIN + known_gained) / weight
        num_steps = (PRIOR_WAITS * PRIOR_STEPS + known_steps) / weight
        return hoped * gained > self.cycles(num_rows).rate(num_rows) * num_steps * step_seconds > 0.0
