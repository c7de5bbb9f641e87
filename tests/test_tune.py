"""`hf_pearl.tune` and `python -m hf_pearl tune`: what they conclude, what they leave behind, and what they refuse."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    command_in_process,
    enabled_for_tiny_models,
    make_draft,
    noisy_copy,
    own_random_state,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig, SimulatedTimes, Tuning
from hf_pearl.__main__ import main
from hf_pearl.benchmark import Method, Setting, Workload, measurement
from hf_pearl.benchmark.completion import Completion, complete
from hf_pearl.decoding.policy import Pace
from hf_pearl.enabling import enable_pair
from hf_pearl.engine import PearlEngine
from hf_pearl.registry import engine_for, engines_of
from hf_pearl.tuning import Way, run
from hf_pearl.tuning.forward_times import SIZES, measured_forward_times

METHODS = run._methods
NAMES = ["generate", "engine", "default", "lockstep", "in turns", "in a thread"]


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with command_in_process(), enabled_for_tiny_models():
        hf_pearl.disable()
        yield


def set_methods(monkeypatch: pytest.MonkeyPatch, config: PearlConfig) -> None:
    """Let `tune` measure `generate`, the engine, and `config` as the default."""

    def methods(draft: PreTrainedModel) -> tuple[Method, ...]:
        plain, engine, default = METHODS(draft)[:3]
        return plain, engine, replace(default, candidates=(Setting(config, uses_draft=True),))

    monkeypatch.setattr(run, "_methods", methods)


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """A default in this process, since a worker takes seconds to start; its draft length depends on no times."""
    set_methods(monkeypatch, PearlConfig(execution="inline", draft_length=3, prefix_cache=False))


def pair(seed: int = 1) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target and a draft that is often right."""
    target = tiny_model("llama", seed)
    return target, noisy_copy(target, 0.03, seed)


def prompts(*lengths: int) -> list[list[int]]:
    chance = random.Random(0)
    return [[chance.randrange(1, 64) for _ in range(length)] for length in lengths]


def way(name: str, *rates: float, **fields: Any) -> Way:
    is_plain, is_engine = name == "generate", name == "engine"
    config = None if is_plain else PearlConfig(draft_length=4) if name == "lockstep" else PearlConfig()
    return Way(name, config, not is_plain and not is_engine, rates, **{"mean_accepted_tokens": 1.0, **fields})


def tuning(*ways: Way, **fields: Any) -> Tuning:
    """One with plain rates of 10; other ways are put beside those that must be there."""
    given = {each.name: each for each in ways}
    usual = [way("generate", 9.0, 10.0, 11.0), way("engine", 9.0, 10.0, 11.0), way("default", 9.0, 10.0, 11.0)]
    merged = {each.name: each for each in usual} | given
    figures = {
        "acceptance_rate": 0.71,
        "draft_step_seconds": 0.001,
        "target_forward_seconds": 0.008,
        "simulated": SimulatedTimes(10.0, 5.0, 4, 4.0, 8, 3.2, 2.5),
        "num_prompts": 3,
        "max_new_tokens": 77,
        "batch_size": 1,
        "temperature": 0.0,
        "num_texts": 42,
        "num_first_differences": 0,
        "num_near_ties": 0,
    }
    return Tuning(tuple(merged.values()), **{**figures, **fields})


def test_the_target_of_a_launched_pair_is_measured_like_any_other(few_methods: None) -> None:
    target, draft = pair()
    enable_pair(target, draft)  # as `launch` does: PEARL with this draft is its default
    found = hf_pearl.tune(target, draft, prompts(5, 9), max_new_tokens=24)
    assert found.way("generate").mean_accepted_tokens == 1.0
    assert found.way("engine").drafted == 0.0 < found.way("default").drafted
    output = target.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, return_dict_in_generate=True)
    assert output.pearl.target_forwards == 2


