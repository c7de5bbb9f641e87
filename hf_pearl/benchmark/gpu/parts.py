"""Parts of a long measurement, the most important first: as many as the time allows, each saved as soon as it is done.

A part that fails is noted with its error, one for which the time is short with that, and the next ones run; so it is
with the figures within a part.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

from ...errors import described_error

Figures = dict[str, Any]
Results = Mapping[str, Figures]  # part -> what was measured; those that were not are missing
T = TypeVar("T")


class Attempts:
    """Measures the figures of a part one by one: without one of them, there are still the others.

    Attributes
    ----------
    failed, left_out : dict
        Errors by the figures' names; those that there was no time for.
    """

    def __init__(self, deadline: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.failed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._deadline = deadline
        self._clock = clock

    def __call__(self, name: str, measure: Callable[[], T]) -> T | None:
        """What `measure` gives; None where it fails, or is not begun because the deadline is over."""
        if self._clock() >= self._deadline:
            self.left_out[name] = "no time was left"
            return None
        try:
            return measure()
        except Exception as error:
            self.failed[name] = described_error(error)
        free_memory()
        return None

    def as_dict(self) -> Figures:
        """What is missing, for a JSON file; empty where nothing is."""
        return {name: dict(each) for name in ("failed", "left_out") if (each := getattr(self, name))}


class Part(NamedTuple):
    """Some figures that are measured together.

    Attributes
    ----------
    name : str
        What they are about.
    seconds : float
        How long they take at most, roughly: a part is left out where less time is left.
    measure : callable
        Makes them, from those of the parts before it, attempt by attempt.
    """

    name: str
    seconds: float
    measure: Callable[[Results, Attempts], Figures]


class NotMeasured(RuntimeError):
    """A part needs another one's figures, and there are none."""


def needed(results: Results, name: str) -> Figures:
    """The figures of another part.

    Raises
    ------
    NotMeasured
        There are none.
    """
    if name not in results:
        raise NotMeasured(f"needs {name!r}, which was not measured")
    return results[name]


def run_parts(
    parts: Iterable[Part],
    seconds: float,
    save: Callable[[Figures], object],
    say: Callable[[str], object],
    clock: Callable[[], float] = time.monotonic,
    known: Figures | None = None,
) -> Figures:
    """Run every part for which there is time, one after the other.

    Parameters
    ----------
    seconds : float
        For all of them. No figure is cut short: a part that takes longer than it said takes the time of those behind
        it; when all is used up, figures that were not begun are left out.
    save : callable
        Called after every part with what is known by then.
    say : callable
        Told, in a line, of every part that begins, fails or is left out.
    known : dict, optional
        What an earlier run has returned. Its figures stay but for those of parts that are measured anew.

    Returns
    -------
    dict
        By the parts' names, `parts`: what was measured, `failed`: errors, `left_out`: those there was no time for.
    """
    deadline = clock() + seconds
    found: Figures = {name: dict((known or {}).get(name, {})) for name in ("parts", "failed", "left_out")}
    measured, failed, left_out = found.values()
    for part in parts:
        started, attempts = clock(), Attempts(deadline, clock)
        left = deadline - started
        failed.pop(part.name, None)
        left_out.pop(part.name, None)
        if left < part.seconds:
            left_out[part.name] = f"no time: it may take {part.seconds:.0f} s, and {max(0.0, left):.0f} s were left"
        else:
            say(f"{part.name} ({left:.0f} s left)")
            try:
                figures = part.measure(measured, attempts)
                measured[part.name] = {**figures, **attempts.as_dict(), "seconds": clock() - started}
            except Exception as error:
                failed[part.name] = described_error(error)
            free_memory()
        for name, why in attempts.failed.items():
            say(f"{part.name}: {name}: {why}")
        if part.name in failed or part.name in left_out:
            say(f"{part.name}: {failed.get(part.name) or left_out[part.name]}")
        save(found)
    return found


def failures(found: Figures) -> Iterator[tuple[str, str]]:
    """Everything that failed, with its error: parts, figures, and methods of ours that wrote something wrong."""
    yield from found["failed"].items()
    for name, part in found["parts"].items():
        for figure, error in (*part.get("failed", {}).items(), *part.get("wrong", {}).items()):
            yield f"{name}: {figure}", error


def omissions(found: Figures) -> Iterator[tuple[str, str]]:
    """Everything that there was no time for."""
    yield from found["left_out"].items()
    for name, part in found["parts"].items():
        for figure, why in part.get("left_out", {}).items():
            yield f"{name}: {figure}", why


def free_memory() -> None:
    """Give back what was measured last; its error, if it had one, must be gone by now."""
    gc.collect()
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # After an illegal access every call raises; whoever measures has noted it.
            torch.cuda.empty_cache()
