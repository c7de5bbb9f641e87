"""The notebooks run from top to bottom, say what they should, and are kept without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hf_pearl.pair import demo_pair_folder

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
CELL_TIMEOUT = 240  # seconds


def has_pair() -> bool:
    """Whether there are weights of the embedded pair."""
    try:
        demo_pair_folder()
    except FileNotFoundError:
        return False
    return True


def printed(notebook: nbformat.NotebookNode) -> str:
    """All that a notebook's cells have written to standard output."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_there_are_notebooks() -> None:
    assert "quickstart.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.skipif(not has_pair(), reason="the embedded pair has no weights here: make pair")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    text = printed(notebook)
    assert "mean accepted tokens" in text
    assert "Same tokens: True" in text
    assert "class Stack:" in text
