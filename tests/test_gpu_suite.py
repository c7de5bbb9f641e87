"""`bench --suite h200` on the CPU with tiny models, by the same code: its time, its failures, its goals, its tables."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import command_in_process, noisy_copy, tiny_model
from strict_capture import use_twins
from transformers import PreTrainedModel

from hf_pearl import disable, enable, release
from hf_pearl.__main__ import main
from hf_pearl.benchmark import Method, Workload, complete, measurement
from hf_pearl.benchmark.fill_in import filled_in
from hf_pearl.benchmark.gpu import FULL, QUICK, Part, attention, gpu_tables, models, pairs, run_parts, steps
from hf_pearl.benchmark.gpu.goals import goals
from hf_pearl.benchmark.gpu.models import measure_model
from hf_pearl.benchmark.gpu.observing import attention_among
from hf_pearl.benchmark.gpu.parts import Attempts, failures, needed, omissions
from hf_pearl.benchmark.gpu.shapes import QWEN3, Shape, random_model, shape_step_weights, step_weights
from hf_pearl.benchmark.gpu.simulated import between, spread_over
from hf_pearl.benchmark.gpu.steps import best_line, draft_steps, random_rows
from hf_pearl.benchmark.gpu.suite import gpu_parts, measure_gpu
from hf_pearl.benchmark.measurement import measure
from hf_pearl.benchmark.methods import COLD, Setting
from hf_pearl.cache import backends, torch_kernels
from hf_pearl.commands import gpu as commands_gpu
from hf_pearl.decoding.messages import TokenTree
from hf_pearl.parallel.graphs import cuda_graphs
from hf_pearl.parallel.graphs.capture import RerunCapture

CPU = torch.device("cpu")
ALL_PARTS = [
    "copy bandwidth",
    "pair 0.6B/8B, batch 1",
    "pair 0.6B/8B, batch 8",
    "steps, 0.6B",
    "steps, 8B",
    "steps, 1.7B",
    "static cache, compiled, 8B",
    "pair 0.6B/8B, batch 32",
    "steps, 32B",
    "simulated 0.6B/8B",
    "simulated 1.7B/32B",
    "attention",
    "continuous batching, 8B",
    "static cache, compiled, 0.6B",
    "continuous batching, 0.6B",
    "steps, 0.6B, compiled",
    "steps, 8B, compiled",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command has written; it ran without a failure."""
    file = tmp_path_factory.mktemp("gpu") / "h200.json"
    with command_in_process():
        assert main(["bench", "--suite", "h200", "--quick", "--device", "cpu", "--json", str(file)]) == 0
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


@pytest.fixture
def own_process() -> Iterator[None]:
    with command_in_process():
        yield


class Time:
    """A clock that only parts move on."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def part(self, name: str, said: float, taken: float | None = None, error: Exception | None = None) -> Part:
        """A part that takes `taken` seconds, whatever it said."""

        def measure(results: Any, attempt: Attempts) -> dict[str, Any]:
            self.now += said if taken is None else taken
            if error is not None:
                raise error
            return {"before": list(results)}

        return Part(name, said, measure)


def run(time: Time, *parts: Part, seconds: float = 60.0) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """What was found, everything that was saved, and everything that was said."""
    saves: list[dict[str, Any]] = []
    said: list[str] = []
    found = run_parts(parts, seconds, lambda known: saves.append(copy.deepcopy(known)), said.append, time)
    return found, saves, said


# -- parts under a clock of the test's ------------------------------------------------------------------------------


def test_nothing_begins_that_would_end_too_late() -> None:
    time = Time()
    parts = time.part("a", 30), time.part("long", 40), time.part("b", 20, 25), time.part("c", 10), time.part("d", 5)
    found, saves, said = run(time, *parts)
    assert list(found["parts"]) == ["a", "b", "d"]
    assert time.now == 160.0
    assert found["left_out"] == {
        "long": "no time: it may take 40 s, and 30 s were left",
        "c": "no time: it may take 10 s, and 5 s were left",
    }
    assert [each["seconds"] for each in found["parts"].values()] == [30, 25, 5]
    assert said[0] == "a (60 s left)" and said[1].startswith("long: no time")
    assert [len(known["parts"]) for known in saves] == [1, 1, 2, 2, 3]


def test_a_part_that_fails_is_noted_and_the_next_ones_run() -> None:
    time = Time()
    broken = time.part("broken", 1, error=torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    found, saves, said = run(time, time.part("a", 1), broken, time.part("b", 1))
    assert found["failed"] == {"broken": "OutOfMemoryError: CUDA out of memory."}
    assert found["parts"]["b"]["before"] == ["a"]
    assert "broken" in saves[1]["failed"] and "b" not in saves[1]["parts"]
    assert said[2] == "broken: OutOfMemoryError: CUDA out of memory."


def test_a_device_that_answers_no_more_leaves_what_was_measured_and_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access, from which no call returns without an error until the process ends."""

    def refuse() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)

    def measure(results: Any, attempt: Attempts) -> dict[str, Any]:
        return {"figure": attempt("one", refuse)}

    time = Time()
    parts = time.part("a", 1), Part("b", 1.0, measure), time.part("c", 1, error=RuntimeError("CUDA error"))
    found, saves, _ = run(time, *parts)
    assert list(found["parts"]) == ["a", "b"] and found["failed"] == {"c": "RuntimeError: CUDA error"}
    assert "illegal memory access" in found["parts"]["b"]["failed"]["one"] and len(saves) == 3


