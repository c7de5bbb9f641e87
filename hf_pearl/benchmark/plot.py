"""A picture of what `python -m hf_pearl bench` has saved: `python -m hf_pearl.benchmark.plot PNG JSON...`.

Needs matplotlib, which the package can do without: `pip install "hf-pearl[plot]"`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .grid_tables import Saved, in_order, speedups, title

NUM_COLUMNS = 4
TICKS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
FASTER, SLOWER = "#2a7f62", "#b5533c"
MISSING = 'a plot needs matplotlib, which is not installed: pip install "hf-pearl[plot]"'


def is_matplotlib_available() -> bool:
    """Whether `plot` can work."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(files: Sequence[Saved], path: Path) -> None:
    """Draw every workload's speed-ups over `generate` as bars, on a scale on which half is as far from 1 as double.

    Raises
    ------
    ImportError
        There is no matplotlib.
    """
    if not is_matplotlib_available():
        raise ImportError(MISSING)
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    files = in_order(files)
    num_columns = min(NUM_COLUMNS, len(files))
    num_rows = -(-len(files) // num_columns)
    num_methods = max(len(saved["methods"]) for saved in files)
    figure = Figure(
        figsize=(2.0 + 2.9 * num_columns, 0.8 + (0.5 + 0.24 * num_methods) * num_rows), layout="constrained"
    )
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True).flatten()
    for panel in panels[len(files) :]:
        panel.set_visible(False)
    for panel, saved in zip(panels, files, strict=False):
        ratios = speedups(saved)
        names = list(ratios)[::-1]
        widths = [(ratios[name] or 1.0) - 1.0 for name in names]
        panel.barh(names, widths, left=1.0, color=[FASTER if width >= 0 else SLOWER for width in widths])
        for name in names:
            label = "-" if ratios[name] is None else f"{ratios[name]:.2f}"
            panel.annotate(
                label, (max(1.0, ratios[name] or 1.0), name), (3, 0), textcoords="offset points", va="center"
            )
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(TICKS))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.3)
        panel.set_title(title(saved), fontsize="medium")
    figure.supxlabel("tokens per second over those of generate")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    plot([json.loads(Path(file).read_text("utf-8")) for file in sys.argv[2:]], Path(sys.argv[1]))
