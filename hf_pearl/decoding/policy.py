"""When to launch the target, and on how many draft tokens: a small cost model and one rule.

The rule comes from renewal theory. Let `p` be the chance that a draft token stands, `d` the time of a draft step,
`t(k)` the time of a target forward that verifies `k` draft tokens, and `m` the draft steps that fit beside it. A policy
"after a miss, wait for `w` draft tokens" gives cycles from miss to miss: a first forward on `w` tokens, and, as long as
everything stands, further forwards on the `m - 1` tokens drafted meanwhile. Tokens over time of a cycle is the rate of
the policy, and the best `w` is found by trying them all.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_WAIT = 16


class ForwardTimes:
    """Running linear fit of a target forward's seconds over its tokens; old forwards are forgotten slowly."""

    def __init__(self, memory: float = 64.0) -> None:
        self._keep = 0.5 ** (1.0 / memory)
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from one forward over `num_tokens` tokens."""
        for name, value in (("weight", 1.0), ("x", num_tokens), ("y", seconds)):
            setattr(self, f"_{name}", getattr(self, f"_{name}") * self._keep + value)
        self._xx = self._xx * self._keep + num_tokens * num_tokens
        self._xy = self._xy * self._keep + num_tokens * seconds

    @property
    def per_token(self) -> float:
        """Seconds that one more token costs; 4% of a forward until forwards of different sizes were seen."""
        if not self._weight:
            return 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        if variance < 0.25:
            return 0.04 * mean_y
        slope = (self._xy / self._weight - mean_x * mean_y) / variance
        return min(max(slope, 0.0), mean_y / mean_x)

    def seconds(self, num_tokens: float) -> float:
        """Expected seconds of a forward over `num_tokens` tokens."""
        if not self._weight:
            return 0.0
        return self._y / self._weight + self.per_token * (num_tokens - self._x / self._weight)


class Acceptance:
    """Running share of judged draft tokens that stood."""

    def __init__(self, prior: float = 0.7, prior_weight: float = 8.0, memory: float = 128.0) -> None:
        self._judged, self._stood = prior_weight, prior * prior_weight
        self._keep = 0.5 ** (1.0 / memory)

    def record(self, stood: bool) -> None:
        """Learn from one judged draft token."""
        self._judged = self._judged * self._keep + 1.0
        self._stood = self._stood * self._keep + stood

    @property
    def chance(self) -> float:
        """Chance that the next draft token stands."""
        return min(0.98, self._stood / self._judged)


class LaunchRule(NamedTuple):
    """What the cost model says now.

    Attributes
    ----------
    wait_above : float
        Wait for more draft tokens while the chance that all of a line stands is above this.
    verify_above : float
        Verify a draft token while the chance that it and all before it stand is above this.
    """

    wait_above: float
    verify_above: float


def launch_rule(
    chance: float, draft_seconds: float, forward: ForwardTimes, num_rows: int, concurrent: bool
) -> LaunchRule:
    """The best policy under the current measurements (see the module's docstring)."""
    if draft_seconds <= 0.0 or forward.seconds(1) <= 0.0:
        return LaunchRule(wait_above=0.5, verify_above=worth_verifying_above(forward, num_rows))
    best_rate, best_wait = 0.0, 0
    for wait in range(MAX_WAIT + 1):
        rate = cycle_rate(wait, chance, draft_seconds, forward, num_rows, concurrent)
        if rate > best_rate:
            best_rate, best_wait = rate, wait
    wait_above = 1.0 if best_wait == 0 else chance ** (best_wait - 0.5)
    # One more token of one row delays all rows: it must be worth more than all of them yield in that time.
    return LaunchRule(wait_above=wait_above, verify_above=min(0.5, num_rows * best_rate * forward.per_token))


def worth_verifying_above(forward: ForwardTimes, num_rows: int) -> float:
    """The chance from which verifying a guess takes no more time than a forward without guesses takes for a token."""
    seconds = forward.seconds(num_rows)
    return min(0.5, forward.per_token / seconds * num_rows) if seconds > 0.0 else 0.1


def cycle_rate(
    wait: int, chance: float, draft_seconds: float, forward: ForwardTimes, num_rows: int, concurrent: bool
) -> float:
    """Tokens per second and row of the policy "after a miss, wait for `wait` draft tokens".

    A miss finds a concurrent draft in the middle of a step, which it finishes first: half a step on average. Where the
    target waits for draft tokens, it waits for that too; where it does not, its next window is so much shorter.
    """
    first_forward = forward.seconds(num_rows * (1 + wait))
    ahead = restart = 0.0
    if concurrent:
        ahead, restart = min(MAX_WAIT, max(0.0, first_forward / draft_seconds - 1.0)), 0.5
    second, later = max(wait, ahead - (0.0 if wait else restart)), max(wait, ahead)
    missing_seconds = (later - ahead) * draft_seconds
    num_second = chance ** (wait + 1)
    num_later = num_second * chance ** (second + 1) / (1.0 - chance ** (later + 1))
    seconds = first_forward + ((wait + restart) * draft_seconds if wait else 0.0)
    seconds += num_second * (missing_seconds + forward.seconds(num_rows * (1 + second)))
    seconds += num_later * (missing_seconds + forward.seconds(num_rows * (1 + later)))
    tokens = _expected_tokens(chance, wait)
    tokens += num_second * _expected_tokens(chance, second) + num_later * _expected_tokens(chance, later)
    return tokens / seconds


def _expected_tokens(chance: float, num_guesses: float) -> float:
    """Accepted draft tokens plus one, of a window of `num_guesses` (Leviathan et al. 2023, equation 1)."""
    return (1.0 - chance ** (num_guesses + 1)) / (1.0 - chance)
