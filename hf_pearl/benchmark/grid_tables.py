"""What `python -m hf_pearl bench` has saved, as Markdown: a table of each workload, and one of all speed-ups.

A slowdown is a speed-up below 1, and shown as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Saved = dict[str, Any]

VARIANTS = "pearl, "
HEADINGS = ("method", "tokens/s", "over `generate`", "runs", "mean accepted tokens", "best setting")


def title(saved: Saved) -> str:
    """A workload in some words."""
    workload = saved["workload"]
    temperature = workload["temperature"]
    parts = [f"batch {workload['batch_size']}", f"temperature {temperature:g}" if temperature else "greedy"]
    cost = saved["target_cost"]
    heavy = [] if cost == 1 else [f"{cost:g}x target"]
    kind = ["untrained draft"] if saved.get("untrained_draft") else []
    return ", ".join([*heavy, *kind, *parts])


def in_order(files: Sequence[Saved]) -> list[Saved]:
    """Workloads by cost, temperature and batch."""
    return sorted(
        files, key=lambda each: (each["target_cost"], each["workload"]["temperature"], each["workload"]["batch_size"])
    )


def speedups(saved: Saved) -> dict[str, float | None]:
    """Every method's tokens per second over those of `generate`; None where it has none."""
    rates = {method["name"]: method["tokens_per_second"] for method in saved["methods"]}
    plain = rates["generate"]
    return {name: rate / plain if rate and plain else None for name, rate in rates.items()}


def workload_table(saved: Saved) -> str:
    """One line per method."""
    ratios = speedups(saved)
    plain = next(method["tokens_per_second"] for method in saved["methods"] if method["name"] == "generate")
    rows = []
    for method in saved["methods"]:
        if "error" in method:
            rows.append([method["name"], "-", "-", "-", "-", f"({method['error']})"])
            continue
        lowest, highest = (each(method["runs"]) / plain for each in (min, max))
        figures = [
            f"{method['tokens_per_second']:.0f}",
            f"{ratios[method['name']]:.2f}",
            f"{lowest:.2f} to {highest:.2f}",
            f"{method['mean_accepted_tokens']:.2f}",
        ]
        rows.append([method["name"], *figures, _setting(method["setting"])])
    return _markdown(HEADINGS, rows, last="---")


def titled_tables(files: Sequence[Saved]) -> str:
    """A table of each workload, under a heading."""
    return "\n\n".join(f"## {title(saved).capitalize()}\n\n{workload_table(saved)}" for saved in in_order(files))


def summary_table(files: Sequence[Saved], is_main: bool = False) -> str:
    """One line per method, one column per workload: speed-ups over `generate`.

    The main table leaves out PEARL's variants, which say what each part of it gives.
    """
    files = in_order(files)
    columns = [speedups(saved) for saved in files]
    names = list(dict.fromkeys(name for column in columns for name in column))
    names = [name for name in names if not (is_main and name.startswith(VARIANTS))]
    rows = [[name, *(_ratio(column.get(name)) for column in columns)] for name in names]
    return _markdown(["method", *map(title, files)], rows)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _setting(setting: dict[str, Any]) -> str:
    """The settings that were chosen by a trial, in words."""
    num_threads = setting["num_threads"]
    names = ("draft_length", "num_assistant_tokens", "prompt_lookup_num_tokens")
    lengths = [setting[name] for name in names if isinstance(setting.get(name), int)]
    parts = [f"{num_threads} thread{'s' if num_threads > 1 else ''}", *(f"{length} tokens" for length in lengths)]
    return ", ".join(parts)


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], last: str = "--:") -> str:
    rules = ["---", *["--:"] * (len(headings) - 2), last]
    lines = [headings, *rows]
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([body[0], f"|{'|'.join(rules)}|", *body[1:]])
