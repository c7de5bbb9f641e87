"""The README's figures are those of the files that they were measured into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_pearl.benchmark.cache_table import cache_table
from hf_pearl.benchmark.markdown import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def as_markdown(saved: dict[str, Any]) -> str:
    return cache_table(saved) if "decode_steps" in saved else markdown_table(saved)


def test_the_tables_are_those_of_the_saved_measurements() -> None:
    """Every saved measurement is shown, and every shown table was measured."""
    text = "".join(file.read_text("utf-8") for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    saved = {file: json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    for file, figures in saved.items():
        assert f"docs/results/{file.name}" in text
        assert as_markdown(figures) in text, file
    assert text.count("| generate |") == sum("methods" in figures for figures in saved.values()) > 0


def test_saved_measurements_say_what_they_were_measured_on() -> None:
    """Command, versions, machine, runs; and outputs that were compared."""
    for file in RESULTS.glob("*.json"):
        result = json.loads(file.read_text("utf-8"))
        assert result["command"].startswith("python -m hf_pearl ")
        assert {"python", "torch", "transformers", "hf-pearl"} <= result["versions"].keys()
        assert result["machine"]["num_cores"] >= 1
        assert result.get("num_runs", result.get("num_steps")) >= 3
        assert result.get("first_differences") == result.get("near_ties")
