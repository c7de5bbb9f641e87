"""What happened in a call, and when."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..timeline import save_timeline
from .messages import DraftReport, DraftStep

Interval = tuple[float, float]


class TargetForward(NamedTuple):
    """When a target forward began and ended, in seconds, its tokens, and the draft tokens of it that stood."""

    started: float
    ended: float
    num_tokens: int
    num_accepted: int


@dataclass
class PearlStats:
    """Counts and times of one call.

    Attributes
    ----------
    target_forwards : int
        Forwards of the target, prefill included.
    undrafted_forwards : int
        Of these, the ones for which the draft rested: to see how fast decoding is without it, or because it is faster.
    draft_steps : int
        Forwards of the draft.
    drafted_tokens : int
        Tokens the draft guessed; beside each of them it may have noted others that are less likely.
    verified_draft_tokens : int
        Guesses that went into a target forward: of the draft, or looked up in prompt and output.
    accepted_tokens : int
        Of these, the ones that stood; with `verification="rejection"` also the guess behind a window, which is drafted
        beside its forward and judged by the last logits of it.
    accepted_looked_up_tokens : int
        Of the accepted ones, those that were looked up.
    wasted_draft_tokens : int
        Drafted tokens that were not accepted: dropped, or equal to a token that the target had meanwhile chosen itself.
    generated_tokens : int
        Tokens of the answer, all rows together.
    decode_windows : int
        Windows of one row in one target forward, prefill left out.
    decode_tokens : int
        Tokens of the answer that came from these.
    prompt_tokens : int
        Tokens of all prompts.
    prefilled_tokens, draft_prefilled_tokens : int
        Prompt tokens that were computed, not found in the cache: by the target, by the draft.
    evicted_blocks, cached_blocks : int
        Blocks of the target's cache that were given up for their memory in this call, and those kept after it.
    preemptions : int
        Times that a row gave its memory to the others and was computed again.
    warm_up_steps : int
        Forwards of either lane that captured a CUDA graph, or were the first of their size, and took their time for
        later ones; those of a draft in a process of its own are not known.
    judged_at, stood_at : list of int
        Of the draft tokens at each place of a window (0 is the first): how many were judged, and how many stood.
    target_seconds, draft_seconds, overlap_seconds : float
        Time in forwards of each lane, and time in which both were in one, from recorded intervals.
    total_seconds : float
        Wall time of the call inside the engine.
    execution : str
        How the draft lane ran.
    draft_cores : int
        Cores of the CPU that it had to itself, in a process.
    target_timeline, draft_timeline : list of TargetForward, list of DraftStep
        Every forward of each lane; of a draft in a process the last 4096.
    """

    target_forwards: int = 0
    undrafted_forwards: int = 0
    draft_steps: int = 0
    drafted_tokens: int = 0
    verified_draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_looked_up_tokens: int = 0
    wasted_draft_tokens: int = 0
    generated_tokens: int = 0
    decode_windows: int = 0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    draft_prefilled_tokens: int = 0
    evicted_blocks: int = 0
    cached_blocks: int = 0
    preemptions: int = 0
    warm_up_steps: int = 0
    judged_at: list[int] = field(default_factory=list)
    stood_at: list[int] = field(default_factory=list)
    target_seconds: float = 0.0
    draft_seconds: float = 0.0
    overlap_seconds: float = 0.0
    total_seconds: float = 0.0
    execution: str = "none"
    draft_cores: int = 0
    target_timeline: list[TargetForward] = field(default_factory=list, repr=False)
    draft_timeline: list[DraftStep] = field(default_factory=list, repr=False)

    @property
    def mean_accepted_tokens(self) -> float:
        """Accepted guesses plus the target's own tokens, per row and decode forward; 1.0 where nothing is guessed."""
        return self.decode_tokens / self.decode_windows if self.decode_windows else 0.0

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompt tokens that the target did not have to compute."""
        return 1.0 - self.prefilled_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the judged draft tokens that stood."""
        judged = sum(self.judged_at)
        return sum(self.stood_at) / judged if judged else 0.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """For each place of a window, the share of its draft tokens that stood, given that all before them did."""
        return [stood / judged for stood, judged in zip(self.stood_at, self.judged_at, strict=True) if judged]

    def add_draft(self, report: DraftReport) -> None:
        """Take over what the draft says of the call, behind the target's last forward."""
        self.draft_steps, self.drafted_tokens = report.num_steps, report.num_drafted
        self.draft_prefilled_tokens = report.num_prefilled
        self.wasted_draft_tokens = report.num_drafted - (self.accepted_tokens - self.accepted_looked_up_tokens)
        self.draft_timeline = list(report.timeline)
        lanes = [[each[:2] for each in lane] for lane in (self.target_timeline, self.draft_timeline)]
        self.draft_seconds = sum(end - start for start, end in lanes[1])
        self.overlap_seconds = overlap(*lanes)

    def save_timeline(self, path: str | os.PathLike[str]) -> None:
        """Write the forwards of both lanes to a file that https://ui.perfetto.dev and `chrome://tracing` show."""
        save_timeline(path, self.target_timeline, self.draft_timeline)

    save_trace = save_timeline  # what profilers call it

    def judge(self, place: int, stood: bool, is_looked_up: bool = False) -> None:
        """Count a guess at `place` of its window, all before which stood."""
        while place >= len(self.judged_at):
            self.judged_at.append(0)
            self.stood_at.append(0)
        self.judged_at[place] += 1
        self.stood_at[place] += stood
        self.accepted_tokens += stood
        self.accepted_looked_up_tokens += stood and is_looked_up


def overlap(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Seconds that lie in an interval of both lists; each list is in order and without overlaps of its own."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        total += max(0.0, end - start)
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total
