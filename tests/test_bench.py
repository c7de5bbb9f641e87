"""`python -m hf_pearl bench`: methods side by side, and that no speed is shown of a wrong output."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import command_in_process, noisy_copy, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.__main__ import main
from hf_pearl.benchmark import (
    BENCH,
    Completion,
    Method,
    Workload,
    complete,
    measurement,
    near_tie,
    plot,
    sampling_suite,
)
from hf_pearl.benchmark.fill_in import filled_in
from hf_pearl.benchmark.grid_tables import summary_table, title, workload_table
from hf_pearl.benchmark.measurement import WARM_UP, measure, num_calls, sharing_copy
from hf_pearl.benchmark.methods import COLD, OneLine, Setting, WithoutLookup
from hf_pearl.benchmark.recording import write_json
from hf_pearl.benchmark.untrained import untrained
from hf_pearl.commands import bench
from hf_pearl.decoding.noise import request_seed
from hf_pearl.parallel.workers.records import BeginCall, Message
from hf_pearl.parallel.workers.worker_process import WorkerProcess
from hf_pearl.registry import engines_of

END_ID = 7
TRANSFORMERS = ("assisted, constant", "assisted, dynamic", "prompt lookup")


def in_this_process(method: Method) -> Method:
    """A method's default, without trials, and without a process of its draft's own, which takes seconds to start."""
    return replace(method, candidates=(_inline(method.candidates[0]),))


def _inline(setting: Setting) -> Setting:
    if setting.pearl is None or setting.pearl.execution != "auto":
        return setting
    return replace(setting, pearl=replace(setting.pearl, execution="inline"))


METHODS = tuple(in_this_process(method) for method in BENCH if method.name not in ("lockstep 4", "lockstep 16"))
FEW = [method for method in METHODS if method.name in ("generate", "engine", "pearl")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pair, `target` and `draft`, whose texts end now and then, and a file of prompts."""
    root = tmp_path_factory.mktemp("models")
    target = tiny_model("llama", 1, dtype=torch.float64)
    target.generation_config.eos_token_id = END_ID
    for name, model in {"target": target, "draft": noisy_copy(target, 0.03, 2)}.items():
        model.save_pretrained(root / name)
        tiny_tokenizer(5).save_pretrained(root / name)
    prompts = ("abc dead beef cafe", "bad fade", "face", "dab abed fee")
    (root / "prompts.jsonl").write_text("\n".join(json.dumps({"turns": [each]}) for each in prompts))
    return root


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with command_in_process():
        yield


def options(folder: Path, *more: str) -> list[str]:
    pair = ("--target", str(folder / "target"), "--draft", str(folder / "draft"), "--dtype", "float64")
    return ["bench", *pair, "--prompts", str(folder / "prompts.jsonl"), "--max-new-tokens", "12", "--runs", "1", *more]


def by_name(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {method["name"]: method for method in figures["methods"]}


def test_every_combination_is_measured_and_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "BENCH", METHODS)
    monkeypatch.setattr(measurement, "TRIAL_TOKENS", 4)
    markdown = tmp_path / "tables.md"
    grid = ("--batch-size", "1", "2", "--temperature", "0", "0.8")
    assert main(options(folder, *grid, "--json-folder", str(tmp_path), "--markdown", str(markdown))) == 0
    files = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert files.keys() == {
        f"bench-cost1-temperature{temperature}-batch{batch}" for temperature in ("0", "0.8") for batch in (1, 2)
    }
    for name, figures in files.items():
        batch, methods = int(name[-1]), by_name(figures)
        assert list(methods) == [method.name for method in METHODS]
        unsupported = {name: method["error"] for name, method in methods.items() if "error" in method}
        assert unsupported.keys() == (set(TRANSFORMERS) if batch > 1 else set())
        assert all("only supported for batch_size = 1" in error for error in unsupported.values())
        assert all(method["tokens_per_second"] > 0 for name, method in methods.items() if name not in unsupported)
        assert figures["first_differences"] == 0
        assert figures["workload"]["batch_size"] == batch
        assert {"torch", "transformers", "python"} <= figures["versions"].keys()
        assert (figures["warm_up"], figures["num_runs"], figures["target_cost"]) == (WARM_UP, 1, 1.0)
        ours = [method for name, method in methods.items() if "execution" in method]
        assert len({method["num_tokens"] for method in ours}) == 1
        assert workload_table(figures) in markdown.read_text()
    assert summary_table(list(files.values())) in markdown.read_text()
    said = capsys.readouterr()
    assert "same output" in said.out and "batch 2, temperature 0.8" in said.out
    assert "measuring" in said.err


