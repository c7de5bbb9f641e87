"""`python -m hf_pearl demo`: the figures, the table, the streamed text, and what it says to wrong options."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from models import command_in_process, noisy_copy, tiny_model, tiny_tokenizer

import hf_pearl
from hf_pearl import pair
from hf_pearl.__main__ import main
from hf_pearl.benchmark import DEMO, Workload, complete, first_difference, is_near_tie
from hf_pearl.benchmark.methods import SEQUENTIAL, Setting
from hf_pearl.benchmark.near_tie import WINDOWS, window_logits
from hf_pearl.commands.command_line import add_workload_options, load_prompts, read_prompts
from hf_pearl.streaming import DRAFTED, PLAIN, VerifiedStreamer

TIMEOUT = 240.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
METHODS = ("generate", "assisted", "engine", "speculative", "pearl")
SMALL = ("--runs", "2", "--max-new-tokens", "12", "--dtype", "float64")
PROMPT = "abc dead beef cafe"


class Folders(NamedTuple):
    """A saved pair, a draft of another vocabulary, and a file of prompts."""

    target: Path
    draft: Path
    stranger: Path
    prompts: Path

    def options(self, *more: str) -> list[str]:
        """The command with this pair."""
        return ["demo", "--target", str(self.target), "--draft", str(self.draft), *more]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("models")
    found = Folders(root / "target", root / "draft", root / "stranger", root / "prompts.jsonl")
    target = tiny_model("llama", 1, dtype=torch.float32)
    models = {
        found.target: target,
        found.draft: noisy_copy(target, 0.03, 2),
        found.stranger: noisy_copy(target, 1.0, 3),
    }
    for folder, model in models.items():
        model.save_pretrained(folder)
        tiny_tokenizer(7 if folder == found.stranger else 5).save_pretrained(folder)
    lines = [{"question_id": i, "turns": [text, "unused"]} for i, text in enumerate((PROMPT, "bad fade", "face"))]
    found.prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return found


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with command_in_process():
        yield


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a printed table's lines, by method."""
    lines = [line.split() for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0] in METHODS and len(line) > 5}


