"""Parts of a long measurement, the most important first: as many as the time allows, each saved as soon as it is done.

A part that fails is noted with its error, one for which the time is short with that, and the next ones run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

Figures = dict[str, Any]
Results = Mapping[str, Figures]  # part -> what was measured; those that were not are missing


class Part(NamedTuple):
    """Some figures that are measured together.

    Attributes
    ----------
    name : str
        What they are about.
    seconds : float
        How long they take at most, roughly: a part is left out where less time is left.
    measure : callable
        Makes them, from those of the parts before it.
    """

    name: str
    seconds: float
    measure: Callable[[Results], Figures]


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
) -> Figures:
    """Run every part for which there is time, one after the other.

    Parameters
    ----------
    seconds : float
        For all of them. Nothing is cut short: a part that takes longer than it said takes the time of those behind it.
    save : callable
        Called after every part with what is known by then.
    say : callable
        Told, in a line, of every part that begins, fails or is left out.

    Returns
    -------
    dict
        By the parts' names, `parts`: what was measured, `failed`: errors, `left_out`: those there was no time for.
    """
    deadline = clock() + seconds
    measured: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    found: Figures = {"parts": measured, "failed": failed, "left_out": left_out}
    for part in parts:
        started = clock()
        left = deadline - started
        if left < part.seconds:
            left_out[part.name] = f"no time: it may take {part.seconds:.0f} s, and {max(0.0, left):.0f} s were left"
        else:
            say(f"{part.name} ({left:.0f} s left)")
            try:
                measured[part.name] = {**part.measure(measured), "seconds": clock() - started}
            except Exception as error:
                failed[part.name] = _described(error)
            _free_memory()
        if part.name not in measured:
            say(f"{part.name}: {failed.get(part.name) or left_out[part.name]}")
        save(found)
    return found


def _described(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"


def _free_memory() -> None:
    """Give back what the last part's models took; its error, if it had one, is gone by now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
