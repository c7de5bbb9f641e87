"""`python -m hf_pearl bench --suite handover`: from lane to lane, and every execution beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import enabled_for_tiny_models, noisy_copy, tiny_model, tiny_tokenizer

from hf_pearl.__main__ import main
from hf_pearl.benchmark import handover_suite
from hf_pearl.benchmark.fill_in import filled_in
from hf_pearl.benchmark.handover_table import handover_table
from hf_pearl.commands import bench


def saved_pair(folder: Path) -> list[str]:
    """The options that name a tiny pair and two prompts for it."""
    target = tiny_model("llama", 1, dtype=torch.float64)
    for name, model in {"target": target, "draft": noisy_copy(target, 0.03, 2)}.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer(5).save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text('{"turns": ["abc dead beef cafe"]}\n{"turns": ["bad fade"]}')
    pair = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--dtype", "float64"]
    return [*pair, "--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "12"]


def test_the_command_measures_and_its_table_can_be_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In threads: a process of the draft's own takes seconds to start."""
    methods = [method for method in handover_suite.METHODS if method.name in ("generate", "inline", "threads")]
    monkeypatch.setattr(bench, "METHODS", methods)
    monkeypatch.setattr(handover_suite, "EXECUTIONS", ("threads",))
    files = ["--json", str(tmp_path / "handover.json"), "--markdown", str(tmp_path / "handover.md")]
    options = [*saved_pair(tmp_path), "--steps", "5", "--runs", "3", *files]
    with enabled_for_tiny_models():
        assert main(["bench", "--suite", "handover", *options]) == 0
    saved = json.loads((tmp_path / "handover.json").read_text())
    (handover,) = saved["handovers"]
    for way in ("to_draft", "to_engine"):
        assert 0.0 < handover[way]["median_us"] <= handover[way]["p99_us"]
    assert [each.get("execution") for each in saved["methods"]] == [None, "inline", "threads"]
    assert (saved["num_steps"], saved["num_runs"], saved["same_output"]) == (5, 3, True)
    table = handover_table(saved)
    assert table in capsys.readouterr().out
    assert (tmp_path / "handover.md").read_text() == f"{table}\n"
    mark = "<!-- table: handover.json -->\n\n{}\n\n<!-- end -->\n"
    assert filled_in(mark.format("| old |"), tmp_path) == mark.format(table)


@pytest.mark.parametrize("num_steps", [1, 4001])
def test_percentiles_need_two_steps_and_a_text_has_an_end(
    num_steps: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--suite", "handover", *saved_pair(tmp_path), "--steps", str(num_steps)])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--steps {num_steps}: --suite handover takes percentiles of 2 to 4000" in said


def test_one_workload_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--suite", "handover", *saved_pair(tmp_path), "--temperature", "0", "1"])
    assert "one --target-cost and one --temperature" in " ".join(capsys.readouterr().err.split())


def test_sampled_texts_are_compared_with_those_of_our_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers draws other noise."""
    methods = [each for each in handover_suite.SAMPLED_METHODS if each.name in ("generate", "inline", "engine")]
    monkeypatch.setattr(bench, "SAMPLED_METHODS", methods)
    monkeypatch.setattr(handover_suite, "EXECUTIONS", ("threads",))
    file = tmp_path / "handover.json"
    options = [*saved_pair(tmp_path), "--temperature", "0.7", "--steps", "2", "--runs", "1", "--json", str(file)]
    with enabled_for_tiny_models():
        assert main(["bench", "--suite", "handover", *options]) == 0
    saved = json.loads(file.read_text())
    assert (len(saved["methods"]), saved["same_output"]) == (3, True)
    rows = [line.split(" | ")[0] for line in handover_table(saved).splitlines() if line]
    assert rows == [
        "| `execution`",
        "|---|--:|--:|--:|--:|",
        "| threads",
        "| `execution`",
        "|---|--:|--:|--:|",
        "| inline",
    ]


def test_no_speed_is_shown_of_a_wrong_output() -> None:
    plain = {"name": "generate", "tokens_per_second": 100.0, "runs": [90.0, 110.0]}
    wrong = {"name": "auto", "tokens_per_second": None, "error": "wrong: 2 texts differ from those of generate"}
    table = handover_table({"handovers": [], "methods": [plain, wrong]})
    assert table.splitlines()[-1] == "| auto | - | - | (wrong: 2 texts differ from those of generate) |"
