"""The calls on one pair of models take turns; what would pull the ground from under one comes between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

logger = logging.get_logger(__name__)

SAID_AFTER_SECONDS = 60.0


class Turns:
    """Scopes that threads enter one after the other. One thread can be in several: callbacks may call, too.

    Attributes
    ----------
    is_running : bool
        Whether a call is under way: to whoever has a turn, one that a callback of its own thread's interrupts.
    """

    def __init__(self) -> None:
        self.is_running = False
        self._lock = threading.RLock()
        self._waiting: set[int] = set()  # threads

    @property
    def is_waited_for(self) -> bool:
        """Whether another thread waits for its turn."""
        return bool(self._waiting)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What other threads wait for the end of; as long as that takes, which is said."""
        thread = threading.get_ident()
        self._waiting.add(thread)
        notice = self._notice(thread) if self.is_running else None
        try:
            with self._lock:
                self._waiting.discard(thread)
                yield
        finally:
            self._waiting.discard(thread)
            if notice is not None:
                notice.cancel()

    def _notice(self, thread: int) -> threading.Timer:
        def say() -> None:
            if thread in self._waiting:
                logger.warning(
                    f"A call has waited for {SAID_AFTER_SECONDS:g} s for one of another thread on the same pair of "
                    "models. They take turns: where a callback of that one waits for this one, neither ends."
                )

        timer = threading.Timer(SAID_AFTER_SECONDS, say)
        timer.daemon = True
        timer.start()
        return timer

    @contextmanager
    def call(self) -> Iterator[None]:
        """The scope of a call, inside its turn; to be entered and left where no interrupt can come."""
        self.is_running = True
        try:
            yield
        finally:
            self.is_running = False

    @contextmanager
    def between_calls(self, what: str) -> Iterator[None]:
        """A turn for what no call may be under way for, as the user knows it.

        Raises
        ------
        RuntimeError
            A callback of a running call asks for it.
        """
        with self.turn():
            if self.is_running:
                raise RuntimeError(
                    f"{what} was asked for by a callback (a streamer, processor or criterion) of a running `generate` "
                    "with the same model. Ask for it after that call."
                )
            yield
