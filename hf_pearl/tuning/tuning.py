"""`Tuning`: what `tune` found, and what follows from it."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import NamedTuple

from ..config import PearlConfig
from ..simulate import SimulatedTimes

PLAIN, ENGINE, DEFAULT = "generate", "engine", "default"
MIN_DRAFTED = 0.1  # of the tokens: where the draft writes fewer, it is not what makes decoding faster


class Way(NamedTuple):
    """A way of decoding, and what it did.

    Attributes
    ----------
    pearl : PearlConfig or None
        None: transformers' own `generate`.
    uses_draft : bool
        Whether the draft takes part.
    rates : tuple of float
        Tokens per second of every run, all rows together.
    mean_accepted_tokens : float
        Accepted draft tokens and the target's own, per row and target forward.
    drafted : float
        Share of the tokens that the draft wrote; others are the target's own, or were looked up in the text so far.
    error : str or None
        What is wrong with its output: then it is not taken.
    """

    name: str
    pearl: PearlConfig | None
    uses_draft: bool
    rates: tuple[float, ...]
    mean_accepted_tokens: float
    drafted: float = 0.0
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """The median over the runs."""
        return statistics.median(self.rates)

    @property
    def call(self) -> str:
        """The line of code that decodes so."""
        arguments = ["**inputs"]
        if self.uses_draft:
            arguments.append("assistant_model=draft")
        if self.pearl is not None:
            default = PearlConfig()
            fields = {each.name: getattr(self.pearl, each.name) for each in dataclasses.fields(self.pearl)}
            given = [f"{name}={value!r}" for name, value in fields.items() if value != getattr(default, name)]
            arguments.append(f"pearl=hf_pearl.PearlConfig({', '.join(given)})" if given else "pearl=True")
        return f"target.generate({', '.join(arguments)})"

    def is_faster_than(self, other: Way) -> bool:
        """Whether every run was faster than every one of the other's; chance does that to equals in 1 of 20 cases."""
        return self.error is None and min(self.rates) > max(other.rates)


@dataclass(frozen=True, repr=False)
class Tuning:
    """What `tune` found; as a string, its report.

    Attributes
    ----------
    ways : tuple of Way
        All that was measured: plain `generate`, our engine without a draft, PEARL's default, and other settings.
    acceptance_rate : float
        Share of the target's tokens that were the draft's likeliest guess.
    draft_step_seconds, target_forward_seconds : float
        Of one token, each model by itself.
    simulated : SimulatedTimes
        What the same texts would take, one after the other, if nothing but the models took time.
    num_prompts, max_new_tokens, batch_size, temperature
        What was decoded.
    num_texts, num_first_differences, num_near_ties : int
        Texts that were compared, those that part from the reference's, and those of them that do so where the target
        finds both tokens equally good, as far as its rounding can tell.
    """

    ways: tuple[Way, ...]
    acceptance_rate: float
    draft_step_seconds: float
    target_forward_seconds: float
    simulated: SimulatedTimes
    num_prompts: int
    max_new_tokens: int
    batch_size: int
    temperature: float
    num_texts: int
    num_first_differences: int
    num_near_ties: int

    def way(self, name: str) -> Way:
        """The one of a name."""
        return next(way for way in self.ways if way.name == name)

    @property
    def best(self) -> Way:
        """What to use: the simplest way that none is clearly faster than."""
        others = [way for way in self.ways if way.name not in (PLAIN, ENGINE, DEFAULT)]
        others.sort(key=lambda way: -way.tokens_per_second)
        best = self.way(PLAIN)
        for way in (self.way(ENGINE), self.way(DEFAULT), *others):
            if way.is_faster_than(best):
                best = way
        return best

    @property
    def best_with_draft(self) -> Way:
        """The best one in which the draft takes part: PEARL's default, unless another is clearly faster, or right."""
        best = self.way(DEFAULT)
        for way in sorted(self.ways, key=lambda each: -each.tokens_per_second):
            if way.uses_draft and way.error is None and (best.error is not None or way.is_faster_than(best)):
                best = way
        return best

    @property
    def config(self) -> PearlConfig:
        """The best settings with this draft."""
        return self.best_with_draft.pearl or PearlConfig()

    @property
    def pays(self) -> bool:
        """Whether PEARL is clearly faster than `generate` and than our engine without a draft, by the draft's work."""
        return self.best.uses_draft and self.best.drafted >= MIN_DRAFTED

    @property
    def speedup(self) -> float:
        """Tokens per second of `config`, over those of `generate`."""
        return self.speedup_of(self.best_with_draft)

    @property
    def mean_accepted_tokens(self) -> float:
        """Of `config`: accepted draft tokens and the target's own, per row and target forward."""
        return self.best_with_draft.mean_accepted_tokens

    @property
    def ideal_speedup(self) -> float:
        """Of PEARL's default over the target alone, one row at a time, if nothing but the models took time."""
        return self.simulated.plain / self.simulated.pearl

    @property
    def bound(self) -> float:
        """What a line of the draft's likeliest guesses would give if they took no time; a tree may give more."""
        return self.simulated.plain / self.simulated.bound

    def speedup_of(self, way: Way) -> float:
        """Its tokens per second over those of `generate`."""
        return way.tokens_per_second / self.way(PLAIN).tokens_per_second

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pays={self.pays}, config={self.config}, speedup={self.speedup:.2f})"

    def __str__(self) -> str:
        from .report import report  # It reads what is defined here.

        return report(self)