def test_a_heavier_target_gives_the_same_tokens_and_forwards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "BENCH", FEW)
    assert main(options(folder, "--target-cost", "1", "3", "--json-folder", str(tmp_path))) == 0
    light, heavy = (
        by_name(json.loads((tmp_path / f"bench-cost{cost}-temperature0-batch1.json").read_text())) for cost in (1, 3)
    )
    for name, method in light.items():
        assert heavy[name]["num_tokens"] == method["num_tokens"]


def test_a_draft_that_knows_nothing_costs_no_token_and_what_a_trained_one_does(folder: Path, tmp_path: Path) -> None:
    options_of_both = options(folder, "--temperature", "0", "0.7", "--json-folder", str(tmp_path))
    assert main([*options_of_both, "--untrained-draft"]) == 0
    for file in ("untrained-cost1-temperature0-batch1", "untrained-cost1-temperature0.7-batch1"):
        saved = json.loads((tmp_path / f"{file}.json").read_text())
        assert title(saved).startswith("untrained draft, batch 1")
        methods = by_name(saved)
        assert list(methods) == ["generate", "engine", "pearl", "pearl, no lookup"]
        assert saved["first_differences"] == 0
        assert methods["pearl, no lookup"]["mean_accepted_tokens"] < 1.3
    known = AutoModelForCausalLM.from_pretrained(folder / "draft", dtype=torch.float64)
    unknown = untrained(known)
    assert (unknown.dtype, unknown.num_parameters()) == (known.dtype, known.num_parameters())
    assert not torch.equal(unknown.get_input_embeddings().weight, known.get_input_embeddings().weight)


