"""`bench --suite efficiency`: what it computes from a call, by hand, and the command on tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import command_in_process, enabled_for_tiny_models, noisy_copy, tiny_model, tiny_tokenizer

from hf_pearl.__main__ import main
from hf_pearl.benchmark import efficiency_suite
from hf_pearl.benchmark.efficiency_suite import break_down, fitted
from hf_pearl.benchmark.efficiency_table import efficiency_table
from hf_pearl.benchmark.fill_in import filled_in
from hf_pearl.benchmark.methods import Setting
from hf_pearl.benchmark.profile import Parts, watched
from hf_pearl.config import PearlConfig
from hf_pearl.decoding.simulation import SimulatedRun
from hf_pearl.decoding.stats import PearlStats


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with command_in_process():
        yield


def test_times_are_fitted_by_a_straight_line() -> None:
    times = fitted((size, 3.0 + 0.5 * size + noise) for size in range(1, 9) for noise in (-0.1, 0.1))
    assert times.seconds(1) == pytest.approx(3.5)
    assert times.per_token == pytest.approx(0.5)
    assert times.seconds(20) == pytest.approx(13.0)


def test_every_second_that_is_not_ideal_is_put_down_to_something() -> None:
    """Two calls by hand; `ideal` reads the prompt as long as was measured, computes, and waits."""
    calls = [
        (Parts(outside=1.0, prefill=2.0, forwards=20.0, waiting=3.0, judging=0.5, rest=1.5), run(21.0, 20.0)),
        (Parts(outside=1.0, prefill=3.0, forwards=10.0, waiting=0.0, judging=0.5, rest=0.5), run(14.0, 13.5)),
    ]
    found = break_down(calls)
    assert (found.measured, found.ideal, found.prefill) == (43.0, 35.0, 5.0)
    assert (found.outside, found.judging, found.rest) == (2.0, 1.0, 2.0)
    assert (found.waiting, found.forwards) == (3.0 - 1.5, 35.0 - 33.5)
    assert found.ideal + sum((found.outside, found.judging, found.rest, found.waiting, found.forwards)) == 43.0
    assert (found.efficiency, found.decode_efficiency) == (35 / 43, 30 / 38)


def run(seconds: float, target_seconds: float) -> SimulatedRun:
    return SimulatedRun(seconds, PearlStats(target_seconds=target_seconds))


def test_watching_notes_every_call_and_leaves_no_trace() -> None:
    class Counter:
        def add(self, number: int) -> int:
            return number + 1

    before = vars(Counter)["add"]
    with watched(Counter, "add") as spans:
        assert [Counter().add(number) for number in range(3)] == [1, 2, 3]
    assert vars(Counter)["add"] is before
    assert [(span.args[1], span.result) for span in spans] == [(0, 1), (1, 2), (2, 3)]
    assert all(span.seconds >= 0.0 for span in spans)


def test_the_command_measures_every_target_and_its_table_can_be_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a thread: a process of the draft's own takes seconds to start."""
    setting = Setting(PearlConfig(prefix_cache=False, execution="threads"), uses_draft=True)
    monkeypatch.setattr(efficiency_suite, "SETTING", setting)
    target = tiny_model("llama", 1, dtype=torch.float64)
    for name, model in {"target": target, "draft": noisy_copy(target, 0.03, 2)}.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer(5).save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"turns": ["abc dead beef cafe"]}\n{"turns": ["bad fade"]}')
    pair = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "float64"]
    options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12", "--runs", "3"]
    files = ["--json", str(tmp_path / "efficiency.json"), "--markdown", str(tmp_path / "table.md")]
    more = ["--target-cost", "1", "2", *files]
    with enabled_for_tiny_models():
        assert main(["bench", "--suite", "efficiency", *pair, *options, *more]) == 0
    saved = json.loads((tmp_path / "efficiency.json").read_text())
    assert [each["target_cost"] for each in saved["efficiencies"]] == [1.0, 2.0]
    for each in saved["efficiencies"]:
        assert len(each["runs"]) == 3 and sorted(each["runs"])[1] == each["efficiency"] > 0.0
        assert each["num_tokens"] == 24 == each["measured"]["target_forwards"] + each["measured"]["accepted_tokens"]
        assert each["ideal"]["target_forwards"] + each["ideal"]["accepted_tokens"] == 24
        assert each["draft"]["first_ms"] > 0.0 < each["target"]["first_ms"]
    table = efficiency_table(saved)
    assert "| natural cost, greedy |" in table and "| 2x target, greedy |" in table
    assert table in capsys.readouterr().out and (tmp_path / "table.md").read_text() == f"{table}\n"
    mark = "<!-- table: efficiency.json -->\n\n{}\n\n<!-- end -->\n"
    assert filled_in(mark.format("| old |"), tmp_path) == mark.format(table)
