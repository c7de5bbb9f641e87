"""The first rank's end of a lane over several ranks: what it tells the others, and when they are to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from transformers.utils import logging

from ...decoding.messages import Window
from ...errors import PearlOutOfBlocksError, PearlWorkerError
from ...turns import Turns
from .collectives import Collectives, RankError
from .records import Begin, End, Forward, Operation

logger = logging.get_logger(__name__)


class Ranks(Protocol):
    """The other ranks of a lane, as the first one sees them."""

    lane: str
    size: int
    num_threads: int  # of each, this one included
    num_here: int  # of those whose caches share a memory with this one's

    @property
    def collectives(self) -> Collectives:
        """What is computed with them."""

    def ensure(self) -> bool:
        """Have them all there; whether they had to be started anew, and know nothing."""

    def together(self) -> AbstractContextManager[object]:
        """A scope that an interrupt does not end."""

    def send(self, operations: Sequence[Operation]) -> None:
        """Tell them; raises `RankError` where one cannot be told."""

    def failed(self, error: BaseException) -> PearlWorkerError:
        """Give them up; say what is known of the reason."""

    def close(self) -> None:
        """End them; harmless to repeat."""


class Leader:
    """The first rank's end of a lane. Holds no model: the model's shard holds it, for its collectives.

    Attributes
    ----------
    compares : bool
        Whether every forward ends with a comparison of all ranks' tokens and block tables.
    held_version : int or None
        Of the cache that the other ranks hold; None where they hold none.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.compares = False
        self.held_version: int | None = None
        self.num_forwards = 0
        self._notes: list[Operation] = []
        self._is_inside = self._has_failed = False
        self.begin_anew()

    def begin_anew(self) -> None:
        """Have no call running: in a forked child there is none of another thread's."""
        self._turns = Turns()

    @property
    def size(self) -> int:
        """Ranks of the lane, this one included."""
        return self.ranks.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        self._check_inside()
        return self.ranks.collectives.all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors, side by side in the last dimension."""
        self._check_inside()
        return self.ranks.collectives.all_gather(tensor)

    def _check_inside(self) -> None:
        if not self._is_inside:
            raise RuntimeError(
                f"this model is one of {self.size} parts, whose other ranks follow "
                "`generate(..., pearl=True)` only: it cannot be called by itself."
            )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The scope of one call; those of other threads wait for its end.

        Raises
        ------
        RuntimeError
            The thread is inside another call, whose ranks wait for its next forward.
        """
        with self._turns.turn():
            if self._turns.is_running:
                raise RuntimeError(
                    f"`generate` was called by a callback of another call, and the {self.ranks.lane} lies on "
                    f"{self.size} ranks, which follow one call at a time. Call it after that one."
                )
            with self._turns.call():
                yield

    def assemble(self) -> None:
        """Have the other ranks there, started anew where they must be."""
        if self.ranks.ensure():
            self.held_version = None

    def note(self, operation: Operation) -> None:
        """Have the others do it before the next forward."""
        self._notes.append(operation)

    @contextmanager
    def call(self, begin: Begin) -> Iterator[None]:
        """A call that they follow; they must be there."""
        self._notes, self._has_failed = [begin], False
        try:
            yield
        finally:
            if not self._has_failed:
                self._notes.append(End())
                try:
                    self._send()
                except PearlWorkerError as error:  # The call has all it wanted; the next one starts them anew.
                    logger.warning(str(error))

    def _send(self) -> None:
        with self.ranks.together():
            notes, self._notes = self._notes, []
            try:
                self.ranks.send(notes)
            except RankError as error:
                raise self._failed(error) from error

    @contextmanager
    def forward(self, windows: Sequence[Window]) -> Iterator[None]:
        """A forward that they make at the same time; an interrupt waits for its end.

        Raises
        ------
        PearlWorkerError
            A rank has ended or does not answer. All are given up then, and started anew by the next call.
        """
        self.num_forwards += 1
        self._notes.append(Forward(tuple(windows)))
        with self.ranks.together():
            self._send()
            before, self._is_inside = self.ranks.collectives.num_done, True
            try:
                yield
            except RankError as error:
                raise self._failed(error) from error
            except BaseException as error:
                # Without blocks no rank has begun to compute; after anything else the others wait for this one.
                if not isinstance(error, PearlOutOfBlocksError) or self.ranks.collectives.num_done != before:
                    self._failed(error)
                raise
            finally:
                self._is_inside = False

    def _failed(self, error: BaseException) -> PearlWorkerError:
        self._notes, self._has_failed = [], True
        reason = self.ranks.failed(error)
        return PearlWorkerError(f"{self.ranks.lane} lane, forward {self.num_forwards}: {reason}")
