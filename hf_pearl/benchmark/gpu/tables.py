"""What `bench --suite h200 --json FILE` has saved, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .goals import goals
from .parts import Figures, failures, omissions

QUICK_NOTE = "Tiny models, to see whether everything runs: these figures mean nothing."
MET = {True: "met", False: "not met", None: "-"}


def gpu_tables(saved: Figures) -> str:
    """Goals, then a table of everything that was measured, then what was not and why."""
    parts = saved["parts"]
    models = {name.removeprefix("steps, "): part for name, part in parts.items() if "target_steps" in part}
    sections = [
        QUICK_NOTE if saved["is_quick"] else _goals(saved),
        _section("Steps", STEPS, _steps(models)),
        _section("What ran", ("model", "attention", "CUDA graphs", "device busy, ms a step"), _observed(models)),
        _section("One model", ("model", "method", "rows", "ms per token", "over the bound"), _tokens(parts, models)),
        _section("Attention, µs a layer", ATTENTION, _attention(parts)),
        *(_pair(name, part) for name, part in parts.items() if "methods" in part),
        _section("The pairs' own steps", ("pair", "step", "ms", "bound, ms", "over the bound"), _own_steps(parts)),
        _section("Simulated: over `generate`", SIMULATED, _simulated(parts)),
        _section("Failed", ("what", "error"), failures(saved)),
        _section("Left out", ("what", "why"), omissions(saved)),
    ]
    bandwidth = parts.get("copy bandwidth")
    if bandwidth:
        sections.insert(1, f"Bound: all weights of a step, at {bandwidth['bytes_per_second'] / 1e9:.0f} GB/s.")
    return "\n\n".join(section for section in sections if section)


STEPS = ("model", "step", "rows", "size", "ms", "over the bound", "device busy, ms")
ATTENTION = ("rows", "context", "queries a row", "attention", "paged", "device", "SDPA", "bound")
SIMULATED = ("pair", "GPUs", "no draft", "speculative", "lockstep", "PEARL", "bound")


def _section(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table under its title; nothing where it has no rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"**{title}**", "", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}", *lines])


def _goals(saved: Figures) -> str:
    rows = [(goal.goal, goal.measured, MET[goal.is_met]) for goal in goals(saved)]
    return _section("Goals", ("goal", "measured", ""), rows)


def _steps(models: dict[str, Figures]) -> Iterable[Sequence[object]]:
    for name, part in models.items():
        steps = [("draft", each["requests"], f"{each['guesses']} guesses", each) for each in part["draft_steps"]]
        for each in part["chained_steps"]:
            kind = f"draft, {each['per_launch']} to a launch"
            steps.append((kind, each["requests"], f"{each['guesses']} guesses", each))
        steps += [("target", each["rows"], f"{each['tokens']} tokens a row", each) for each in part["target_steps"]]
        for kind, rows, size, each in steps:
            over = _times(each["seconds"], part["bound_seconds"])
            yield name, kind, rows, size, _ms(each["seconds"]), over, _ms(each.get("device_seconds"))


def _observed(models: dict[str, Figures]) -> Iterable[Sequence[object]]:
    for name, part in models.items():
        if "observed" not in part:
            continue
        seen = part["observed"]
        yield name, seen["attention"], "yes" if seen["uses_graphs"] else "no", _ms(seen["device_seconds"])


def _tokens(parts: dict[str, Figures], models: dict[str, Figures]) -> Iterable[Sequence[object]]:
    for part_name, part in parts.items():
        name = part.get("model", part_name.removeprefix("steps, "))
        bound = models[name]["bound_seconds"] if name in models else None
        for each in part.get("token_seconds", ()):
            yield name, each["method"], each["rows"], _ms(each["seconds"]), _times(each["seconds"], bound)


def _attention(parts: dict[str, Figures]) -> Iterable[Sequence[object]]:
    for each in parts.get("attention", {"cases": []})["cases"]:
        times = [each[f"{name}_seconds"] for name in ("paged", "paged_device", "sdpa", "bound")]
        shown = ["-" if seconds is None else f"{1e6 * seconds:.1f}" for seconds in times]
        yield each["num_rows"], each["context"], each["num_new"], each["attention"], *shown


def _pair(name: str, part: Figures) -> str:
    rates = {each["name"]: each.get("tokens_per_second") for each in part["methods"]}
    rows = [
        (
            each["name"],
            "-" if not rates[each["name"]] else f"{rates[each['name']]:.1f}",
            _times(rates[each["name"]], rates.get("generate")),
            _times(rates[each["name"]], rates.get("assisted")),
            "-" if not each.get("mean_accepted_tokens") else f"{each['mean_accepted_tokens']:.2f}",
            each.get("warm_up_steps", "-"),
            each.get("error", ""),
        )
        for each in part["methods"]
    ]
    title = f"{name[0].upper()}{name[1:]}, the embedded pair's acceptance"
    headings = ("method", "tokens/s", "over `generate`", "over `assisted`", "mean accepted tokens", "warm-up steps", "")
    return _section(title, headings, rows)


def _own_steps(parts: dict[str, Figures]) -> Iterable[Sequence[object]]:
    for name, part in parts.items():
        for each in part.get("own_steps", ()):
            seconds, bound = each["seconds"], each["bound_seconds"]
            yield name.removeprefix("pair "), each["model"], _ms(seconds), _ms(bound), _times(seconds, bound)


def _simulated(parts: dict[str, Figures]) -> Iterable[Sequence[object]]:
    for name, part in parts.items():
        for each in part.get("simulated", ()):
            yield name.removeprefix("simulated "), each["gpus"], *(f"{x:.2f}" for x in each["over_generate"].values())


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3f}"


def _times(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value and other else "-"