def test_plain_generate_is_plain_of_a_launched_pair_too(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = pair()
    enable_pair(target, draft)
    prompt = (torch.tensor([[1, 2, 3]]),)
    monkeypatch.setattr(PearlEngine, "decode", None)
    complete(Workload(target, draft, prompt, 4), Setting(), prompt)
    with pytest.raises(TypeError):  # It is PEARL that fails now.
        target.generate(prompt[0], max_new_tokens=4)


def test_every_figure_of_a_real_run_is_there(few_methods: None, capsys: pytest.CaptureFixture[str]) -> None:
    target, draft = pair()
    found = hf_pearl.tune(target, draft, prompts(5, 9), max_new_tokens=24)
    assert capsys.readouterr().out == f"{found}\n"
    assert [each.name for each in found.ways] == NAMES[:3]
    assert all(len(each.rates) == run.NUM_RUNS and min(each.rates) > 0.0 for each in found.ways)
    assert (found.num_prompts, found.max_new_tokens, found.num_texts, found.num_first_differences) == (2, 24, 12, 0)
    assert 0.2 < found.acceptance_rate < 1.0
    default = found.way("default")
    assert default.mean_accepted_tokens > 1.0 == found.way("generate").mean_accepted_tokens
    assert 0.1 < default.drafted < 1.0
    assert found.way("engine").drafted == 0.0
    assert 0.0 < found.draft_step_seconds < 1.0
    assert 0.0 < found.target_forward_seconds < 1.0
    assert found.bound > 1.0


def test_a_draft_with_a_smaller_vocabulary_is_measured_to_the_end(few_methods: None) -> None:
    target, _ = pair()
    found = hf_pearl.tune(target, noisy_copy(target, 0.03, 1, vocab_size=48), prompts(5, 9), max_new_tokens=12)
    assert 0.0 < found.acceptance_rate < 1.0 and found.num_first_differences == 0


@pytest.mark.parametrize("repeats_itself", [False, True])
def test_an_untrained_draft_does_not_pay(monkeypatch: pytest.MonkeyPatch, repeats_itself: bool) -> None:
    """Even where a forward yields many tokens: they are looked up."""
    set_methods(monkeypatch, PearlConfig(execution="inline", prefix_cache=False))
    target = tiny_model("llama", 1)
    if repeats_itself:
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.mul_(1.0 if parameter.ndim == 1 else 0.04)
    found = hf_pearl.tune(target, make_draft(target, "unrelated", 2), prompts(5, 9), max_new_tokens=40)
    default = found.way("default")
    assert default.mean_accepted_tokens > 1.0 or not repeats_itself
    assert found.acceptance_rate < 0.1
    assert default.drafted < 0.1
    assert not found.pays
    assert "The draft does not pay" in str(found)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_gives_the_right_texts(few_methods: None, temperature: float) -> None:
    found = hf_pearl.tune(*pair(), prompts(5, 9, 3, 7), 12, batch_size=2, temperature=temperature, seed=3)
    assert (found.batch_size, found.temperature) == (2, temperature)
    assert found.num_texts == (12 if temperature else 24)
    assert found.num_first_differences == 0


def test_prompts_may_be_lists_or_tensors(few_methods: None) -> None:
    target, draft = pair()
    ids = prompts(6)[0]
    for prompt in (tuple(ids), torch.tensor(ids), torch.tensor([ids])):
        assert hf_pearl.tune(target, draft, [prompt], 4).num_texts == 6
    assert hf_pearl.tune(target, draft, torch.tensor([ids, ids]), 4).num_texts == 12


def test_what_is_measured_can_be_set_by_a_user() -> None:
    methods = METHODS(pair()[1])
    assert [method.name for method in methods] == NAMES
    settings = [setting for method in methods for setting in method.candidates]
    assert {type(setting.pearl) for setting in settings} == {PearlConfig, type(None)}
    assert {setting.pearl.prefix_cache for setting in settings if setting.pearl} == {False}
    assert not any(setting.num_threads or setting.assistant or setting.arguments for setting in settings)
    assert not any(method.tries_threads for method in methods)
    assert [method.name for method in methods if method.runs_on_pair] == ["default"]


def test_everything_is_left_as_it_was_and_the_pair_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    set_methods(monkeypatch, PearlConfig(execution="inline", prefix_cache=False))
    target, draft = pair()
    num_threads = torch.get_num_threads()
    with own_random_state(5):
        state = torch.get_rng_state()
        hf_pearl.tune(target, draft, prompts(5), 16)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == num_threads
    assert "generate" not in vars(target)
    assert engines_of(draft) == [engine_for(target, draft)]
    assert len(engines_of(target)) == 2, "beside the pair's, only the target's own without a draft"
    learnt = engine_for(target, draft).learnt
    assert learnt.paces[False].worth_verifying_above(1) != Pace().worth_verifying_above(1), "forwards were learnt"
    hf_pearl.enable(target)
    hf_pearl.tune(target, draft, prompts(5), 4)
    assert "generate" in vars(target)
    assert engine_for(target, draft).learnt is learnt


LOCKSTEP = PearlConfig(draft_length=2, execution="threads", prefix_cache=False)


@pytest.fixture
def two_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `few_methods`, and `lockstep`, which has a draft of its own."""

    def methods(draft: PreTrainedModel) -> tuple[Method, ...]:
        plain, engine, default, lockstep = METHODS(draft)[:4]
        candidates = (Setting(LOCKSTEP, uses_draft=True),)
        return plain, engine, replace(default, candidates=candidates), replace(lockstep, candidates=candidates)

    monkeypatch.setattr(run, "_methods", methods)


def test_an_interrupt_leaves_everything_usable(two_drafts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = pair()
    complete = measurement.complete
    num_engines: list[int] = []

    def interrupted(*args: Any) -> Completion:
        num_engines.append(len(engines_of(target)))
        if len(num_engines) == 10:
            raise KeyboardInterrupt
        return complete(*args)

    monkeypatch.setattr(measurement, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        hf_pearl.tune(target, draft, prompts(5), 16)
    assert caught.tb is not None, "the traceback keeps the other draft alive, as in an interactive session"
    assert num_engines[-1] == 3
    assert len(engines_of(target)) == 2
    assert "generate" not in vars(target)
    inputs = torch.tensor(prompts(5))
    expected = target.generate(inputs, max_new_tokens=16, do_sample=False)
    hf_pearl.enable(target)
    config = PearlConfig(execution="inline")
    output = target.generate(inputs, max_new_tokens=16, do_sample=False, assistant_model=draft, pearl=config)
    assert torch.equal(output, expected)


def test_what_is_advised_keeps_the_prefix_cache(two_drafts: None) -> None:
    """It is measured without, since prompts are mostly new."""
    found = hf_pearl.tune(*pair(), prompts(5), 8)
    assert found.way("lockstep").pearl == replace(LOCKSTEP, prefix_cache=True)


def test_longer_forwards_are_measured_too() -> None:
    """The context ends where there is room for the largest window, or with its first token."""
    target = tiny_model("gpt2", 1, max_position_embeddings=12)
    for length in (1, 5, 12):
        times = measured_forward_times(target, prompts(length)[0])
        assert times.seconds(1) > 0.0
        assert times.seconds(max(SIZES)) >= times.seconds(1)


@pytest.mark.parametrize(
    ("ways", "best", "best_with_draft", "pays"),
    [
        pytest.param([], "generate", "default", False, id="all-equal"),
        pytest.param([way("default", 20, 21, 22, drafted=0.5)], "default", "default", True, id="default"),
        pytest.param([way("default", 10.9, 21, 22, drafted=0.5)], "generate", "default", False, id="not-in-every-run"),
        pytest.param([way("default", 20, 21, 22, drafted=0.02)], "default", "default", False, id="looked-up"),
        pytest.param([way("engine", 12, 13, 14)], "engine", "default", False, id="without-a-draft"),
        pytest.param(
            [way("engine", 12, 13, 14), way("default", 13, 14, 15, drafted=0.5)],
            "engine",
            "default",
            False,
            id="not-faster-than-without",
        ),
        pytest.param(
            [way("default", 20, 21, 22, drafted=0.5), way("lockstep", 21, 23, 24, drafted=0.5)],
            "default",
            "default",
            True,
            id="default-where-none-is-clearly-faster",
        ),
        pytest.param(
            [way("default", 20, 21, 22, drafted=0.5), way("lockstep", 23, 24, 25, drafted=0.5)],
            "lockstep",
            "lockstep",
            True,
            id="lockstep",
        ),
        pytest.param(
            [way("default", 20, 21, 22, drafted=0.5), way("lockstep", 23, 24, 25, drafted=0.5, error="wrong: 1 text")],
            "default",
            "default",
            True,
            id="wrong-output",
        ),
    ],
)
def test_the_simplest_way_wins_unless_another_is_clearly_faster(
    ways: list[Way], best: str, best_with_draft: str, pays: bool
) -> None:
    found = tuning(*ways)
    assert (found.best.name, found.best_with_draft.name, found.pays) == (best, best_with_draft, pays)
    assert found.config == found.way(best_with_draft).pearl
    assert found.speedup == found.way(best_with_draft).tokens_per_second / 10.0
    assert f"    {found.best.call}\n" in str(found)
    assert ("Use PEARL: expect" in str(found)) == pays


def test_the_report_says_what_the_fields_say() -> None:
    fast = way("lockstep", 24.0, 24.3, 25.0, mean_accepted_tokens=3.21, drafted=0.5)
    report = str(tuning(fast))
    assert "expect 2.43 times the speed" in report
    assert "    target.generate(**inputs, assistant_model=draft, pearl=hf_pearl.PearlConfig(draft_length=4))" in report
    row = next(line for line in report.splitlines() if line.startswith("lockstep"))
    assert row.split()[1:7] == ["24.3", "2.43", "2.40", "to", "2.50", "3.21"]
    for said in ("3 prompts, 1 per call, up to 77 new tokens, greedy", "71% of the time", "1.00 ms", "8.00 ms"):
        assert said in report
    assert "PEARL would be 3.12 times as fast" in report
    assert "alone would allow 4.00" in report
    assert "All 42 texts are `generate`'s own." in report
    assert "temperature 0.7" in str(tuning(temperature=0.7))
    assert "All 42 texts are our engine's" in str(tuning(temperature=0.7))
    assert repr(tuning(fast)).startswith("Tuning(pays=True, config=PearlConfig(draft_length=4, ")


def test_a_wrong_output_is_shown_without_a_speed() -> None:
    report = str(tuning(way("default", 20, 21, 22, error="wrong: 1 texts"), num_first_differences=3, num_near_ties=2))
    assert "(wrong: 1 texts)" in report
    assert "3 of 42 texts part" in report
    assert "please report it" in report
    assert "please report it" not in str(tuning(num_first_differences=3, num_near_ties=3))
    assert "times the speed" not in report
    assert "With the draft PEARL is not right here (wrong: 1 texts)" in report


def test_settings_with_a_wrong_output_are_advised_nowhere() -> None:
    found = tuning(way("default", 20, 21, 22, error="wrong: 1 texts"), way("lockstep", 8, 9, 10, drafted=0.5))
    assert found.best_with_draft.name == "lockstep"
    assert (found.speedup, found.config.draft_length) == (0.9, 4)
    assert "with it, PEARL has 0.90 times the speed" in str(found)


@pytest.mark.parametrize(
    ("times", "draft_step", "said"),
    [
        pytest.param(SimulatedTimes(10, 9.9, 1, 9.9, 1, 9.9, 9.5), 0.001, "too seldom right", id="guesses"),
        pytest.param(SimulatedTimes(10, 9.9, 1, 9.9, 1, 9.9, 2.0), 0.006, "a step takes 75% of", id="too-slow"),
        pytest.param(
            SimulatedTimes(10, 8.0, 1, 5.0, 1, 4.0, 2.0), 0.001, "guesses alone could give 2.00", id="machine"
        ),
    ],
)
def test_a_draft_that_does_not_pay_is_told_why(times: SimulatedTimes, draft_step: float, said: str) -> None:
    found = tuning(simulated=times, draft_step_seconds=draft_step)
    assert not found.pays
    assert said in str(found)
    paying = tuning(way("default", 20, 21, 22, drafted=0.5), simulated=times, draft_step_seconds=draft_step)
    assert said not in str(paying)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        pytest.param({"prompts": []}, ValueError, "`prompts` must hold at least one", id="no-prompt"),
        pytest.param({"prompts": [[5], []]}, ValueError, r"`prompts\[1\]` must have at least one token", id="empty"),
        pytest.param({"prompts": "abc"}, TypeError, "tokenizer", id="text"),
        pytest.param({"prompts": ["abc"]}, TypeError, "tokenizer", id="texts"),
        pytest.param({"prompts": {"input_ids": [[5]]}}, TypeError, "`prompts` .* got dict", id="dict"),
        pytest.param({"prompts": 5}, TypeError, "`prompts` .* got int", id="no-sequence"),
        pytest.param({"prompts": [[5.0]]}, TypeError, r"`prompts\[0\]` .* 5.0", id="floats"),
        pytest.param({"prompts": [[True]]}, TypeError, "True", id="bools"),
        pytest.param({"prompts": [torch.zeros(2, 3, dtype=torch.long)]}, TypeError, r"\(2, 3\)", id="two-rows"),
        pytest.param({"prompts": [torch.zeros(3)]}, TypeError, "torch.float32", id="float-tensor"),
        pytest.param({"prompts": [[5, 64]]}, ValueError, "token 64; .* below 64", id="unknown-token"),
        pytest.param({"prompts": [[5, -1]]}, ValueError, "token -1", id="negative-token"),
        pytest.param({"prompts": [[5] * 509]}, ValueError, "512 positions of `target`", id="too-long"),
        pytest.param({"max_new_tokens": 0}, ValueError, "`max_new_tokens` .* got 0", id="no-new-token"),
        pytest.param({"max_new_tokens": 2.0}, TypeError, "`max_new_tokens` .* 2.0", id="half-tokens"),
        pytest.param({"batch_size": 0}, ValueError, "`batch_size` .* got 0", id="no-row"),
        pytest.param({"batch_size": 2}, ValueError, "`batch_size` must divide .* 2 for 1", id="no-whole-batch"),
        pytest.param({"temperature": -1.0}, ValueError, "`temperature` .* got -1.0", id="cold"),
        pytest.param({"temperature": 1e-40}, ValueError, "`temperature` .* at least 1e-06 .* got 1e-40", id="nearly-0"),
        pytest.param({"temperature": float("nan")}, ValueError, "`temperature` .* got nan", id="nan"),
        pytest.param({"temperature": "hot"}, TypeError, "`temperature` .* 'hot'", id="hot"),
        pytest.param({"seed": -1}, ValueError, "`seed` .* got -1", id="seed"),
        pytest.param({"target": "gpt2"}, TypeError, "`target` .* got str", id="target-name"),
        pytest.param({"draft": None}, TypeError, "`draft` .* got NoneType", id="no-draft"),
        pytest.param({"draft": torch.nn.Linear(2, 2)}, TypeError, "`draft` .* got Linear", id="no-language-model"),
    ],
)
def test_bad_arguments_are_refused_by_name_before_any_work(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    target, draft = pair()
    monkeypatch.setattr(run, "measure_with_progress", lambda *args: pytest.fail("work has begun"))
    arguments = {"target": target, "draft": draft, "prompts": [[5, 6]], "max_new_tokens": 4, **given}
    with pytest.raises(error, match=said):
        hf_pearl.tune(**arguments)
    assert engines_of(target) == []


def test_models_that_cannot_be_a_pair_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_with_progress", lambda *args: pytest.fail("work has begun"))
    target, draft = pair()
    with pytest.raises(ValueError, match=r"which has 64 tokens; got one of 2000\."):
        hf_pearl.tune(target, tiny_model("llama", 2, vocab_size=2000), [[5]])
    with pytest.raises(ValueError, match="12 positions of `draft`"):
        hf_pearl.tune(target, tiny_model("llama", 2, max_position_embeddings=12), [[5]], 12)
    sizes = {"d_model": 8, "num_layers": 1, "num_heads": 1, "vocab_size": 64, "decoder_start_token_id": 0}
    two_parts = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes))
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        hf_pearl.tune(target, two_parts, [[5]])
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        hf_pearl.tune(two_parts, draft, [[5]])


@pytest.fixture
def saved(tmp_path: Path) -> list[str]:
    """The command with a saved pair and three prompts."""
    for name, model in zip(("target", "draft"), pair(), strict=True):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer(5).save_pretrained(tmp_path / name)
    texts = ("abc dead beef cafe", "bad fade", "dab abed fee")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"turns": [text]}) for text in texts))
    models = ("--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--dtype", "float64")
    return ["tune", *models, "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12"]


def test_the_command_prints_the_report(few_methods: None, saved: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*saved, "--batch-size", "3", "--temperature", "0.5"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("target: ")
    assert "Measured on 3 prompts, 3 per call, up to 12 new tokens, temperature 0.5." in said.out
    assert "target.generate(**inputs" in said.out
    assert "measuring" in said.err


@pytest.mark.parametrize("command", ["tune", "demo", "bench"])
def test_the_commands_refuse_a_draft_that_cannot_be_one_in_a_line(
    saved: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    tiny_model("llama", 2, vocab_size=2000).save_pretrained(tmp_path / "draft")
    with pytest.raises(SystemExit) as stop:
        main([command, *saved[1:]])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"--draft {tmp_path / 'draft'}: `draft` must have the vocabulary of `target`, which has 64 tokens" in line


def test_the_command_refuses_a_batch_that_is_not_whole(saved: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*saved, "--batch-size", "2"])
    assert "--batch-size 2: 3 prompts" in capsys.readouterr().err
