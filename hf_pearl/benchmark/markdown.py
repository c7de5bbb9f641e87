"""The table of a saved measurement in Markdown: `python -m hf_pearl.benchmark.markdown docs/results/demo.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEADINGS = ("method", "tokens/s", "over `generate`", "over `assisted`", "mean accepted tokens", "forwards per token")


def markdown_table(saved: dict[str, Any]) -> str:
    """One line per method of what `python -m hf_pearl demo --json FILE` has saved."""
    rates = {method["name"]: method["tokens_per_second"] for method in saved["methods"]}
    lines = [f"| {' | '.join(HEADINGS)} |", f"|---|{'--:|' * (len(HEADINGS) - 1)}"]
    for method in saved["methods"]:
        rate = method["tokens_per_second"]
        figures = [
            (rate, ".0f"),
            (_ratio(rate, rates.get("generate")), ".2f"),
            (_ratio(rate, rates.get("assisted")), ".2f"),
            (method["mean_accepted_tokens"], ".2f"),
            (method["target_forwards_per_token"], ".2f"),
        ]
        cells = ["-" if value is None else format(value, form) for value, form in figures]
        lines.append(f"| {' | '.join([method['name'], *cells])} |")
    return "\n".join(lines)


def _ratio(rate: float | None, other: float | None) -> float | None:
    return rate / other if rate and other else None


if __name__ == "__main__":
    print(markdown_table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
