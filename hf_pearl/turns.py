"""The calls on one pair of models take turns; what would pull the ground from under one comes between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

logger = logging.get_logger(__name__)


class Turns:
    """Scopes that threads enter one after the other. One thread can be in several: callbacks may call, too."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._num_calls = 0

    @contextmanager
    def call(self) -> Iterator[bool]:
        """The scope of a call of `generate`; yields whether a callback of another one makes it."""
        with self._lock:
            is_inside = self._num_calls > 0
            if is_inside:
                logger.info_once(
                    "A call by a callback of another one on its pair has a cache of its own, and no draft."
                )
            self._num_calls += 1
            try:
                yield is_inside
            finally:
                self._num_calls -= 1

    @contextmanager
    def between_calls(self, what: str) -> Iterator[None]:
        """The scope of what no call may be under way for, as the user knows it.

        Raises
        ------
        RuntimeError
            A callback of a running call asks for it.
        """
        with self._lock:
            if self._num_calls:
                raise RuntimeError(
                    f"{what} was asked for by a callback (a streamer, processor or criterion) of a running `generate` "
                    "with the same model. Ask for it after that call."
                )
            yield
