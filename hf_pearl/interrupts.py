"""Ctrl-C at the wrong moment: kept while lanes are set up and cleared away, let through while they work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class KeptInterrupts:
    """A scope at whose end an interrupt that came inside is raised; in threads but the main one none ever comes.

    Example: set-up and clean-up below are whole, whenever and however often Ctrl-C is pressed.

        with KeptInterrupts() as interrupts, lane() as lane, interrupts.let_through():
            lane.work()

    Attributes
    ----------
    has_come : bool
        Whether an interrupt waits.
    """

    def __init__(self) -> None:
        self.has_come = False
        self._handler: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> KeptInterrupts:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            self._keep()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._let_through()

    def let_through(self) -> LetThrough:
        """A scope inside in which an interrupt is raised at once, one that waits at its beginning."""
        return LetThrough(self)

    def _keep(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._note)

    def _let_through(self) -> None:
        if self._handler is None:
            return
        signal.signal(signal.SIGINT, self._handler)
        if self.has_come:
            self.has_come = False
            self._handler(signal.SIGINT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True


class LetThrough:
    """What `KeptInterrupts.let_through` returns."""

    def __init__(self, kept: KeptInterrupts) -> None:
        self._kept = kept

    def __enter__(self) -> None:
        try:
            self._kept._let_through()
        except BaseException:  # One that had come is raised here, and nothing calls `__exit__`.
            self._kept._keep()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._kept._keep()
        except BaseException:  # Another one, a moment behind the first.
            self._kept._keep()
            raise
