"""The efficiency suite's figures as Markdown: `python -m hf_pearl.benchmark.efficiency_table FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# What of the measured time is not ideal, and what each part is called.
LOSSES = {
    "outside": "before and behind the decoding",
    "judging": "judging",
    "rest": "rest of the loop",
    "waiting": "more waiting",
    "forwards": "more and wider forwards",
}
HEADINGS = ("workload", "tokens/s", "ideal", "measured", "efficiency", "runs", "without prefill", *LOSSES.values())


def efficiency_table(saved: dict[str, Any]) -> str:
    """One line per workload of what `python -m hf_pearl bench --suite efficiency --json FILE` has saved."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"|---|{'--:|' * (len(HEADINGS) - 1)}"]
    for measured in saved["efficiencies"]:
        seconds, num_tokens = measured["seconds"], measured["num_tokens"]
        cells = [
            _workload(measured),
            f"{measured['tokens_per_second']:.0f}",
            *(f"{1e3 * seconds[name] / num_tokens:.2f} ms" for name in ("ideal", "measured")),
            f"{measured['efficiency']:.2f}",
            f"{min(measured['runs']):.2f} to {max(measured['runs']):.2f}",
            f"{measured['decode_efficiency']:.2f}",
            *(f"{seconds[name] / seconds['measured']:.1%}" for name in LOSSES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _workload(measured: dict[str, Any]) -> str:
    cost, temperature = measured["target_cost"], measured["temperature"]
    target = "natural cost" if cost == 1 else f"{cost:g}x target"
    return f"{target}, {f'temperature {temperature:g}' if temperature else 'greedy'}"


if __name__ == "__main__":
    print(efficiency_table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
