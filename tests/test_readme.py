"""The README's figures are those of the files that they were measured into."""

from __future__ import annotations

import json
from pathlib import Path

from hf_pearl.benchmark.markdown import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def test_the_tables_are_those_of_the_saved_measurements() -> None:
    """Every saved measurement is shown, and every shown table was measured."""
    text = (ROOT / "README.md").read_text("utf-8")
    saved = sorted(RESULTS.glob("*.json"))
    assert saved
    for file in saved:
        assert f"docs/results/{file.name}" in text
        expected = markdown_table(json.loads(file.read_text("utf-8")))
        assert expected in text, f"python -m hf_pearl.benchmark.markdown {file}"
    assert text.count("| generate |") == len(saved)


def test_saved_measurements_say_what_they_were_measured_on() -> None:
    """Command, versions, machine, runs; and outputs that were compared."""
    for file in RESULTS.glob("*.json"):
        result = json.loads(file.read_text("utf-8"))
        assert result["command"].startswith("python -m hf_pearl ")
        assert {"python", "torch", "transformers", "hf-pearl"} <= result["versions"].keys()
        assert result["machine"]["num_cores"] >= 1
        assert result["num_runs"] >= 3
        assert result["first_differences"] == result["near_ties"]
