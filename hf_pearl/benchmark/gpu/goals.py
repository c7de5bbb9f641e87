"""What the GPU path is to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .parts import Figures

OVERHEAD = 200e-6  # seconds of a draft step beside its weights
DRAFT_BOUNDS, TARGET_BOUNDS = 1.5, 1.25
OVER_GENERATE, OVER_ASSISTED = 5.0, 3.0
MOST_GUESSES = 8


class Goal(NamedTuple):
    """A figure and its limit, both in words, and whether it was met; None: not measured."""

    goal: str
    measured: str
    is_met: bool | None


def goals(figures: Figures) -> list[Goal]:
    """Every goal, in the light of what `measure_gpu` found."""
    parts = figures["parts"]
    return [_draft_step(parts), _target_step(parts), *_pair(parts)]


def _draft_step(parts: Mapping[str, Figures]) -> Goal:
    goal = f"draft step, 0.6B, up to {MOST_GUESSES} guesses: at most {DRAFT_BOUNDS:g}x the bound + 200 µs"
    part = parts.get("steps, 0.6B")
    steps = [each for each in part["draft_steps"] if each["requests"] == 1] if part else []
    if part is None or not steps:
        return _missing(goal)
    slowest, limit = max(each["seconds"] for each in steps), DRAFT_BOUNDS * part["bound_seconds"] + OVERHEAD
    return Goal(goal, f"{1e3 * slowest:.3f} ms, limit {1e3 * limit:.3f} ms", slowest <= limit)


def _target_step(parts: Mapping[str, Figures]) -> Goal:
    goal = f"target step, 8B, batch 1: at most {TARGET_BOUNDS:g}x the bound"
    part = parts.get("steps, 8B")
    if part is None:
        return _missing(goal)
    seconds = next(each["seconds"] for each in part["target_steps"] if (each["rows"], each["tokens"]) == (1, 1))
    ratio = seconds / part["bound_seconds"]
    return Goal(goal, f"{1e3 * seconds:.3f} ms, {ratio:.2f}x", ratio <= TARGET_BOUNDS)


def _pair(parts: Mapping[str, Figures]) -> list[Goal]:
    part = parts.get("pair 0.6B/8B, batch 1")
    rates = {each["name"]: each.get("tokens_per_second") for each in part["methods"]} if part else {}
    over = {"generate": OVER_GENERATE, "assisted": OVER_ASSISTED}
    return [_ratio(rates, name, least) for name, least in over.items()]


def _ratio(rates: Mapping[str, Any], other: str, least: float) -> Goal:
    goal = f"PEARL, 0.6B/8B on one GPU, batch 1: at least {least:g}x `{other}`"
    if not rates.get("pearl") or not rates.get(other):
        return _missing(goal)
    ratio = rates["pearl"] / rates[other]
    return Goal(goal, f"{ratio:.2f}x", ratio >= least)


def _missing(goal: str) -> Goal:
    return Goal(goal, "not measured", None)
