"""What an engine learns of its pair from call to call, and the schedule that follows from it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers.utils import logging

from .config import PearlConfig
from .decoding.benefit import Benefits
from .decoding.calibration import Calibration
from .decoding.lookup import LookupChances
from .decoding.policy import Pace
from .decoding.rejection_schedule import RejectionLockstep
from .decoding.request import Request
from .decoding.schedule import Choices, FreeRunning, Lockstep, Schedule
from .decoding.while_pays import WhilePays
from .parallel.cores import SharedCores
from .parallel.inline import InlineDraft
from .parallel.processes import ProcessDraft
from .parallel.threads import ThreadDraft

Runner = InlineDraft | ThreadDraft | ProcessDraft

logger = logging.get_logger(__name__)


class Learnt:
    """Times and chances of one pair of models."""

    def __init__(self) -> None:
        self.calibration = Calibration()
        self.paces = {is_sampled: Pace() for is_sampled in (False, True)}
        self.lookup_chances = LookupChances()
        self.benefits = {is_sampled: Benefits() for is_sampled in (False, True)}
        self._has_warned = False

    def forget_benefits(self) -> None:
        """Find out anew whether the draft pays: a model has changed."""
        self.benefits = {is_sampled: Benefits() for is_sampled in (False, True)}

    def schedule(
        self, runner: Runner, cores: SharedCores, config: PearlConfig, requests: Sequence[Request]
    ) -> Schedule:
        """The schedule of a call with a draft."""
        if config.draft_length != "auto":
            rejects = config.verification == "rejection" and requests[0].seed is not None
            lockstep = RejectionLockstep if rejects else Lockstep
            return lockstep(runner, config.draft_length, config.overlap)
        # Without overlap it is the ordinary kind of speculative decoding.
        lookup_chances = self.lookup_chances if config.overlap and config.looks_up else None
        pace = self.paces[requests[0].seed is not None]
        choices = Choices(config.verifies_tree, config.waits)
        drafting = FreeRunning(runner, pace, config.overlap, lookup_chances, choices)
        if config.execution != "auto" or not config.overlap:  # Whoever says how the draft runs wants it to run.
            return drafting
        num_left, benefits = cores.num_left, self.benefits[requests[0].seed is not None]
        return WhilePays(requests, drafting, runner, benefits, lambda leaves: cores.leave(leaves * num_left))

    def warn_if_the_draft_rests(self) -> None:
        """Say once that decoding goes on without the draft."""
        resting = [each for benefits in self.benefits.values() for each in benefits.all if each.rests]
        if resting and not self._has_warned:
            self._has_warned = True
            speed = resting[0].found["drafted"] / resting[0].found["plain"]
            logger.warning(
                f"`assistant_model` does not make this model faster here: with it, decoding is {speed:.2f} times as "
                f"fast as without. It goes on without it, and tries it again from time to time. A smaller or better "
                f'matching draft may help; an `execution` that is not "auto" keeps it at work.'
            )
