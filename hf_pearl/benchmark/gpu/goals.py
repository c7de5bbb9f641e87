"""What the GPU path is to reach, beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .parts import Figures

OVERHEAD = 200e-6  # seconds of a draft step beside its weights
DRAFT_BOUNDS, TARGET_BOUNDS = 1.5, 1.25
OVER_GENERATE, OVER_ASSISTED = 5.0, 3.0
MOST_GUESSES = 8
COMPARABLE = 1.3  # times its bound: a target of the pair whose step takes longer says nothing of a real one


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
    best = best_draft_steps(part) if part else {}
    if part is None or not best:
        return _missing(goal)
    slowest, limit = max(best.values()), DRAFT_BOUNDS * part["bound_seconds"] + OVERHEAD
    measured = f"{1e3 * slowest:.3f} ms, limit {1e3 * limit:.3f} ms"
    if max(best) < MOST_GUESSES and slowest <= limit:
        return Goal(goal, f"{measured}, but no more than {max(best)} guesses were measured", None)
    return Goal(goal, measured, slowest <= limit)


def best_draft_steps(part: Figures) -> dict[int, float]:
    """Seconds of a step over so many guesses of one row: the better of made alone and launched with others."""
    steps = [each for each in (*part["draft_steps"], *part["chained_steps"]) if each["requests"] == 1]
    times = [(each["guesses"], each["seconds"]) for each in steps if each["seconds"] is not None]
    return {guesses: min(seconds for num, seconds in times if num == guesses) for guesses, _ in times}


def _target_step(parts: Mapping[str, Figures]) -> Goal:
    goal = f"target step, 8B, batch 1: at most {TARGET_BOUNDS:g}x the bound"
    part = parts.get("steps, 8B")
    steps = part["target_steps"] if part else []
    times = [each["seconds"] for each in steps if (each["rows"], each["tokens"]) == (1, 1)]
    if part is None or not times:
        return _missing(goal)
    seconds, ratio = times[0], times[0] / part["bound_seconds"]
    return Goal(goal, f"{1e3 * seconds:.3f} ms, {ratio:.2f}x", ratio <= TARGET_BOUNDS)


def _pair(parts: Mapping[str, Figures]) -> list[Goal]:
    part = parts.get("pair 0.6B/8B, batch 1")
    over = {"generate": OVER_GENERATE, "assisted": OVER_ASSISTED}
    return [_ratio(part, name, least) for name, least in over.items()]


def _ratio(part: Figures | None, other: str, least: float) -> Goal:
    goal = f"PEARL, 0.6B/8B on one GPU, batch 1: at least {least:g}x `{other}`"
    if part is None:
        return _missing(goal)
    if part["wrong"]:
        return Goal(goal, f"wrong: {', '.join(part['wrong'])}", False)
    methods: dict[str, Figures] = {each["name"]: each for each in part["methods"]}
    rates: dict[str, Any] = {name: each.get("tokens_per_second") for name, each in methods.items()}
    if not rates.get("pearl") or not rates.get(other):
        return _missing(goal)
    ratio = rates["pearl"] / rates[other]
    measured = f"{ratio:.2f}x"
    if methods["pearl"].get("warm_up_steps"):
        measured += f", {methods['pearl']['warm_up_steps']} warm-up steps in the timed runs"
    obstacle = _why_not_comparable(part)
    if obstacle is not None:
        return Goal(goal, f"{measured}, not comparable: {obstacle}", None)
    return Goal(goal, measured, ratio >= least)


def _why_not_comparable(part: Figures) -> str | None:
    """Why the pair's target says nothing of a real one of its weight; None where it does."""
    step: Mapping[str, Any] = next((each for each in part["own_steps"] if each["model"] == "target"), {})
    if step.get("bound_seconds") is None:
        return "its target's step was not measured beside its bound"
    ratio = step["seconds"] / step["bound_seconds"]
    return f"its target's step takes {ratio:.2f}x its bound" if ratio > COMPARABLE else None


def _missing(goal: str) -> Goal:
    return Goal(goal, "not measured", None)