def test_what_was_measured_before_an_interrupt_is_saved() -> None:
    time, saves = Time(), []

    def interrupt(results: Any, attempt: Attempts) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        parts = [time.part("a", 1), Part("b", 1.0, interrupt)]
        run_parts(parts, 60.0, lambda known: saves.append(copy.deepcopy(known)), str, time)
    assert [list(known["parts"]) for known in saves] == [["a"]]


def test_a_part_says_which_other_one_it_needs() -> None:
    part = Part("b", 1.0, lambda results, attempt: needed(results, "a"))
    found, _, _ = run(Time(), part)
    assert found["failed"] == {"b": "NotMeasured: needs 'a', which was not measured"}


def test_a_figure_that_fails_leaves_the_others() -> None:
    """And one that would begin when all time is used up is left out; the one before was not cut short."""
    time = Time()

    def measure(results: Any, attempt: Attempts) -> dict[str, Any]:
        def second() -> float:
            time.now += 90.0
            return 2.0

        return {"figures": [attempt("zero", lambda: 1 / 0), attempt("one", second), attempt("two", second)]}

    found, _, said = run(time, Part("a", 1.0, measure))
    assert found["parts"]["a"] == {
        "figures": [None, 2.0, None],
        "failed": {"zero": "ZeroDivisionError: division by zero"},
        "left_out": {"two": "no time was left"},
        "seconds": 90.0,
    }
    assert said[1:] == ["a: zero: ZeroDivisionError: division by zero"]
    assert list(failures(found)) == [("a: zero", "ZeroDivisionError: division by zero")]
    assert list(omissions(found)) == [("a: two", "no time was left")]


def test_a_second_run_fills_the_gaps_of_the_first() -> None:
    """What is measured anew takes the place of what was known, of its error, too; all else stays."""
    time = Time()
    parts = time.part("a", 1), time.part("b", 1, error=ValueError("no")), time.part("c", 99), time.part("d", 1)
    known, _, _ = run(time, *parts)
    before = copy.deepcopy(known)
    again = time.part("b", 2), time.part("c", 3), time.part("d", 1, error=ValueError("worse"))
    found = run_parts(again, 60.0, str, str, time, known)
    assert known == before
    assert found["left_out"] == {} and found["failed"] == {"d": "ValueError: worse"}
    assert found["parts"]["a"] == known["parts"]["a"] and found["parts"]["d"] == known["parts"]["d"]
    assert found["parts"]["c"] == {"before": ["a", "d", "b"], "seconds": 3}


# -- the suite ------------------------------------------------------------------------------------------------------


def test_what_the_goals_are_about_comes_first() -> None:
    names = [part.name for part in gpu_parts(FULL, CPU, torch.bfloat16)]
    assert names == ALL_PARTS
    seconds = [part.seconds for part in gpu_parts(FULL, CPU, torch.bfloat16)]
    assert sum(seconds[: 1 + names.index("attention")]) <= 60 * 7  # the default of `--minutes`
    assert {name for pair in FULL.pairs for name in pair} == FULL.models.keys() - set(FULL.compiled) == QWEN3.keys()
    assert [FULL.models[name].shape for name in FULL.compiled] == [QWEN3[name] for name in FULL.pairs[0]]


