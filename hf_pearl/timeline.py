"""The timeline of both lanes as a file that Perfetto and Chrome's `about:tracing` show.

The format is Chrome's "Trace Event Format": a complete event per forward, `ts` and `dur` in microseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding.messages import DraftStep
    from .decoding.stats import TargetForward

_PROCESS = 1
_THREADS = {"target": 1, "draft": 2}


def save_timeline(path: str | os.PathLike[str], forwards: Sequence[TargetForward], steps: Sequence[DraftStep]) -> None:
    """Write the forwards of both lanes to a JSON file."""
    content = {"traceEvents": _events(forwards, steps), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(content), encoding="utf-8")


def _events(forwards: Sequence[TargetForward], steps: Sequence[DraftStep]) -> list[dict[str, Any]]:
    """What happened, counted from the first event of either lane."""
    first = min((start for start, *_ in (*forwards, *steps)), default=0.0)
    events: list[dict[str, Any]] = [_named("process_name", 0, "hf_pearl")]
    events += [_named("thread_name", thread, f"{lane} lane") for lane, thread in _THREADS.items()]
    events += [_named("thread_sort_index", thread, thread, "sort_index") for thread in _THREADS.values()]
    for start, end, num_tokens, num_accepted in forwards:
        counts = {"tokens": num_tokens, "accepted draft tokens": num_accepted}
        events.append(_complete("target", f"{num_tokens} tokens", start - first, end - first, counts))
    for start, end, num_guesses in steps:
        events.append(
            _complete("draft", f"{num_guesses} guesses", start - first, end - first, {"guesses": num_guesses})
        )
    return events


def _named(what: str, thread: int, value: str | int, key: str = "name") -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": _PROCESS, "tid": thread, "args": {key: value}}


def _complete(lane: str, name: str, started: float, ended: float, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": lane,
        "name": name,
        "pid": _PROCESS,
        "tid": _THREADS[lane],
        "ts": round(1e6 * started, 3),
        "dur": round(1e6 * (ended - started), 3),
        "args": counts,
    }
