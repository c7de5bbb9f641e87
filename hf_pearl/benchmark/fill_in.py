"""Write the tables of saved measurements into documents: `python -m hf_pearl.benchmark.fill_in README.md docs/*.md`.

Tables stand between a mark and `<!-- end -->`. Of measurements of `bench`, of which there may be many, the marks are

- `<!-- speed-ups: docs/results/bench-*.json -->`: one table of all speed-ups,
- `<!-- main speed-ups: docs/results/bench-*.json -->`: the same without PEARL's variants,
- `<!-- tables: docs/results/bench-*.json -->`: a table of each, under a heading of its own,

and of any other `<!-- table: docs/results/demo.json -->`. Paths are relative to the working folder.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from .cache_table import cache_table
from .efficiency_table import efficiency_table
from .grid_tables import summary_table, titled_tables
from .handover_table import handover_table
from .markdown import markdown_table
from .sampling_table import sampling_table

MARKED = re.compile(r"(<!-- (main speed-ups|speed-ups|tables|table): (\S+) -->)\n.*?\n(<!-- end -->)", re.DOTALL)


def filled_in(text: str, root: Path) -> str:
    """A document with the tables that are saved below `root` now."""

    def fill(mark: re.Match[str]) -> str:
        return f"{mark[1]}\n\n{saved_tables(root, mark[2], mark[3])}\n\n{mark[4]}"

    return MARKED.sub(fill, text)


def saved_tables(root: Path, kind: str, pattern: str) -> str:
    """What stands behind a mark of this kind.

    Raises
    ------
    FileNotFoundError
        There is no such measurement.
    """
    files = [json.loads(file.read_text("utf-8")) for file in sorted(root.glob(pattern))]
    if not files:
        raise FileNotFoundError(f"no saved measurement is called {pattern} in {root.resolve()}")
    if kind == "tables":
        return titled_tables(files)
    if kind == "table":
        return _table(files[0])
    return summary_table(files, is_main=kind == "main speed-ups")


def _table(saved: dict[str, Any]) -> str:
    if "decode_steps" in saved:
        return cache_table(saved)
    if "handovers" in saved:
        return handover_table(saved)
    if "efficiencies" in saved:
        return efficiency_table(saved)
    return sampling_table(saved) if "temperatures" in saved else markdown_table(saved)


def main(paths: list[str]) -> None:
    """Fill in the documents that have changed."""
    for path in map(Path, paths):
        text = path.read_text("utf-8")
        filled = filled_in(text, Path())
        if filled != text:
            path.write_text(filled, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
