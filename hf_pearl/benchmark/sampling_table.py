"""Coupled beside rejection sampling, as Markdown: `python -m hf_pearl.benchmark.sampling_table FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FORESEEN = (1, 2, 3, 5)
HEADINGS = (
    "temperature",
    "`verification`",
    "`draft_length`",
    "tokens/s",
    "accepted tokens per forward",
    "a guess stands",
    f"a correction is among the draft's next {', '.join(map(str, FORESEEN))}",
)


def sampling_table(saved: dict[str, Any]) -> str:
    """One line per temperature and way of what `python -m hf_pearl.benchmark.sampling_suite --json FILE` has saved."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|--:|---|{'--:|' * (len(HEADINGS) - 2)}"]
    for measured in saved["temperatures"]:
        for way in measured["ways"]:
            foreseen = ", ".join(f"{way['foreseen'][str(most)]:.0%}" for most in FORESEEN)
            cells = [
                f"{measured['temperature']}",
                f'`"{way["verification"]}"`',
                f"{way['draft_length']}",
                f"{way['tokens_per_second']:.0f}",
                f"{way['mean_accepted_tokens']:.2f}",
                f"{way['stands']:.0%}",
                foreseen,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(sampling_table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