def run_as_module(options: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_pearl", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=ENVIRONMENT)


def test_the_module_prints_a_table_and_writes_the_same_figures(folders: Folders, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run_as_module(folders.options("--prompts", str(folders.prompts), *SMALL, "--json", str(file)))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    methods = {method["name"]: method for method in figures["methods"]}
    rows = rows_of(done.stdout)
    assert tuple(methods) == tuple(rows) == METHODS == tuple(method.name for method in DEMO)
    for name, method in methods.items():
        assert rows[name][0] == f"{method['tokens_per_second']:.1f}"
        assert rows[name][2] == f"{method['mean_accepted_tokens']:.2f}"
        assert method["num_tokens"] == 2 * 3 * 12
        assert len(method["runs"]) == figures["num_runs"] == 2
    assert methods["generate"]["target_forwards_per_token"] == methods["engine"]["target_forwards_per_token"] == 1.0
    assert methods["speculative"]["target_forwards_per_token"] < 1.0 < methods["speculative"]["mean_accepted_tokens"]
    assert methods["assisted"]["target_forwards_per_token"] < 1.0 < methods["assisted"]["mean_accepted_tokens"]
    assert methods["speculative"]["overlap"] == 0.0
    rate = methods["pearl"]["tokens_per_second"]
    assert figures["speedup_over_generate"] == pytest.approx(rate / methods["generate"]["tokens_per_second"])
    assert figures["speedup_over_assisted"] == pytest.approx(rate / methods["assisted"]["tokens_per_second"])
    assert figures["mean_accepted_tokens"] == methods["pearl"]["mean_accepted_tokens"] >= 1.0
    assert figures["same_output"] is True
    assert figures["first_differences"] == 0
    assert "same output" in done.stdout
    assert figures["workload"]["prompt_tokens"] == [
        len(tiny_tokenizer(5)(text).input_ids) for text in (PROMPT, "bad fade", "face")
    ]
    assert {"torch", "transformers", "python"} <= figures["versions"].keys()
    assert figures["machine"]["num_cores"] >= 1
    assert figures["warm_up"]
    assert "measuring" in done.stderr


def test_sampling_gives_one_output_with_and_without_draft(folders: Folders, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sampled = ("--temperature", "0.8", "--seed", "3", "--json", str(file))
    assert main(folders.options("--prompt", PROMPT, *SMALL, *sampled)) == 0
    figures = json.loads(file.read_text())
    assert figures["same_output"] is True
    assert figures["workload"]["temperature"] == 0.8
    assert figures["workload"]["seed"] == 3


def test_only_so_many_prompts_are_taken_evenly_spread(folders: Folders) -> None:
    parser = argparse.ArgumentParser()
    add_workload_options(parser)
    few = parser.parse_args(["--prompts", str(folders.prompts), "--num-prompts", "2"])
    assert load_prompts(few) == [PROMPT, "bad fade"]
    assert load_prompts(parser.parse_args(["--prompts", str(folders.prompts)])) == [PROMPT, "bad fade", "face"]
    embedded = load_prompts(parser.parse_args(["--num-prompts", "5"]))
    assert len(set(embedded)) == 5
    assert all("def " in prompt for prompt in embedded)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(["--runs", "0"], "--runs: must be a positive integer, got '0'", id="no-run"),
        pytest.param(["--max-new-tokens", "many"], "must be a positive integer, got 'many'", id="no-number"),
        pytest.param(["--temperature", "-1"], "must be a number from 0, got '-1'", id="cold"),
        pytest.param(["--temperature", "nan"], "must be a number from 0, got 'nan'", id="nan"),
        pytest.param(["--temperature", "1e-40"], "must be 0 (greedy) or at least 1e-06, got '1e-40'", id="nearly-0"),
        pytest.param(["--num-prompts", "4"], "--num-prompts 4: --prompt is one", id="one-prompt"),
        pytest.param(["--seed", "-3"], "must be an integer from 0", id="negative-seed"),
        pytest.param(["--dtype", "int8"], "--dtype", id="dtype"),
        pytest.param(["--device", "abacus"], "--device abacus", id="device"),
        pytest.param(["--json", "no/such/folder/file"], "folder that exists", id="json"),
        pytest.param(["--prompt", "a", "--prompts", "b"], "not allowed with", id="two-sources"),
        pytest.param(["--prompts", "no/such.jsonl"], "--prompts no/such.jsonl", id="no-file"),
        pytest.param(["--prompt", ""], "--prompt: the tokenizer makes no token of it", id="empty-prompt"),
        pytest.param(["--max-new-tokens", "9999"], "512 positions", id="too-long"),
        pytest.param(["--target", "no/such/model"], "--target no/such/model", id="no-target"),
        pytest.param(["--draft", "no/such/model"], "--draft no/such/model", id="no-draft"),
        pytest.param(["--width", "3"], "unrecognized arguments: --width 3", id="unknown"),
    ],
)
def test_a_wrong_option_is_named(
    folders: Folders, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    prompt = [] if {"--prompt", "--prompts"} & set(options) else ["--prompt", PROMPT]
    with pytest.raises(SystemExit) as stop:
        main(folders.options(*prompt, *options))
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_target_needs_a_draft(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--target", str(folders.target)])
    assert "--target needs --draft" in capsys.readouterr().err


def test_a_draft_of_another_vocabulary_is_refused(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--target", str(folders.target), "--draft", str(folders.stranger)])
    assert "both models must share one vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        *("[]", "{}", '{"turns": []}', '{"turns": [3]}', '{"turns": [""]}', '{"turns": "abc"}', "not json"),
        pytest.param('{"turns": ["\\ud800"]}', id="half a character"),
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_a_file_of_another_form_is_refused(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["abc"]}\n' + line + "\n")
    with pytest.raises(SystemExit):
        main(folders.options("--prompts", str(file)))
    assert "line 2 is not an object with" in capsys.readouterr().err


def test_any_text_that_json_may_hold_is_a_prompt(tmp_path: Path) -> None:
    """Also behind a byte order mark, with line ends of either kind, and with other line separators within a text."""
    texts = ["def f():\u2028    return\u0085 1\x0b", "caf\u00e9\r\n"]
    lines = [json.dumps({"turns": [text]}, ensure_ascii=False) for text in texts]
    (tmp_path / "prompts.jsonl").write_bytes(("\ufeff" + "\r\n".join([*lines, "", ""])).encode())
    assert read_prompts(tmp_path / "prompts.jsonl") == texts


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def hear_interrupts() -> None:
    """A background job of a shell is started deaf to SIGINT, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to one process")
def test_an_interrupt_ends_it_in_one_line(folders: Folders) -> None:
    command = [sys.executable, "-m", "hf_pearl", *folders.options("--prompt", PROMPT, "--runs", "100000")]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=hear_interrupts,
    ) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "tokens are the draft's" in line:
                    break
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert said.rstrip().endswith("interrupted")
    assert "Traceback" not in said


def test_without_weights_the_loader_says_how_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "PACKAGED", tmp_path / "package")
    monkeypatch.setenv("HF_PEARL_HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match=r"make pair ARGS=.*--output .*home"):
        pair.load_demo_pair()


def test_the_loader_looks_into_the_cache_folder(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "PACKAGED", tmp_path / "package")
    monkeypatch.delenv("HF_PEARL_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "hf_pearl" / "pair").mkdir(parents=True)
    for part in ("target", "draft"):
        (tmp_path / "hf_pearl" / "pair" / part).symlink_to(getattr(folders, part))
    target, draft, tokenizer = pair.load_demo_pair("cpu")
    assert target.dtype == draft.dtype == torch.float32
    assert not target.training
    assert tokenizer.decode(tokenizer(PROMPT).input_ids) == PROMPT
    target, _, _ = pair.load_demo_pair("cpu", torch.float64)
    assert target.dtype == torch.float64


def test_the_streamer_marks_what_the_draft_wrote() -> None:
    tokenizer, file = tiny_tokenizer(5), io.StringIO()
    token_ids = tokenizer(PROMPT).input_ids
    streamer = VerifiedStreamer(tokenizer, file, marks=True)
    streamer.put(torch.tensor([token_ids[:2]]))
    for place, token_id in enumerate(token_ids[2:]):
        streamer.put_verified(torch.tensor([token_id]), [place % 2 == 0])
    streamer.end()
    pieces = [tokenizer.decode([token_id]) for token_id in token_ids[2:]]
    marked = [f"{DRAFTED}{piece}{PLAIN}" if place % 2 == 0 else piece for place, piece in enumerate(pieces)]
    assert file.getvalue() == "".join(marked) + "\n"
    assert (streamer.num_tokens, streamer.num_drafted) == (len(pieces), (len(pieces) + 1) // 2)


def test_the_streamer_hears_of_every_token_that_the_draft_wrote(folders: Folders) -> None:
    target, draft = (pair.load_model(folder, torch.device("cpu"), torch.float64) for folder in folders[:2])
    tokenizer, file = tiny_tokenizer(5), io.StringIO()
    streamer = VerifiedStreamer(tokenizer, file, marks=False)
    workload = Workload(target, draft, (tokenizer(PROMPT, return_tensors="pt").input_ids,), max_new_tokens=30)
    hf_pearl.enable(target)
    try:
        done = complete(workload, Setting(SEQUENTIAL, uses_draft=True), workload.batches[0], streamer)
    finally:
        hf_pearl.disable(target)
        hf_pearl.release(target)
    assert done.stats is not None
    assert 0 < streamer.num_drafted == done.stats.accepted_tokens < streamer.num_tokens == 30
    assert file.getvalue() == tokenizer.decode(done.rows[0]) + "\n"


def test_a_first_difference_is_a_near_tie_only_where_rounding_may_decide() -> None:
    target = tiny_model("llama", 4, dtype=torch.float32)
    prompt = torch.tensor([[5, 9, 17, 3]])
    expected = target.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    expected = expected[0, 4:].tolist()
    place = 6
    order = window_logits(target, torch.cat([prompt, torch.tensor([expected[:place]])], dim=1), 4, 1)[-1].argsort()
    assert order[-1] == expected[place]
    unlikely, twin = int(order[0]), int(order[1])
    with torch.no_grad():  # Now `twin` is as good as the best one, everywhere.
        target.lm_head.weight[twin] = target.lm_head.weight[expected[place]]
    assert is_near_tie(target, prompt, expected, [*expected[:place], twin, 1])
    assert not is_near_tie(target, prompt, expected, [*expected[:place], unlikely, 1])
    assert not is_near_tie(target, prompt, expected, expected[:place])
    assert first_difference(expected, expected[:place]) == place
    assert first_difference(expected, list(expected)) is None


@pytest.mark.parametrize(("length", "num_prompt_tokens", "num_rows"), [(90, 88, 65), (90, 10, 81), (20, 18, 20)])
def test_the_largest_change_is_that_of_many_tokens_wherever_the_prompt_ends(
    length: int, num_prompt_tokens: int, num_rows: int
) -> None:
    """Of a few, none may happen to change: then two tokens that rounding does exchange would seem far apart."""
    target, ids = tiny_model("llama", 4, dtype=torch.float64), torch.arange(3, 3 + length)[None] % 50
    logits = target(ids).logits[0, -num_rows:].float()
    for window in WINDOWS:
        torch.testing.assert_close(window_logits(target, ids, num_prompt_tokens, window), logits)
