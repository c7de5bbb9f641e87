"""A measurement under a progress bar, all that a saved one says, and its file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..pair import PACKAGED
from .completion import Workload
from .machine import describe_machine, describe_versions
from .measurement import Measurement, measure, num_calls
from .methods import Method


def measure_with_progress(workload: Workload, methods: Sequence[Method], num_runs: int) -> Measurement:
    """Measure, under a progress bar (seldom renewed where it goes into a log)."""
    total, is_watched = num_calls(workload, methods, num_runs), sys.stderr.isatty() or "ipykernel" in sys.modules
    interval = 0.1 if is_watched else 10.0
    with tqdm(total=total, unit="call", desc="measuring", leave=False, mininterval=interval) as bar:

        def advance(method: str) -> None:
            bar.set_postfix_str(method, refresh=False)
            bar.update()

        return measure(workload, methods, num_runs, advance)


def figures(measurement: Measurement) -> dict[str, Any]:
    """All figures, and what they were made with, for a JSON file."""
    workload = measurement.workload
    return {
        **measurement.as_dict(),
        "models": {"target": _name(workload.target), "draft": _name(workload.draft)},
        **described(workload.target.device),
    }


def described(device: torch.device) -> dict[str, Any]:
    """What a command of ours was measured with: the command, and on what."""
    return {
        "command": " ".join(["python -m hf_pearl", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "versions": describe_versions(),
    }


def write_json(path: Path, saved: dict[str, Any]) -> None:
    """Write figures to a file, in one move: whatever comes between, it holds the old ones or all of the new."""
    text = json.dumps(saved, indent=2, allow_nan=False) + "\n"
    if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
        path.write_text(text, "utf-8")
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text, "utf-8")
        part.replace(path)
    except PermissionError:  # A file may be open to us in a folder that is not.
        path.write_text(text, "utf-8")
    finally:
        part.unlink(missing_ok=True)


def describe_model(model: PreTrainedModel) -> str:
    """A model in one line."""
    num_layers = model.config.get_text_config().num_hidden_layers
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.num_parameters() / 1e6:.1f}M parameters, {num_layers} layers, {dtype} on {model.device}"


def _name(model: PreTrainedModel) -> str:
    """A model's name or folder; the embedded pair's folder without what lies above the package."""
    return str(model.name_or_path).removeprefix(f"{PACKAGED.parents[1]}/")
