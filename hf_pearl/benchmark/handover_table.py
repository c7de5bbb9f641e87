"""Hand-overs and executions as Markdown: `python -m hf_pearl.benchmark.handover_table docs/results/handover.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HANDOVERS = {"to_draft": "to the draft", "to_engine": "to the engine"}
REFERENCES = ("generate", "engine")  # what the executions are compared with


def handover_table(saved: dict[str, Any]) -> str:
    """Two tables of what `python -m hf_pearl bench --suite handover` has saved."""
    names = [f"{name}, {figure}" for name in HANDOVERS.values() for figure in ("median", "p99")]
    lines = [f"| `execution` | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for handover in saved["handovers"]:
        times = [handover[way][f"{figure}_us"] for way in HANDOVERS for figure in ("median", "p99")]
        lines.append(f"| {handover['execution']} | {' | '.join(f'{time:.0f} µs' for time in times)} |")
    methods = {each["name"]: each for each in saved["methods"]}
    plain = methods["generate"]["tokens_per_second"]
    lines += ["", "| `execution` | tokens/s | over `generate` | runs |", "|---|--:|--:|--:|"]
    for name, method in methods.items():
        if name in REFERENCES:
            continue
        if "error" in method:
            lines.append(f"| {name} | - | - | ({method['error']}) |")
            continue
        rate, runs = method["tokens_per_second"], [run / plain for run in method["runs"]]
        shown = f"auto: {method['execution']}" if name == "auto" else name
        lines.append(f"| {shown} | {rate:.0f} | {rate / plain:.2f} | {min(runs):.2f} to {max(runs):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(handover_table(json.loads(Path(sys.argv[1]).read_text("utf-8"))))