def test_every_part_runs_and_is_saved(saved: dict[str, Any]) -> None:
    assert list(saved["parts"]) == [part.name for part in gpu_parts(QUICK, CPU, torch.bfloat16)]
    assert saved["failed"] == saved["left_out"] == {}
    assert saved["is_quick"] is True and saved["dtype"] == "bfloat16" and saved["minutes"] == 7.0
    assert {"torch", "transformers"} <= saved["versions"].keys()
    assert saved["command"].startswith("python -m hf_pearl") and saved["machine"]["num_cores"] > 0


def test_steps_are_measured_at_every_size(saved: dict[str, Any]) -> None:
    draft, target = saved["parts"]["steps, 0.6B"], saved["parts"]["steps, 8B"]
    assert [(each["requests"], each["guesses"]) for each in draft["draft_steps"]] == [(1, 1), (1, 4), (3, 3)]
    assert all(each["num_steps"] > 3 and each["seconds"] > 0 for each in draft["draft_steps"])
    chained = [
        (each["requests"], each["guesses"], each["per_launch"], each["seconds"]) for each in draft["chained_steps"]
    ]
    assert chained == [(1, 1, 4, None), (1, 4, 4, None)]  # There are no launches on a CPU.
    assert target["draft_steps"] == target["chained_steps"] == []
    assert [(each["rows"], each["tokens"]) for each in target["target_steps"]] == [(1, 1), (1, 4), (3, 1), (3, 2)]
    methods = [(each["method"], each["rows"]) for each in target["token_seconds"]]
    assert methods == [("generate", 1), ("engine", 1), ("generate", 3), ("engine", 3)]
    bandwidth = saved["parts"]["copy bandwidth"]["bytes_per_second"]
    assert target["bound_seconds"] == target["weight_bytes"] / bandwidth
    assert target["observed"] == {"attention": "sdpa", "uses_graphs": False, "device_seconds": None}


@pytest.mark.parametrize("num_guesses", [1, 4])
def test_steps_that_are_launched_together_are_measured(num_guesses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stand-in for captures: of each launch every step counts."""
    use_twins(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: RerunCapture())
    monkeypatch.setattr(backends, "choose_kernels", lambda name, held: torch_kernels)
    model = random_model(QUICK.models["0.6B"].shape, CPU, torch.float32)
    figures = draft_steps(model, random_rows(1, 8, 96), num_guesses, 32, per_launch=4)
    assert figures["num_steps"] > 8 and figures["num_steps"] % 4 == 0 and figures["seconds"] > 0


@pytest.mark.parametrize("unattended", [True, False])
def test_nothing_is_captured_while_a_pair_is_timed(unattended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stand-in for captures; without the calls before, the timed ones would make them."""
    use_twins(monkeypatch)
    monkeypatch.setattr(cuda_graphs, "CAPTURED_FROM", 2)
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: RerunCapture())
    monkeypatch.setattr(cuda_graphs, "FIRST_TOKENS", 1)
    target = tiny_model("llama", 1, dtype=torch.float32)
    draft, prompts = noisy_copy(target, 0.03, 2), (torch.tensor([[5, 9, 17, 3, 8, 30]]),)
    engine = Method("engine", "", (Setting(replace(COLD, attention="triton")),), tries_threads=False)
    methods = [Method("generate", "", (Setting(),), tries_threads=False), engine]
    enable(target)
    try:
        measured = measure(Workload(target, draft, prompts, 40), methods, 1, unattended=unattended)
    finally:
        disable(target)
        release(target)
    assert (measured.result("engine").as_dict()["warm_up_steps"] == 0) == unattended


