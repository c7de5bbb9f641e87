"""What a method's runs say: rates, acceptance, overlap, and whether its tokens are the right ones."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from .completion import Completion
from .methods import Method, Setting

TOTALS = (
    "target_seconds",
    "draft_seconds",
    "overlap_seconds",
    "draft_steps",
    "drafted_tokens",
    "accepted_tokens",
    "wasted_draft_tokens",
    "warm_up_steps",
)


@dataclass(frozen=True)
class MethodResult:
    """What one method did.

    Attributes
    ----------
    setting : Setting or None
        The best one; None where it could not run.
    runs : tuple of tuple of Completion
        `runs[i][j]` is call `j` of run `i`.
    error : str or None
        Why there are none, or what is wrong with them; then there is no speed to report.
    num_first_differences, num_near_ties : int
        How many of its texts part from the reference's, and how many of these do so at a near-tie.
    """

    method: Method
    setting: Setting | None = None
    runs: tuple[tuple[Completion, ...], ...] = ()
    error: str | None = None
    num_first_differences: int = 0
    num_near_ties: int = 0

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name

    @property
    def completions(self) -> list[Completion]:
        """Of all runs."""
        return [completion for run in self.runs for completion in run]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every run."""
        return [sum(each.num_tokens for each in run) / sum(each.seconds for each in run) for run in self.runs]

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the runs."""
        return statistics.median(self.rates) if self.error is None else None

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(each.num_tokens for each in self.completions)

    @property
    def num_target_forwards(self) -> int:
        """Target forwards of all completions, prefill included."""
        return sum(each.num_target_forwards for each in self.completions)

    @property
    def target_forwards_per_token(self) -> float | None:
        """Target forwards over tokens."""
        return self.num_target_forwards / self.num_tokens if self.runs else None

    @property
    def mean_accepted_tokens(self) -> float | None:
        """Accepted draft tokens and the target's own, per row and target forward (where known, without prefill)."""
        if not self.runs:
            return None
        if self.total("decode_windows"):
            return self.total("decode_tokens") / self.total("decode_windows")
        return self.num_tokens / sum(each.num_target_forwards * len(each.rows) for each in self.completions)

    @property
    def overlap(self) -> float | None:
        """The share of the draft's time in which the target computed too."""
        seconds = self.total("draft_seconds")
        return self.total("overlap_seconds") / seconds if seconds else None

    @property
    def execution(self) -> str | None:
        """How the draft lane ran; None for transformers' methods."""
        stats = self.completions[-1].stats if self.completions else None
        return None if stats is None else stats.execution

    @property
    def draft_cores(self) -> int:
        """Cores that the draft had to itself."""
        stats = self.completions[-1].stats if self.completions else None
        return 0 if stats is None else stats.draft_cores

    def total(self, name: str) -> float:
        """A field of `PearlStats`, over all completions; 0 for transformers' methods."""
        return sum(getattr(each.stats, name) for each in self.completions if each.stats is not None)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for a JSON file; seconds and counts are totals of all runs."""
        shown: dict[str, Any] = {
            "name": self.name,
            "summary": self.method.summary,
            "tokens_per_second": self.tokens_per_second,
        }
        if self.error is not None or self.setting is None:
            return {**shown, "error": self.error}
        shown |= {
            "runs": self.rates,
            "setting": self.setting.describe(),
            "num_tokens": self.num_tokens,
            "mean_accepted_tokens": self.mean_accepted_tokens,
            "target_forwards_per_token": self.target_forwards_per_token,
            "overlap": self.overlap,
            "first_differences": self.num_first_differences,
            "near_ties": self.num_near_ties,
            "seconds": sum(each.seconds for each in self.completions),
        }
        if self.execution is not None:
            shown |= {"execution": self.execution, **{name: self.total(name) for name in TOTALS}}
        return shown
