"""The documents' figures are those of the files that they were measured into."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import hf_pearl
from hf_pearl.benchmark import BENCH
from hf_pearl.benchmark.fill_in import MARKED, filled_in
from hf_pearl.benchmark.grid_tables import speedups

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))
DOCUMENTS = {file: file.read_text("utf-8") for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def test_the_first_lines_of_code_run_as_they_stand() -> None:
    """Somebody copies them from the README."""
    _, _, code = DOCUMENTS[ROOT / "README.md"].partition("```python\n")
    names: dict[str, Any] = {}
    try:
        exec(code.partition("```")[0], names)
        hf_pearl.release(names["target"])
    finally:
        hf_pearl.disable()


def test_the_tables_are_those_of_the_saved_measurements() -> None:
    """`python -m hf_pearl.benchmark.fill_in README.md docs/*.md` has nothing to do."""
    for file, text in DOCUMENTS.items():
        assert filled_in(text, ROOT) == text, file


def test_every_saved_measurement_is_shown_and_every_shown_table_was_measured() -> None:
    marks = [mark for text in DOCUMENTS.values() for mark in MARKED.finditer(text)]
    shown = {file for mark in marks if mark[2].startswith("table") for file in ROOT.glob(mark[3])}
    assert shown == set(RESULTS)
    for file, text in DOCUMENTS.items():
        unmarked = MARKED.sub("", text)
        assert "<!-- end -->" not in unmarked, f"{file}: a table whose mark is not understood"
        assert "| tokens/s |" not in unmarked and "| generate | 1" not in unmarked, file


def test_every_measured_method_is_explained_and_no_other() -> None:
    text = DOCUMENTS[ROOT / "docs" / "benchmarks.md"]
    _, _, table = text.partition("| method | what it is |\n|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    assert rows == [f"| {method.name} | {method.summary} |" for method in BENCH]


def test_every_method_was_measured_on_every_workload() -> None:
    measured = set()
    for file in RESULTS:
        if file.name.startswith("bench-"):
            result = json.loads(file.read_text("utf-8"))
            assert [method["name"] for method in result["methods"]] == [method.name for method in BENCH], file
            workload = result["workload"]
            measured.add((result["target_cost"], workload["temperature"], workload["batch_size"]))
    assert measured == set(product((1.0, 3.0), (0.0, 0.7), (1, 4)))


def test_a_draft_that_knows_nothing_never_makes_it_slower_than_3_percent() -> None:
    """What was measured, not what this machine does now."""
    files = [file for file in RESULTS if file.name.startswith("untrained-")]
    assert len(files) == 4
    for file in files:
        result = json.loads(file.read_text("utf-8"))
        assert result["untrained_draft"] and result["first_differences"] == result["near_ties"]
        assert speedups(result)["pearl"] >= 0.97, file


def test_saved_measurements_say_what_they_were_measured_on() -> None:
    """Command, versions, machine, runs; and outputs that were compared."""
    for file in RESULTS:
        result = json.loads(file.read_text("utf-8"))
        assert result["command"].startswith(("python -m hf_pearl ", "python -m hf_pearl.benchmark."))
        assert {"python", "torch", "transformers", "hf-pearl"} <= result["versions"].keys()
        assert result["machine"]["num_cores"] >= 1
        assert result.get("num_runs", result.get("num_steps")) >= 3
        assert result.get("first_differences") == result.get("near_ties")