def test_no_speed_is_shown_of_a_wrong_output(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The method still runs, and the command fails."""

    def spoilt(workload: Workload, setting: Setting, *rest: Any) -> Completion:
        done = complete(workload, setting, *rest)
        if setting.pearl is None or not setting.uses_draft:
            return done
        return done._replace(rows=((done.rows[0][0] ^ 1, *done.rows[0][1:]), *done.rows[1:]))

    monkeypatch.setattr(bench, "BENCH", FEW)
    monkeypatch.setattr(measurement, "complete", spoilt)
    assert main(options(folder, "--batch-size", "2", "--json-folder", str(tmp_path))) == 1
    figures = json.loads((tmp_path / "bench-cost1-temperature0-batch2.json").read_text())
    pearl = by_name(figures)["pearl"]
    assert pearl["tokens_per_second"] is None
    assert pearl["error"] == "wrong: 2 texts differ from those of generate"
    assert "| pearl | - | - | - | - | (wrong: 2 texts" in workload_table(figures)
    said = capsys.readouterr().out
    assert "2 of 8 completions" in said and "is a bug" in said


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[PreTrainedModel, PreTrainedModel]]:
    target = tiny_model("llama", 1, dtype=torch.float64)
    target.generation_config.eos_token_id = END_ID
    hf_pearl.enable(target)
    yield target, noisy_copy(target, 0.03, 2)
    hf_pearl.disable(target)
    hf_pearl.release(target)


def prompts_of(lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randint(8, 60, (1, length), generator=generator) for length in lengths)


def test_tokens_are_counted_to_each_rows_own_end(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """What pads a row behind its end counts for nobody; one row alone gives the same text."""
    workload = Workload(*pair, prompts_of((3, 9, 5, 17)), max_new_tokens=60, batch_size=4)
    plain, ours = (complete(workload, setting, workload.batches[0]) for setting in (Setting(), _inline(Setting(COLD))))
    lengths = [len(row) for row in plain.rows]
    assert min(lengths) < max(lengths), "every row is of the same length: nothing is tested"
    assert all(END_ID not in row[:-1] for row in plain.rows)
    assert ours.rows == plain.rows
    assert ours.stats is not None and ours.stats.generated_tokens == ours.num_tokens == sum(lengths)
    alone = replace(workload, batch_size=1)
    assert tuple(complete(alone, Setting(), batch).rows[0] for batch in alone.batches) == plain.rows


def test_a_model_that_returns_a_dict_by_default_is_measured_like_others(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(*pair, prompts_of((5,)), max_new_tokens=8)
    methods = [
        method for method in METHODS if method.name in ("generate", "assisted, dynamic", "engine", "speculative")
    ]

    def rows() -> list[tuple[tuple[int, ...], ...]]:
        return [complete(workload, method.candidates[0], workload.batches[0]).rows for method in methods]

    expected = rows()
    monkeypatch.setattr(workload.target.generation_config, "return_dict_in_generate", True)
    assert rows() == expected


def test_a_batch_is_padded_on_the_left(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    workload = Workload(*pair, prompts_of((2, 4, 3)), batch_size=2)
    assert [len(batch) for batch in workload.batches] == [2, 1]
    arguments = workload.arguments(workload.batches[0])
    assert arguments["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert arguments["input_ids"][0, 2:].tolist() == workload.prompts[0][0].tolist()


def test_a_near_tie_is_one_under_the_noise_of_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens with equal logits, and a noise that leaves them equal in row 1 alone."""
    target, prompt = tiny_model("llama", 4, dtype=torch.float32), torch.tensor([[5, 9, 17, 3]])
    with torch.no_grad():
        target.lm_head.weight[8] = target.lm_head.weight[7]

    def noise(seed: int, position: int, num_rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
        return torch.arange(vocab_size).repeat(num_rows, 1) * float(seed != request_seed(3, 1))

    monkeypatch.setattr(near_tie, "gumbel_noise", noise)
    assert [near_tie.is_near_tie(target, prompt, [7], [8], 1.0, 3, row) for row in (0, 1, 2)] == [False, True, False]


def test_methods_take_turns_and_learn_apart(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """The order rotates from call to call; every method with a draft has an engine of its own."""
    methods = [method for method in METHODS if method.name in ("generate", "speculative", "pearl")]
    workload = Workload(*pair, prompts_of((4, 6)), max_new_tokens=6)
    calls, num_engines = [], []

    def advance(name: str) -> None:
        calls.append(name)
        num_engines.append(len(engines_of(workload.target)))

    result = measure(workload, methods, 2, advance)
    assert calls[-12:] == [
        *("generate", "speculative", "pearl"),
        *("speculative", "pearl", "generate"),
        *("pearl", "generate", "speculative"),
        *("generate", "speculative", "pearl"),
    ]
    assert len(calls) == num_calls(workload, methods, 2) == 3 + 12
    assert [len(each.runs) for each in result.results] == [2, 2, 2]
    assert num_engines[-1] == num_engines[0] + 2


def test_warming_up_leaves_the_positions_that_the_models_have() -> None:
    target = tiny_model("gpt2", 1, max_position_embeddings=24)
    workload = Workload(target, noisy_copy(target, 0.03, 2), prompts_of((16,)), max_new_tokens=8)
    hf_pearl.enable(target)
    try:
        assert len(measurement.warm_up(workload, Setting()).rows[0]) == 8
        ours = Setting(PearlConfig(execution="threads"), uses_draft=True)
        assert len(measurement.warm_up(workload, ours).rows[0]) == 8
    finally:
        hf_pearl.disable(target)
        hf_pearl.release(target)


def test_warming_up_ends_where_the_draft_never_takes_part(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token of every text ends it."""
    num_calls_while_started = 0

    def counted(workload: Workload, *rest: Any) -> Completion:
        nonlocal num_calls_while_started
        num_calls_while_started += not measurement._is_starting(workload.draft)
        assert num_calls_while_started <= 20, "it waits for what does not come"
        return complete(workload, *rest)

    monkeypatch.setattr(measurement, "complete", counted)
    workload = Workload(*pair, prompts_of((5,)), max_new_tokens=8)
    ((first, *_),) = complete(workload, Setting(), workload.batches[0]).rows
    monkeypatch.setattr(workload.target.generation_config, "eos_token_id", first)
    setting = Setting(PearlConfig(execution="processes"), uses_draft=True)
    assert measurement.warm_up(replace(workload, draft=sharing_copy(pair[1])), setting).rows == ((first,),)
    assert num_calls_while_started


def test_one_line_reaches_the_process_of_the_draft(
    pair: tuple[PreTrainedModel, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[BeginCall] = []
    put = WorkerProcess.put

    def record(process: WorkerProcess, message: Message) -> int:
        begun.extend([message] if isinstance(message, BeginCall) else [])
        return put(process, message)

    monkeypatch.setattr(WorkerProcess, "put", record)
    workload = Workload(*pair, prompts_of((12,)), max_new_tokens=4)
    for config in (OneLine(execution="processes"), PearlConfig(execution="processes")):
        complete(workload, Setting(config, uses_draft=True), workload.batches[0])
    assert [begin.options.max_width for begin in begun] == [1, PearlConfig.max_draft_width]


@pytest.mark.parametrize("config", [WithoutLookup(execution="inline"), PearlConfig(execution="inline")])
def test_without_lookup_nothing_is_looked_up(
    pair: tuple[PreTrainedModel, PreTrainedModel], config: PearlConfig
) -> None:
    workload = Workload(*pair, (torch.tensor([[5, 6, 7] * 8]),), max_new_tokens=40)
    completion = complete(workload, Setting(config, uses_draft=True), workload.batches[0])
    assert completion.stats is not None
    num_verified = completion.stats.verified_draft_tokens - completion.stats.drafted_tokens
    assert (num_verified > 0) == (type(config) is PearlConfig)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        pytest.param(["--suite", "cache", "--runs", "2"], "is an option of --suite generation", id="foreign"),
        pytest.param(["--markdown", "/proc/no-file"], "cannot be written to, got '/proc/no-file'", id="unwritable"),
        pytest.param(["--plot", "plot.svg"], "must end in .png, got 'plot.svg'", id="picture"),
        pytest.param(["--steps", "3"], "--steps is an option of --suite cache", id="foreign-to-default"),
        pytest.param(["--batch-size", "3"], "--batch-size 3: 4 prompts", id="batch"),
        pytest.param(["--batch-size", "0"], "must be a positive integer, got '0'", id="no-batch"),
        pytest.param(["--target-cost", "0.5"], "must be a number from 1, got '0.5'", id="lighter"),
        pytest.param(["--json-folder", "no/such/folder"], "must be a folder that exists", id="folder"),
        pytest.param(["--json-folder", "/proc"], "cannot be written to, got '/proc'", id="unwritable-folder"),
        pytest.param(["--temperature", "0.7", "0", "0.70"], "--temperature: each value once", id="temperature-twice"),
        pytest.param(["--target-cost", "3", "3.0000001"], "six digits; got 3 twice", id="nearly-one-cost"),
        pytest.param(["--batch-size", "2", "2"], "--batch-size: each value once", id="batch-twice"),
        pytest.param(["--temperature", "0", "-1"], "must be a number from 0, got '-1'", id="cold"),
        pytest.param(["--plot", "plot.png"], "--plot plot.png: a plot needs matplotlib", id="plot"),
    ],
)
def test_a_wrong_option_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    monkeypatch.setattr(bench, "is_matplotlib_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(options(folder, *more))
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_figures_are_written_in_one_move(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    write_json(file, {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"new": float("nan")})
    assert json.loads(file.read_text()) == {"old": 1}
    held = file.open()  # Who reads the old ones goes on to do so.
    write_json(file, {"new": 2})
    assert (json.loads(file.read_text()), json.load(held)) == ({"new": 2}, {"old": 1})
    held.close()
    assert list(tmp_path.iterdir()) == [file]
    write_json(Path("/dev/stdout"), {"shown": 3})
    assert json.loads(capfd.readouterr().out) == {"shown": 3}


def test_an_interrupted_sampling_suite_leaves_the_old_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sampling.json"
    file.write_text("old")

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling_suite, "load_demo_pair", lambda device: interrupted())
    monkeypatch.setattr(sys, "argv", ["sampling_suite", "--json", str(file)])
    with pytest.raises(KeyboardInterrupt):
        sampling_suite.main()
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    "more",
    [("cache", "--runs", "3"), ("cache", "--batch-size", "1"), ("h200", "--steps", "20"), ("generation", "--quick")],
)
def test_an_option_of_another_suite_is_refused_also_where_it_changes_nothing(
    capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--suite", *more])
    assert stop.value.code == 2
    assert f"{more[1]} is an option of --suite" in " ".join(capsys.readouterr().err.split())


def test_a_target_that_cannot_be_heavier_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("gpt2", 1).save_pretrained(tmp_path)
    tiny_tokenizer(5).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        main(["bench", "--target", str(tmp_path), *options(folder, "--target-cost", "2")[3:]])
    assert "--target-cost 2: GPT2LMHeadModel cannot be made heavier" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("cost", ["1000", "100.5"])
def test_a_cost_that_cannot_be_is_refused_before_another_is_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cost: str
) -> None:
    monkeypatch.setattr(bench, "measure_with_progress", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(SystemExit):
        main(options(folder, "--target-cost", "1", cost))
    assert f"--target-cost {cost}: `times` must be a number from 1 to 100" in " ".join(capsys.readouterr().err.split())


def saved(rates: dict[str, float | None], batch_size: int, cost: float = 1.0) -> dict[str, Any]:
    """Figures with these tokens per second."""
    done = {"mean_accepted_tokens": 2.5, "setting": {"num_threads": 2, "draft_length": 4}}
    methods = [
        {"name": name, "tokens_per_second": rate}
        | ({"error": "no"} if rate is None else {"runs": [0.9 * rate, rate], **done})
        for name, rate in rates.items()
    ]
    return {"methods": methods, "workload": {"batch_size": batch_size, "temperature": 0.0}, "target_cost": cost}


SLOW = {"generate": 100.0, "pearl": 50.0, "prompt lookup": None}
FAST = {"generate": 100.0, "pearl": 200.0, "pearl, one line": 150.0}


def test_a_slowdown_is_shown_like_a_speedup() -> None:
    assert summary_table([saved(FAST, 1, cost=3.0), saved(SLOW, 4)]).splitlines() == [
        "| method | batch 4, greedy | 3x target, batch 1, greedy |",
        "|---|--:|--:|",
        "| generate | 1.00 | 1.00 |",
        "| pearl | 0.50 | 2.00 |",
        "| prompt lookup | - | - |",
        "| pearl, one line | - | 1.50 |",
    ]
    assert workload_table(saved(SLOW, 4)).splitlines()[2:] == [
        "| generate | 100 | 1.00 | 0.90 to 1.00 | 2.50 | 2 threads, 4 tokens |",
        "| pearl | 50 | 0.50 | 0.45 to 0.50 | 2.50 | 2 threads, 4 tokens |",
        "| prompt lookup | - | - | - | - | (no) |",
    ]


@pytest.mark.skipif(not plot.is_matplotlib_available(), reason="the optional extra `plot` is not installed")
def test_a_plot_shows_every_workload(tmp_path: Path) -> None:
    """In a process of its own: matplotlib keeps its fonts open."""
    files = [tmp_path / "fast.json", tmp_path / "slow.json"]
    for file, figures in zip(files, (saved(FAST, 1), saved(SLOW, 4)), strict=True):
        file.write_text(json.dumps(figures))
    command = [sys.executable, "-m", "hf_pearl.benchmark.plot", tmp_path / "plot.png", *files]
    subprocess.run(command, check=True, timeout=120)
    picture = (tmp_path / "plot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))
    assert width > 2 * height, "two workloads stand side by side"


def test_without_matplotlib_a_plot_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "is_matplotlib_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "hf-pearl\[plot\]"'):
        plot.plot([saved(FAST, 1)], tmp_path / "plot.png")


def test_tables_are_written_between_their_marks(tmp_path: Path) -> None:
    for name, figures in {"a-1": saved(FAST, 1), "a-4": saved(SLOW, 4)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    both = [saved(SLOW, 4), saved(FAST, 1)]
    marks = "before\n\n<!-- {}: {} -->\n\n{}\n\n<!-- end -->\n\nbehind\n"
    tables = {
        ("speed-ups", "a-*.json"): summary_table(both),
        ("main speed-ups", "a-*.json"): summary_table(both, is_main=True),
        ("tables", "a-1.json"): f"## Batch 1, greedy\n\n{workload_table(saved(FAST, 1))}",
    }
    assert len(set(tables.values())) == 3
    old = "".join(marks.format(*mark, "| old |\n\n| older |") for mark in tables)
    assert filled_in(old, tmp_path) == "".join(marks.format(*mark, table) for mark, table in tables.items())
    with pytest.raises(FileNotFoundError, match=r"no saved measurement is called b\.json"):
        filled_in(marks.format("tables", "b.json", ""), tmp_path)
