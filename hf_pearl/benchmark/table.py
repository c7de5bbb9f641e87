"""A measurement as a table, and what the table does not say."""

from __future__ import annotations

from .measurement import Measurement, reference_name
from .results import MethodResult

# Headings, of two lines each.
COLUMNS = (
    ("", "tokens/s"),
    ("", "speed-up"),
    ("mean accepted", "tokens"),
    ("target forwards", "per token"),
    ("", "overlap"),
)
SHOWN_FIELDS = ("draft_length", "num_assistant_tokens", "prompt_lookup_num_tokens")


def table(measurement: Measurement) -> str:
    """All methods, a line each."""
    name_width = max(len(result.name) for result in measurement.results)
    widths = [max(map(len, heading)) for heading in COLUMNS]
    lines = []
    for line in (0, 1):
        cells = [heading[line].rjust(width) for heading, width in zip(COLUMNS, widths, strict=True)]
        lines.append(
            "  ".join([("method" if line else "").ljust(name_width), *cells, "setting" if line else ""]).rstrip()
        )
    plain = measurement.result("generate").tokens_per_second
    for result in measurement.results:
        cells = [cell.rjust(width) for cell, width in zip(_cells(result, plain), widths, strict=True)]
        lines.append("  ".join([result.name.ljust(name_width), *cells, _setting(result)]).rstrip())
    return "\n".join(lines)


def _cells(result: MethodResult, plain: float | None) -> list[str]:
    rate = result.tokens_per_second
    figures = [
        (rate, "{:.1f}"),
        (rate / plain if rate and plain else None, "{:.2f}"),
        (result.mean_accepted_tokens, "{:.2f}"),
        (result.target_forwards_per_token, "{:.2f}"),
        (result.overlap, "{:.0%}"),
    ]
    return ["-" if value is None else form.format(value) for value, form in figures]


def _setting(result: MethodResult) -> str:
    if result.error is not None or result.setting is None:
        return f"({result.error})"
    described = result.setting.describe()
    num_threads = described.pop("num_threads")
    parts = [f"{num_threads} thread{'s' if num_threads > 1 else ''}"]
    return ", ".join(parts + [f"{name} {value}" for name, value in described.items() if name in SHOWN_FIELDS])


def notes(measurement: Measurement) -> list[str]:
    """What the table does not say."""
    workload, pearl = measurement.workload, measurement.result("pearl")
    reference, compared = reference_name(workload), measurement.compared
    names = " and ".join(result.name for result in compared) if len(compared) < 5 else f"{len(compared)} methods"
    num_texts = sum(len(each.rows) for result in compared for each in result.completions)
    num_parted, num_near_ties = measurement.num_first_differences, measurement.num_near_ties
    said = [f"same output: all {num_texts} completions of {names} are those of {reference}."]
    if num_parted:
        parting = f"{num_parted} of {num_texts} completions of {names} part from those of {reference}"
        said = [f"{parting}, {num_near_ties} of them where the target finds both tokens equally good (rounding)."]
    if num_parted > num_near_ties:
        said.append("A difference that is not of rounding is a bug: please report it.")
    if workload.temperature:
        said.append("transformers' methods draw other noise: their texts are others.")
    seconds = sum(each.seconds for each in pearl.completions)
    target, draft = (pearl.total(name) / seconds for name in ("target_seconds", "draft_seconds"))
    said.append(f"pearl: the target computed {target:.0%} of the time, the draft {draft:.0%} ({pearl.execution}).")
    return said