def test_nothing_is_profiled_before_a_pair_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches may take longer from then on, most of all those of methods that capture nothing."""

    def profiled(*_: object) -> None:
        raise AssertionError("profiled")

    monkeypatch.setattr(steps, "observe", profiled)
    attempts, model = Attempts(math.inf), random_model(QUICK.models["0.6B"].shape, CPU, torch.float32)
    made = pairs._own_steps(model, model, 1, 1e9, attempts)
    assert [each["model"] for each in made] == ["draft", "target"] and attempts.failed == {}
    names = [part.name for part in gpu_parts(FULL, CPU, torch.bfloat16)]
    assert names.index("pair 0.6B/8B, batch 8") < min(names.index(name) for name in names if name.startswith("steps"))


def test_a_width_that_no_draft_step_has_leaves_the_other_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(model: PreTrainedModel, rows: Any, num_guesses: int, *more: int) -> dict[str, Any]:
        if num_guesses == 4:
            raise RuntimeError("none of 64 draft steps went over 4 guesses")
        return draft_steps(model, rows, num_guesses, *more)

    monkeypatch.setattr(models, "draft_steps", refusing)
    attempts, model = Attempts(math.inf), QUICK.models["0.6B"]
    sizes = QUICK.sizes._replace(batch_sizes=(1,), tokens=(1, 2), num_steps=16)
    figures = measure_model(model.shape, True, sizes, CPU, torch.float32, 1e9, attempts)
    assert [each["guesses"] for each in figures["draft_steps"]] == [1]
    assert len(figures["target_steps"]) == len(figures["token_seconds"]) == 2
    assert set(attempts.failed) == {f"draft step, batch 1, 4 guesses, {num} to a launch" for num in (1, 4)}


def test_attention_that_sdpa_cannot_do_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr(attention, "_sdpa", refuse)
    attempts, shape, case = Attempts(math.inf), QUICK.models["0.6B"].shape, QUICK.attention[0]
    figures = attention.attention_figures(shape, case, CPU, torch.float32, 1e9, 1, attempts)
    assert figures["sdpa_seconds"] is None and figures["paged_seconds"] > 0
    assert attempts.failed == {"SDPA, 1 rows, 1 queries behind 32": "RuntimeError: No available kernel."}


def test_rivals_are_measured(saved: dict[str, Any]) -> None:
    batched, compiled = (saved["parts"][f"{name}, 8B"] for name in ("continuous batching", "static cache, compiled"))
    assert [each["rows"] for each in batched["token_seconds"]] == [1, 3]
    assert [each["rows"] for each in compiled["token_seconds"]] == [1]
    assert all(each["seconds"] > 0 for part in (batched, compiled) for each in part["token_seconds"])


def test_attention_is_measured_beside_sdpa_and_its_bound(saved: dict[str, Any]) -> None:
    cases = saved["parts"]["attention"]["cases"]
    assert [(each["num_rows"], each["context"], each["num_new"]) for each in cases] == list(QUICK.attention)
    assert all(each["attention"] == "sdpa" and each["paged_device_seconds"] is None for each in cases)
    assert all(each[f"{name}_seconds"] > 0 for each in cases for name in ("paged", "sdpa", "bound"))


def test_pairs_give_the_same_output_by_every_method(saved: dict[str, Any]) -> None:
    for batch_size, names in ((1, {"generate", "assisted"}), (2, {"generate"})):
        part = saved["parts"][f"pair 0.6B/8B, batch {batch_size}"]
        assert part["first_differences"] == part["near_ties"]
        assert {each["name"] for each in part["methods"]} == names | {"engine", "speculative", "pearl"}
        assert (part["target"]["num_layers"], part["draft"]["num_layers"]) == (19, 3)
        assert part["target"]["num_weights"] == pytest.approx(9_000_000, rel=1e-3)
        assert part["workload"]["batch_size"] == batch_size
        assert part["wrong"] == {} and all(each.get("warm_up_steps", 0) == 0 for each in part["methods"])
        assert [each["model"] for each in part["own_steps"]] == ["draft", "target"]
        assert all(each["seconds"] > 0 and each["bound_seconds"] > 0 for each in part["own_steps"])


def test_more_gpus_are_simulated_and_marked_so(saved: dict[str, Any]) -> None:
    simulated = saved["parts"]["simulated 0.6B/8B"]["simulated"]
    assert [(each["is_simulated"], each["gpus"]) for each in simulated] == [(True, 2), (True, 3), (True, 5)]
    assert all(each["over_generate"]["bound"] >= 0.99 * each["over_generate"]["pearl"] > 0 for each in simulated)


def test_the_tables_show_all_of_it(saved: dict[str, Any], tmp_path: Path) -> None:
    text = gpu_tables(saved)
    assert "these figures mean nothing" in text and "**Goals**" not in text
    titles = "Steps", "What ran", "One model", "Attention, µs a layer", "The pairs' own steps"
    for title in (*titles, "Simulated: over `generate`"):
        assert f"**{title}**" in text
    assert "Pair 0.6B/8B, batch 2" in text and "continuous batching" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 40 and not any("None" in row or "nan" in row for row in rows)
    (tmp_path / "h200.json").write_text(json.dumps(saved))
    document = "<!-- table: h200.json -->\n\n<!-- end -->"
    assert text in filled_in(document, tmp_path)


def test_a_run_that_measured_nothing_has_its_tables_too() -> None:
    said: list[str] = []
    found = measure_gpu(FULL, CPU, torch.bfloat16, 0.1, str, said.append)
    assert found["parts"] == found["failed"] == {} and list(found["left_out"]) == ALL_PARTS
    assert len(said) == len(ALL_PARTS)
    text = gpu_tables({**found, "is_quick": False})
    assert text.count("| not measured | - |") == 4 and "**Left out**" in text


# -- its pieces -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slower", "expected"), [(1.0, [True] * 4), (1.3, [False] * 4)], ids=["at the limits", "beyond them"]
)
def test_goals_are_met_up_to_their_limits(slower: float, expected: list[bool]) -> None:
    bound = 1e-3
    draft: dict[str, Any] = {"bound_seconds": bound, "draft_steps": [_step(1, 0.5e-3), _step(8, slower * 1.699e-3)]}
    draft["draft_steps"].append({**_step(32, 1.0), "requests": 32})
    draft["chained_steps"] = []
    target = {"bound_seconds": bound, "target_steps": [{"rows": 1, "tokens": 1, "seconds": slower * 1.249e-3}]}
    rates = {"generate": 10.0, "assisted": 16.0, "pearl": 50.1 / slower}
    methods = [{"name": name, "tokens_per_second": rate} for name, rate in rates.items()]
    own_steps = [{"model": "target", "seconds": 1.3e-3, "bound_seconds": bound}]
    pair = {"methods": methods, "own_steps": own_steps, "wrong": {}}
    parts: dict[str, Any] = {"steps, 0.6B": draft, "steps, 8B": target, "pair 0.6B/8B, batch 1": pair}
    assert [goal.is_met for goal in goals({"parts": parts})] == expected
    assert [goal.is_met for goal in goals({"parts": {}})] == [None] * 4
    draft["chained_steps"] = [{**_step(8, 1.6e-3), "per_launch": 4}, {**_step(1, None), "per_launch": 4}]
    assert goals({"parts": parts})[0].is_met  # The engine launches them together where that is faster.
    del draft["draft_steps"][1], draft["chained_steps"][0]
    assert goals({"parts": parts})[0].measured == "0.500 ms, limit 1.700 ms, but no more than 1 guesses were measured"
    own_steps[0]["seconds"] = 1.4e-3
    assert [goal.is_met for goal in goals({"parts": parts})[2:]] == [None, None]
    assert goals({"parts": parts})[2].measured.endswith("x, not comparable: its target's step takes 1.40x its bound")
    pair["wrong"] = {"pearl": "wrong: 1 texts differ from those of generate"}
    assert [(goal.measured, goal.is_met) for goal in goals({"parts": parts})[2:]] == [("wrong: pearl", False)] * 2
    assert [what for what, _ in failures({"parts": parts, "failed": {}})] == ["pair 0.6B/8B, batch 1: pearl"]


def _step(num_guesses: int, seconds: float | None) -> dict[str, Any]:
    return {"requests": 1, "guesses": num_guesses, "seconds": seconds}


def test_times_between_measured_ones_lie_on_lines() -> None:
    at = between([(4, 7.0), (1, 1.0), (2, 3.0)])
    assert [at(size) for size in (1, 2, 3, 4, 6)] == [1.0, 3.0, 5.0, 7.0, 11.0]
    assert between([(1, 2.0)])(9) == 2.0
    falling = between([(1, 2.0), (2, 1.0)])
    assert falling(10) == 1.0


def test_more_gpus_read_weights_in_less_time_and_nothing_else() -> None:
    assert spread_over(1, lambda _: 10.0, 8.0)(1) == 10.0
    assert spread_over(2, lambda _: 10.0, 8.0)(1) == 6.0
    assert spread_over(2, lambda _: 4.0, 8.0)(1) == 2.0


@pytest.mark.parametrize(("name", "billions"), [("0.6B", 0.596), ("1.7B", 1.721), ("8B", 7.568), ("32B", 31.984)])
def test_shapes_weigh_what_the_models_do(name: str, billions: float) -> None:
    """All parameters as published (0.596, 1.721, 8.191, 32.762 billion), without an embedding that is not the head."""
    assert shape_step_weights(QWEN3[name]) == pytest.approx(billions * 1e9, rel=1e-3)


def test_a_random_model_has_likely_tokens() -> None:
    shape = Shape(2, 64, 96, 4, 2, True, head_dim=16, vocab_size=5000)
    model = random_model(shape, CPU, torch.float32)
    assert step_weights(model) == shape_step_weights(shape)
    with torch.no_grad():
        chances = model(torch.arange(64)[None]).logits[0].softmax(dim=-1).amax(dim=-1)
    assert 0.1 < chances.mean() < 0.9


@pytest.mark.parametrize(
    ("names", "attention"),
    [
        (["aten::mm", "paged_attention_kernel", "aten::scaled_dot_product_attention"], "triton"),
        (["aten::scaled_dot_product_attention", "void pytorch_flash::flash_fwd_kernel<...>"], "sdpa"),
        (["void flash_fwd_splitkv_kernel<...>"], "flash_attn"),
        (["store_kernel", "flash_attn_3::fwd"], "flash_attn"),
        (["aten::mm"], "unknown"),
    ],
)
def test_attention_is_told_by_what_ran(names: list[str], attention: str) -> None:
    assert attention_among(names) == attention


def test_the_likeliest_line_follows_the_first_child_of_each_guess() -> None:
    tree = TokenTree(0, 0, 0, 10, (5, 6, 7, 8, 9), (-1, 0, -1, 1, 3), (0.9, 0.8, 0.1, 0.7, 0.6))
    assert best_line(tree) == (5, 6, 8, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cpu"), "add --quick"),
        (("--quick", "--device", "cpu", "--draft", "x"), "no options of --suite h200"),
        (("--quick", "--device", "cpu", "--minutes", "0"), "must be a number from 1"),
        (
            ("--quick", "--device", "cpu", "--only", "steps, 32B"),
            '--only "steps, 32B": the parts are "copy bandwidth", ',
        ),
        (("--quick", "--device", "cpu", "--batch-size", "2"), "--batch-size is an option of --suite generation"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    options: tuple[str, ...], message: str, own_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--suite", "h200", *options])
    assert message in capsys.readouterr().err


def test_only_fills_parts_into_the_file(
    saved: dict[str, Any], tmp_path: Path, own_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "h200.json"
    first = copy.deepcopy(saved)
    del first["parts"]["attention"]
    first["left_out"] = {"attention": "no time"}
    file.write_text(json.dumps(first))
    command = ["bench", "--suite", "h200", "--quick", "--device", "cpu", "--json", str(file), "--only", "attention"]
    assert main(command) == 0
    filled = json.loads(file.read_text())
    assert filled["left_out"] == {} and len(filled["parts"]["attention"]["cases"]) == len(QUICK.attention)
    assert {**filled["parts"], "attention": None} == {**saved["parts"], "attention": None}
    assert filled["command"] == saved["command"] and len(filled["filled_in_by"]) == 1
    for content, message in (({**filled, "dtype": "float16"}, "dtype was float16"), ({}, "holds no figures")):
        file.write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            main(command)
        assert message in capsys.readouterr().err
        assert json.loads(file.read_text()) == content


def test_a_wrong_output_ends_with_an_error(
    saved: dict[str, Any], own_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {name: copy.deepcopy(saved[name]) for name in ("parts", "failed", "left_out")}
    monkeypatch.setattr(commands_gpu, "measure_gpu", lambda *_: found)
    command = ["bench", "--suite", "h200", "--quick", "--device", "cpu"]
    assert main(command) == 0
    found["parts"]["pair 0.6B/8B, batch 2"]["wrong"] = {"engine": "wrong: 1 texts differ from those of generate"}
    assert main(command) == 1
    assert "| pair 0.6B/8B, batch 2: engine | wrong: 1 texts differ" in capsys.readouterr().out


def test_a_method_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its trials or in the timed runs; but not where somebody looks on, who can mend it."""
    target = tiny_model("llama", 1, dtype=torch.float32)
    workload = Workload(target, noisy_copy(target, 0.03, 2), (torch.tensor([[5, 9, 17, 3]]),), 8)
    engine = Method("engine", "", (Setting(COLD),), tries_threads=False)
    methods = [
        Method("generate", "", (Setting(),), tries_threads=False),
        replace(engine, name="at once", candidates=(Setting(replace(COLD, cache_memory=1)),)),
        replace(engine, name="later"),
        engine,
    ]
    num_calls = Counter[str]()

    def advance(name: str) -> None:
        num_calls[name] += 1
        monkeypatch.setattr(measurement, "complete", refuse if (name, num_calls[name]) == ("later", 2) else complete)

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    enable(target)
    try:
        measured = measure(workload, methods, 2, advance, unattended=True)
        assert {each.name for each in measured.results if each.error} == {"at once", "later"}
        assert measured.result("later").error == "OutOfMemoryError: CUDA out of memory."
        assert len(measured.result("engine").runs) == 2
        with pytest.raises(ValueError, match="cache_memory"):
            measure(workload, methods[:2], 1)
    finally:
        disable(target)
        release(target)
