"""`launch`: models over several ranks give the tokens of one process, and no rank hangs, leaks or outlives its use."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from callbacks import Deliberate
from models import (
    assert_varied,
    enabled_for_tiny_models,
    expected_warnings,
    left_padded,
    noisy_copy,
    random_prompts,
    tiny_model,
    tiny_tokenizer,
)
from test_leaks import KINDS, resident_memory, slope
from test_processes import call_of_another_thread, check_in_child, is_gone, wait_for
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList, pipeline

import hf_pearl
from hf_pearl import LaunchedPair, PearlConfig, PearlUnsupportedModelError, PearlWorkerError
from hf_pearl.benchmark.near_tie import first_difference, is_near_tie
from hf_pearl.launching import launch as launching
from hf_pearl.launching import rank_checks
from hf_pearl.launching.rank_devices import first_devices
from hf_pearl.pair import demo_pair_folder
from hf_pearl.parallel import heartbeat
from hf_pearl.parallel.cores import available_cores
from hf_pearl.parallel.memory import cache_needs
from hf_pearl.parallel.ranks import child_ranks, shared_collectives
from hf_pearl.parallel.ranks.child_ranks import ChildRanks
from hf_pearl.parallel.ranks.lane import leader_of
from hf_pearl.parallel.ranks.wire import RankModel
from hf_pearl.parallel.workers.child_process import start_module
from hf_pearl.registry import engine_for

ROOT = Path(__file__).resolve().parent.parent
LOCKSTEP = PearlConfig(draft_length=4, seed=7)  # waits for the draft, whose guesses then depend on no time
FREE = PearlConfig(execution="processes", seed=7)
NEW_TOKENS = 24
SIZES = [(1, 1), (1, 2), (2, 1), (1, 3), (2, 3)]  # of draft and target
RUN_SECONDS = 240

pytestmark = pytest.mark.skipif(not shared_collectives.HAS_EVENTS, reason="ranks need Linux (memfd, eventfd)")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


class Saved(NamedTuple):
    """A pair in one piece, in folders, and inputs for it."""

    target: PreTrainedModel
    draft: PreTrainedModel
    folders: tuple[Path, Path]
    inputs: dict[str, torch.Tensor]

    def launch(self, draft_tp: int, target_tp: int) -> LaunchedPair:
        sizes = {"target_tp": target_tp, "draft_tp": draft_tp}
        return hf_pearl.launch(self.folders[0], self.folders[1], **sizes, dtype=torch.float64)

    def expected(self, config: Any = LOCKSTEP, **options: Any) -> Any:
        """What a single process gives: transformers' own tokens where greedy."""
        greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
        output = generate(self.target, self.inputs, config, assistant_model=self.draft, **greedy)
        if not greedy["do_sample"]:
            plain = self.target.generate(**self.inputs, **greedy)
            assert output.sequences.tolist() == plain.tolist()
        assert_varied(output.sequences[:, self.inputs["input_ids"].shape[1] :])
        return output


def generate(model: Any, inputs: dict[str, torch.Tensor], config: Any = LOCKSTEP, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, pearl=config, **options)


def save(target: PreTrainedModel, draft: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    folders = folder / "target", folder / "draft"
    for model, where in zip((target, draft), folders, strict=True):
        model.save_pretrained(where)
    return folders


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Saved]]:
    """Pairs by name, made when first asked for: tiny ones, and the embedded one."""
    made: dict[str, Saved] = {}

    def pair(name: str) -> Saved:
        if name not in made and name == "embedded":
            target, draft, tokenizer = hf_pearl.load_demo_pair("cpu", torch.float64)
            folder = demo_pair_folder()
            texts = ["def main(", "import os\n\n", "class Reader:\n    def", "for line in"]
            inputs = left_padded([tokenizer(text).input_ids for text in texts])
            made[name] = Saved(target, draft, (folder / "target", folder / "draft"), inputs)
        elif name not in made:
            target = tiny_model(name, 3)
            draft = noisy_copy(target, 0.03, 4)
            folders = save(target, draft, tmp_path_factory.mktemp(name))
            made[name] = Saved(target, draft, folders, random_prompts(random.Random(5), 4, (5, 20)))
        return made[name]

    yield pair
    for each in made.values():
        hf_pearl.release(each.target)


@pytest.fixture(scope="module")
def saved(pairs: Callable[[str], Saved]) -> Saved:
    return pairs("llama")


@pytest.fixture(scope="module")
def launched(saved: Saved) -> Iterator[LaunchedPair]:
    """One rank of the draft, two of the target; for most of this module."""
    with saved.launch(1, 2) as pair:
        yield pair


def ranks_of(pair: LaunchedPair) -> ChildRanks:
    leader = leader_of(pair.target)
    assert leader is not None
    assert isinstance(leader.ranks, ChildRanks)
    return leader.ranks


def compare_ranks(pair: LaunchedPair) -> None:
    """Have the target's ranks compare tokens and block tables in every forward."""
    leader = leader_of(pair.target)
    if leader is not None:
        leader.compares = True


SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param(name, sizes, marks=[] if (name, sizes) in [("llama", (2, 3))] else pytest.mark.slow)
        for name in ("llama", "qwen3", "embedded")
        for sizes in SIZES
    ],
)
def test_tokens_and_acceptance_are_those_of_one_process(
    name: str, sizes: tuple[int, int], pairs: Callable[[str], Saved]
) -> None:
    saved = pairs(name)
    with saved.launch(*sizes) as pair:
        compare_ranks(pair)
        for options in ({}, SAMPLING, {"num_return_sequences": 2, **SAMPLING}):
            expected = saved.expected(**options)
            output = generate(pair, saved.inputs, **options)
            assert output.sequences.tolist() == expected.sequences.tolist(), options
            # The draft's ranks guess what one rank does: the caches, warm or not, hold the same.
            assert output.pearl.accepted_tokens == expected.pearl.accepted_tokens > 0
            free = generate(pair, saved.inputs, FREE, **options)
            assert free.sequences.tolist() == expected.sequences.tolist(), options
            assert free.pearl.execution == "processes"
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            assert process.net_connections(kind="inet") == []  # Nothing listens.


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 2), (2, 3)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_in_float32_a_first_difference_is_a_near_tie(
    sizes: tuple[int, int], temperature: float, pairs: Callable[[str], Saved]
) -> None:
    """Ranks sum in another order than one process does."""
    inputs, folders = pairs("embedded").inputs, pairs("embedded").folders
    target, draft, _ = hf_pearl.load_demo_pair("cpu", torch.float32)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    expected = generate(target, inputs, assistant_model=draft, max_new_tokens=60, **sampling)
    with hf_pearl.launch(*folders, draft_tp=sizes[0], target_tp=sizes[1], dtype=torch.float32) as pair:
        output = generate(pair, inputs, max_new_tokens=60, **sampling)
    start = inputs["input_ids"].shape[1]
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        prompt = inputs["input_ids"][row : row + 1, mask]
        right, got = (each.sequences[row, start:].tolist() for each in (expected, output))
        if first_difference(right, got) is not None:
            assert is_near_tie(target, prompt, right, got, temperature, LOCKSTEP.seed, row)
    hf_pearl.release(target)


def test_the_target_is_used_like_any_model(launched: LaunchedPair, saved: Saved) -> None:
    compare_ranks(launched)
    expected = saved.expected().sequences
    assert launched.generate(**saved.inputs, do_sample=False, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()
    greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    assert launched.target.generate(**saved.inputs, **greedy).tolist() == expected.tolist()
    options: dict[str, Any] = {"assistant_model": None, **greedy}  # without the draft
    assert launched.target.generate(**saved.inputs, **options).tolist() == expected.tolist()
    tokenizer = tiny_tokenizer(1)
    texts = ["abc", "fed abc"]
    expected_texts = pipeline("text-generation", model=saved.target, tokenizer=tokenizer)(texts, **greedy)
    assert launched.pipeline(tokenizer)(texts, **greedy) == expected_texts
    assert pipeline("text-generation", model=launched.target, tokenizer=tokenizer)(texts, **greedy) == expected_texts


@pytest.mark.parametrize("num_calls", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_threads_with_and_without_the_draft_take_turns_on_the_ranks(
    num_calls: int, launched: LaunchedPair, saved: Saved
) -> None:
    """Each has an engine and a cache of its own, and both lead the same ranks."""
    compare_ranks(launched)
    expected = saved.expected().sequences.tolist()
    assert generate(launched, saved.inputs).sequences.tolist() == expected
    process_ids = ranks_of(launched).process_ids

    def work(options: dict[str, Any]) -> list[Any]:
        return [generate(launched, saved.inputs, **options).sequences.tolist() for _ in range(num_calls)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, [{}, {"assistant_model": None}])) == [[expected] * num_calls] * 2
    assert ranks_of(launched).process_ids == process_ids


def test_what_a_part_cannot_do_is_refused(launched: LaunchedPair, saved: Saved) -> None:
    with pytest.raises(RuntimeError, match="one of 2 parts"):
        launched.target(input_ids=torch.tensor([[1]]))
    with pytest.raises(RuntimeError, match="one of 2 parts"):
        launched.generate(**saved.inputs, pearl=False, max_new_tokens=2)
    with pytest.raises(RuntimeError, match=r"one of 2 parts.*Load the whole model"):
        launched.target.save_pretrained("nowhere")
    for execution in ("auto", "inline", "threads", "processes"):
        with pytest.raises(ValueError, match="`assistant_model` is the target itself, which lies on 2 ranks"):
            generate(launched, saved.inputs, PearlConfig(execution=execution), assistant_model=launched.target)
    for act, cure in (
        (lambda: hf_pearl.tune(launched.target, saved.draft, [[1, 2, 3]]), "from_pretrained"),
        (lambda: hf_pearl.record_traces(launched.target, saved.draft, [[1, 2, 3]]), "from_pretrained"),
        (lambda: hf_pearl.plan(launched.target, saved.draft), "Pass the folder or the name"),
    ):
        with pytest.raises(NotImplementedError, match=rf"`target` is a LlamaForCausalLM of `hf_pearl.launch`.*{cure}"):
            act()
    with saved.launch(2, 1) as pair:
        with pytest.raises(NotImplementedError, match=r"`draft` is a LlamaForCausalLM of `hf_pearl.launch`"):
            hf_pearl.plan(pair.target, pair.draft)
        for execution in ("inline", "threads"):
            with pytest.raises(ValueError, match="several ranks"):
                generate(pair, saved.inputs, PearlConfig(execution=execution))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"target_tp": 0}, ValueError, "`target_tp` must be a number of ranks", id="none"),
        pytest.param({"draft_tp": True}, ValueError, "`draft_tp` must be a number of ranks", id="no number"),
        pytest.param({"draft_tp": 1.5}, ValueError, "`draft_tp` must be a number of ranks", id="half a rank"),
        ({"target_tp": 65}, ValueError, "`target_tp` must be a number of ranks, from 1 to 64, got 65"),
        ({"target_tp": 10**30}, ValueError, "`target_tp` must be a number of ranks, from 1 to 64, got 10000"),
        ({"draft_tp": 400}, ValueError, "`draft_tp` must be a number of ranks, from 1 to 64, got 400"),
        ({"dtype": "auto"}, TypeError, r"`dtype` must be .*torch\.bfloat16, or None, got 'auto'"),
        ({"dtype": "foo"}, TypeError, "`dtype` must be .*got 'foo'"),
        ({"dtype": 3.0}, TypeError, r"`dtype` must be .*got 3\.0"),
        ({"dtype": torch.int64}, TypeError, r"`dtype` must be .*got torch\.int64"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, r"`dtype` must be .*16 bits or more.*got torch\.float8_e4m3fn"),
        ({"device": "gpu"}, ValueError, "`device` names no device that torch knows, got 'gpu'.*Give"),
        ({"device": "meta"}, ValueError, "`device` must name devices that compute, got 'meta'.*Give"),
        ({"device": "cuda:99"}, ValueError, "`device` asks for cuda:99, and this machine has .*Name a device"),
        ({"device": 7.0}, TypeError, r"`device` must name devices, got 7\.0.*Give"),
        ({"draft": None, "draft_tp": 2}, ValueError, "`draft_tp` is 2, and there is no draft"),
        ({"target": None}, TypeError, "`target` must be a folder or a name on the Hub, got None"),
        ({"target": 5}, TypeError, "`target` must be a folder or a name on the Hub, got 5"),
        ({"draft": 5}, TypeError, "`draft` must be a folder or a name on the Hub, got 5"),
        ({"draft": ""}, ValueError, "`draft` must be a folder or a name on the Hub, got ''"),
        ({"target": "/no/such"}, ValueError, "`target` must be a folder, or a name .*reached, got '/no/such'"),
        ({"draft": "no/such-model"}, ValueError, "`draft` must be a folder, or a name .*reached, got 'no/such-model'"),
    ],
)
@pytest.mark.parametrize("target_tp", [1, 2])
def test_bad_arguments_are_refused_by_name_before_anything_starts(
    arguments: Any, error: type[Exception], message: str, target_tp: int, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("something starts")

    monkeypatch.setattr(subprocess, "Popen", start)
    given: dict[str, Any] = {"target": saved.folders[0], "draft": saved.folders[1], "target_tp": target_tp}
    given |= arguments
    with pytest.raises(error, match=message):
        hf_pearl.launch(**given)


@pytest.mark.parametrize(("draft_tp", "target_tp"), [(1, 1), (2, 1), (1, 2)])
def test_another_default_device_changes_nothing(draft_tp: int, target_tp: int, saved: Saved) -> None:
    expected = saved.expected()
    with torch.device("meta"), saved.launch(draft_tp, target_tp) as pair:
        assert generate(pair, saved.inputs).sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("part", ["target", "draft"])
def test_more_ranks_than_open_files_allow_are_refused_before_anything_starts(
    part: str, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(subprocess, "Popen", None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        with pytest.raises(ValueError, match=rf"`{part}_tp` is 40, .* and this process may open .*ulimit -n"):
            hf_pearl.launch(*saved.folders, **{f"{part}_tp": 40})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_size_that_torchrun_has_not_started_is_refused_by_the_number_that_it_has(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    for num_ranks, sizes in (("2", (10**30, 1)), ("100", (70, 31))):
        monkeypatch.setenv("WORLD_SIZE", num_ranks)
        with pytest.raises(ValueError, match=rf"{num_ranks} ranks run, and .* is {sizes[0]} \+ {sizes[1]}\."):
            hf_pearl.launch(*saved.folders, target_tp=sizes[0], draft_tp=sizes[1])


def test_a_draft_under_a_launcher_is_refused_on_systems_without_events(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every rank, before any of them waits for the others; without a draft nothing needs them."""
    monkeypatch.setattr(rank_checks, "HAS_EVENTS", False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(NotImplementedError, match=r"a draft .* needs Linux .*Leave `draft` out"):
            hf_pearl.launch(*saved.folders, target_tp=2)
        rank_checks.check_ranks(torch.device("cpu"), 3, 0)


def test_a_model_that_is_loaded_is_refused(saved: Saved) -> None:
    model: Any = saved.target
    for arguments in ((model, saved.folders[1]), (saved.folders[0], model)):
        with pytest.raises(TypeError, match=r"must be a folder .*got a LlamaForCausalLM\. Every rank loads"):
            hf_pearl.launch(*arguments, target_tp=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
@pytest.mark.parametrize("target_tp", [1, 2])
def test_a_gpu_that_is_not_there_is_refused(target_tp: int, saved: Saved) -> None:
    with pytest.raises(ValueError, match="`device` asks for cuda, and this machine has no device of the kind 'cuda'"):
        hf_pearl.launch(*saved.folders, target_tp=target_tp, device="cuda")


@pytest.mark.parametrize("part", ["target", "draft"])
@pytest.mark.parametrize(
    ("content", "cure"),
    [(b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"", "Download"), (b"junk" * 9, "Download")],
)
def test_files_that_hold_no_weights_are_refused(
    content: bytes, cure: str, part: str, saved: Saved, tmp_path: Path
) -> None:
    saved.target.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    given: dict[str, Any] = {"target": saved.folders[0], "draft": saved.folders[1], part: tmp_path}
    acts: list[Callable[..., Any]] = [hf_pearl.launch, hf_pearl.plan]
    for act in acts:
        with pytest.raises(ValueError, match=rf"`{part}`: .*model\.safetensors is no file of safetensors: .*{cure}"):
            act(**given)


@pytest.mark.parametrize("part", ["target", "draft"])
def test_a_model_that_cannot_be_cut_is_refused_before_anything_starts(part: str, saved: Saved, tmp_path: Path) -> None:
    tiny_model("gpt2", 3).save_pretrained(tmp_path)
    options: dict[str, Any] = {"target": saved.folders[0], "draft": saved.folders[1], part: tmp_path}
    options["dtype"] = torch.float64
    before = set(psutil.Process().children())
    with pytest.raises(PearlUnsupportedModelError, match=rf"`{part}_tp` is 2, and GPT2.* cannot be cut.*one rank"):
        hf_pearl.launch(**options, **{f"{part}_tp": 2})
    assert set(psutil.Process().children()) == before
    hf_pearl.launch(**options).close()  # In one piece it will do.


@pytest.mark.parametrize("sizes", [{}, {"target_tp": 2}, {"draft_tp": 2}])
def test_a_draft_with_another_vocabulary_is_refused_before_anything_is_loaded(
    sizes: dict[str, int], saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", 3, vocab_size=65 + 1024).save_pretrained(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(launching, "_hold", None)
    with pytest.raises(ValueError, match=r"`draft` must have the vocabulary of `target`.*64 .*got .* 1089\. "):
        hf_pearl.launch(saved.folders[0], tmp_path, **sizes)


@pytest.mark.parametrize("part", ["target", "draft"])
def test_a_model_that_pearl_cannot_run_is_refused_before_anything_is_loaded(
    part: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_model("llama", 3, rope_parameters=rope).save_pretrained(tmp_path)
    monkeypatch.setattr(launching, "_hold", None)
    with pytest.raises(PearlUnsupportedModelError, match="rope_type 'dynamic'"):
        hf_pearl.launch(**{"target": saved.folders[0], "draft": saved.folders[1], part: tmp_path})


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`target`: .*model\.safetensors.*save_pretrained"):
        hf_pearl.launch(tmp_path, target_tp=2)


def test_a_rank_that_cannot_start_says_why(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(psutil.Process().children())
    monkeypatch.setenv("PYTHONHASHSEED", "nonsense")  # The interpreter itself refuses it.
    with pytest.raises(PearlWorkerError, match=r"(?s)target lane, start of its ranks.*rank 1: exit code 1"):
        hf_pearl.launch(saved.folders[0], target_tp=2)
    assert set(psutil.Process().children()) == before


def test_a_rank_that_fails_as_it_starts_says_why(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback, and at once: an interpreter with torch takes longer to come down than anybody waits."""
    monkeypatch.setattr(RankModel, "torch_dtype", torch.float64)  # Here only: the rank finds no such dtype.
    other = "hf_pearl.launching.launch.RankModel"
    monkeypatch.setattr(other, lambda name, dtype, *rest: RankModel(name, "no_such_dtype", *rest))
    with pytest.raises(PearlWorkerError, match=r"(?s)rank 1: exit code 1.*Traceback.*no_such_dtype"):
        hf_pearl.launch(saved.folders[0], target_tp=2)


def test_changes_that_the_other_ranks_cannot_know_are_refused(saved: Saved, tmp_path: Path) -> None:
    """Of a part's weights, and of the files from which a rank would be started anew."""
    folder = tmp_path / "target"
    shutil.copytree(saved.folders[0], folder)
    with hf_pearl.launch(folder, target_tp=2, dtype=torch.float64) as pair:
        generate(pair, saved.inputs)
        with torch.no_grad():
            next(pair.target.parameters()).mul_(1.5)
        with pytest.raises(PearlWorkerError, match=r"one of several parts.*has changed since.*`launch` that"):
            generate(pair, saved.inputs)
    with hf_pearl.launch(folder, target_tp=2, dtype=torch.float64) as pair:
        os.kill(ranks_of(pair).process_ids[0], signal.SIGKILL)
        wait_for(lambda: ranks_of(pair)._children[0].has_ended, "the end of a rank", 5.0)
        (folder / "checkpoint-500").mkdir()  # What else lies there does not count.
        with expected_warnings() as warnings:
            generate(pair, saved.inputs)
        assert len(warnings) == 1
        os.kill(ranks_of(pair).process_ids[0], signal.SIGKILL)
        wait_for(lambda: ranks_of(pair)._children[0].has_ended, "the end of a rank", 5.0)
        (folder / "config.json").touch()
        with pytest.raises(PearlWorkerError, match=r"files of .* have changed since.*`launch` it again"):
            generate(pair, saved.inputs)


def test_no_rank_is_left_of_a_launch_that_fails(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while somebody keeps the error, and with it all that the frames of it hold."""
    before = set(psutil.Process().children())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_pearl.launching.launch._load", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        hf_pearl.launch(*saved.folders, target_tp=2)
    assert set(psutil.Process().children()) == before
    del kept


def test_a_callback_cannot_close_the_pair_that_it_is_called_by(saved: Saved) -> None:
    """The ranks are in the midst of the call."""
    errors: list[RuntimeError] = []

    def close() -> None:
        with pytest.raises(RuntimeError, match=r"asked for by a callback.*after that call") as caught:
            pair.close()
        errors.append(caught.value)

    expected = saved.expected().sequences.tolist()
    with hf_pearl.launch(saved.folders[0], target_tp=2, dtype=torch.float64) as pair:
        processors = LogitsProcessorList([AtToken(3, close)])
        assert generate(pair, saved.inputs, logits_processor=processors).sequences.tolist() == expected
        assert generate(pair, saved.inputs).sequences.tolist() == expected
    assert len(errors) == 1


@pytest.mark.parametrize(("target_tp", "draft_tp"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_call_by_a_callback_of_another_one(target_tp: int, draft_tp: int, saved: Saved) -> None:
    """Several ranks of the target follow one call at a time; those of a draft are left to the outer one."""
    expected, got = saved.expected().sequences.tolist(), []

    def call() -> None:
        try:
            got.append(generate(pair, saved.inputs))
        except RuntimeError as error:
            got.append(error)

    with hf_pearl.launch(*saved.folders, target_tp=target_tp, draft_tp=draft_tp, dtype=torch.float64) as pair:
        for processors in (LogitsProcessorList([AtToken(3, call)]), LogitsProcessorList()):
            assert generate(pair, saved.inputs, logits_processor=processors).sequences.tolist() == expected
    if target_tp > 1:
        assert "called by a callback of another call" in str(got[0])
    else:
        assert got[0].sequences.tolist() == expected and got[0].pearl.execution == "none"


def test_a_closed_pair_starts_nothing(saved: Saved) -> None:
    expected, before = saved.expected().sequences.tolist(), set(psutil.Process().children())
    pair = saved.launch(1, 1)
    pair.close()
    tokenizer: Any = None
    for act in (lambda: pair.pipeline(tokenizer), pair.__enter__, lambda: pair.generate(**saved.inputs)):
        with pytest.raises(PearlWorkerError, match="closed: `launch` it again"):
            act()
    plain = pair.target.generate(**saved.inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert plain.tolist() == expected
    assert set(psutil.Process().children()) == before


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_call_with_its_traceback(launched: LaunchedPair, saved: Saved) -> None:
    expected = saved.expected().sequences
    ranks_of(launched)._children[0].line.sendall(b"\xff" * 8)  # a message of -1 words
    with pytest.raises(PearlWorkerError, match=r"(?s)rank 1: exit code 1.*Traceback.*MalformedRecordError"):
        for _ in range(20):
            generate(launched, saved.inputs)
    assert generate(launched, saved.inputs).sequences.tolist() == expected.tolist()


class AtToken(LogitsProcessor):
    """Does something once, before a token is chosen."""

    def __init__(self, place: int, act: Callable[[], None]) -> None:
        self._place, self._act = place, act

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._place -= 1
        if self._place == 0:
            self._act()
        return scores


def fails_and_recovers(pair: LaunchedPair, saved: Saved, act: Callable[[], None], place: int) -> str:
    """Do something to a rank during a call, which must raise; the next one must be right. Return the message."""
    expected = saved.expected().sequences
    processors = LogitsProcessorList([AtToken(place, act)])
    with pytest.raises(PearlWorkerError) as caught:
        generate(pair, saved.inputs, logits_processor=processors)
    children = ranks_of(pair)
    assert children.process_ids == []
    assert generate(pair, saved.inputs).sequences.tolist() == expected.tolist()
    return str(caught.value)


@pytest.mark.parametrize("num_kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_call_and_the_next_one_is_right(
    num_kills: int, launched: LaunchedPair, saved: Saved, seed: int
) -> None:
    chance = random.Random(seed)
    for _ in range(num_kills):
        generate(launched, saved.inputs)

        def kill() -> None:
            os.kill(ranks_of(launched).process_ids[0], signal.SIGKILL)

        message = fails_and_recovers(launched, saved, kill, chance.randrange(1, NEW_TOKENS))
        assert message.startswith("target lane, forward ")
        assert "rank 1" in message
        assert "exit code -9" in message


@pytest.mark.slow
def test_a_rank_killed_at_any_moment_costs_one_call_at_most(launched: LaunchedPair, saved: Saved, seed: int) -> None:
    chance, expected = random.Random(seed), saved.expected().sequences
    with expected_warnings():
        for _ in range(20):
            generate(launched, saved.inputs)
            victim = ranks_of(launched).process_ids[0]
            timer = threading.Timer(chance.uniform(0.0, 0.3), os.kill, (victim, signal.SIGKILL))
            timer.start()
            for _ in range(10):
                try:
                    assert generate(launched, saved.inputs).sequences.tolist() == expected.tolist()
                except PearlWorkerError as error:
                    assert "rank 1" in str(error)
                    break
            timer.join()
            assert generate(launched, saved.inputs).sequences.tolist() == expected.tolist()


def test_a_stopped_rank_is_noticed(launched: LaunchedPair, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(launched, saved.inputs)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.8)

    def stop() -> None:
        os.kill(ranks_of(launched).process_ids[0], signal.SIGSTOP)

    message = fails_and_recovers(launched, saved, stop, 3)
    assert message.startswith("target lane, forward ")
    assert "rank 1 of the target lane" in message and "no sign of life" in message


def test_a_rank_that_is_stopped_while_it_starts_is_not_waited_for(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 0.8)
    started: list[subprocess.Popen[bytes]] = []

    def start_stopped(*arguments: Any) -> subprocess.Popen[bytes]:
        started.append(start_module(*arguments))
        os.kill(started[-1].pid, signal.SIGSTOP)
        return started[-1]

    monkeypatch.setattr(child_ranks, "start_module", start_stopped)
    with pytest.raises(PearlWorkerError, match=r"rank 1: its process has been stopped for 0\.8 s while it started"):
        saved.launch(1, 2)
    assert len(started) == 1 and started[0].poll() is not None


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "count", "target_tp", "draft_tp", "first"),
    [
        (CPU, 1, 3, 2, ("cpu", "cpu")),
        (CUDA, 1, 1, 1, ("cuda", "cuda")),  # Who draws them apart is "auto".
        (CUDA, 8, 7, 1, ("cuda:0", "cuda:7")),
        (CUDA, 8, 4, 4, ("cuda:0", "cuda:4")),
        (CUDA, 2, 2, 0, ("cuda:0", "cuda:2")),
        (torch.device("cuda:2"), 8, 3, 2, ("cuda:2", "cuda:5")),
        (CUDA, 2, 2, 1, None),
        (CUDA, 4, 2, 3, None),
        (torch.device("cuda:3"), 4, 2, 0, None),
    ],
)
def test_every_rank_on_a_gpu_has_one_of_its_own(
    device: torch.device,
    count: int,
    target_tp: int,
    draft_tp: int,
    first: tuple[str, str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hf_pearl.launching.rank_devices.device_count", lambda kind: count)
    if first is None:
        with pytest.raises(ValueError, match=f"`target_tp` and `draft_tp` are {target_tp} and {draft_tp}, .* a GPU"):
            first_devices(device, target_tp, draft_tp)
        return
    assert tuple(map(str, first_devices(device, target_tp, draft_tp))) == first
    taken = [
        RankModel("name", "float32", lane, size, 1, where).device_of(rank)
        for lane, size, where in zip(("target", "draft"), (target_tp, draft_tp), first, strict=True)
        for rank in range(size)
    ]
    assert len(set(taken)) == (len(taken) if "cuda:" in first[0] else 1)


def test_caches_of_all_ranks_together_take_what_was_allowed(launched: LaunchedPair, saved: Saved) -> None:
    """Two ranks of the target on one host: each has half of the heads, and its own memory for them."""
    one, two = cache_needs(saved.target, False), cache_needs(launched.target, False)
    assert (len(one), len(two)) == (1, 2)
    assert sum(each.bytes_per_block() for each in two) == one[0].bytes_per_block()


def test_a_rank_that_pauses_is_waited_for(launched: LaunchedPair, saved: Saved) -> None:
    expected = generate(launched, saved.inputs).sequences
    (rank,) = ranks_of(launched).process_ids

    def pause() -> None:
        os.kill(rank, signal.SIGSTOP)
        threading.Timer(2.0, os.kill, (rank, signal.SIGCONT)).start()

    output = generate(launched, saved.inputs, logits_processor=LogitsProcessorList([AtToken(3, pause)]))
    assert output.sequences.tolist() == expected.tolist()
    assert ranks_of(launched).process_ids == [rank]


@pytest.mark.slow
def test_ranks_killed_between_calls_are_started_anew(launched: LaunchedPair, saved: Saved) -> None:
    expected = generate(launched, saved.inputs).sequences
    victim = ranks_of(launched)._children[0]
    victim.process.kill()
    wait_for(lambda: victim.has_ended, "its end")
    with expected_warnings() as warnings:
        assert generate(launched, saved.inputs).sequences.tolist() == expected.tolist()
    assert [message for message in warnings if "exit code -9" in message]


@pytest.mark.parametrize("num_interrupts", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_an_interrupt_ends_the_call_and_keeps_the_ranks(
    num_interrupts: int, launched: LaunchedPair, saved: Saved, seed: int
) -> None:
    chance, expected = random.Random(seed), generate(launched, saved.inputs).sequences
    process_ids = ranks_of(launched).process_ids
    for _ in range(num_interrupts):
        timer = threading.Timer(chance.uniform(0.0, 0.3), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                generate(launched, saved.inputs)
        timer.join()
        assert generate(launched, saved.inputs).sequences.tolist() == expected.tolist()
    assert ranks_of(launched).process_ids == process_ids


def test_an_interrupt_does_not_wait_for_a_stopped_rank(launched: LaunchedPair, saved: Saved) -> None:
    expected = generate(launched, saved.inputs).sequences

    def stop() -> None:
        os.kill(ranks_of(launched).process_ids[0], signal.SIGSTOP)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        generate(launched, saved.inputs, logits_processor=LogitsProcessorList([AtToken(3, stop)]))
    assert generate(launched, saved.inputs).sequences.tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "act", "reason"),
    [
        pytest.param(1, psutil.Process.kill, "exit code -9", id="killed"),
        pytest.param(1, psutil.Process.suspend, "rank 1 of the draft lane", id="stopped"),
        pytest.param(0, psutil.Process.suspend, "no sign of life", id="first one stopped"),
    ],
)
def test_a_lost_rank_of_the_draft_costs_no_token(
    victim: int, act: Callable[[psutil.Process], None], reason: str, saved: Saved
) -> None:
    expected = saved.expected().sequences
    before = set(psutil.Process().children())
    with saved.launch(2, 1) as pair:
        assert generate(pair, saved.inputs).sequences.tolist() == expected.tolist()
        (worker,) = set(psutil.Process().children()) - before
        processes = (worker, *worker.children())
        assert len(processes) == 2

        def lose() -> None:
            act(processes[victim])

        with expected_warnings() as warnings:
            processors = LogitsProcessorList([AtToken(3, lose)])
            output = generate(pair, saved.inputs, logits_processor=processors)
        assert output.sequences.tolist() == expected.tolist()
        assert len(warnings) == 1 and "The draft lane failed" in warnings[0] and reason in warnings[0], warnings
        output = generate(pair, saved.inputs)
        assert output.sequences.tolist() == expected.tolist()
        assert output.pearl.accepted_tokens > 0
        assert is_gone(processes[victim].pid)
        (worker,) = set(psutil.Process().children()) - before
        processes = (worker, *worker.children())
    wait_for(lambda: all(is_gone(each.pid) for each in processes), "the end of the draft's ranks", 5.0)


@pytest.mark.slow
def test_a_rank_of_the_draft_that_is_killed_while_it_starts_is_started_anew(saved: Saved) -> None:
    before = set(psutil.Process().children())
    with saved.launch(2, 1) as pair:
        pair.generate(**saved.inputs, max_new_tokens=2)  # It does not wait for the draft.
        (worker,) = set(psutil.Process().children()) - before
        wait_for(lambda: bool(worker.children()), "the draft's other rank", RUN_SECONDS)
        worker.children()[0].kill()
        first = engine_for(pair.target, pair.draft).workers.worker
        wait_for(lambda: first is None or not first.is_alive, "the end of the draft's first rank", RUN_SECONDS)
        output = generate(pair, saved.inputs)
        assert output.sequences.tolist() == saved.expected().sequences.tolist()
        assert output.pearl.execution == "processes" and output.pearl.accepted_tokens > 0


@pytest.mark.slow
def test_nothing_listens_and_nothing_is_left(saved: Saved) -> None:
    me = psutil.Process()
    before = set(os.listdir("/dev/shm")), set(me.children(recursive=True)), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with saved.launch(2, 2) as pair:
            generate(pair, saved.inputs)
            processes = [me, *(set(me.children(recursive=True)) - before[1])]
            assert len(processes) == 4  # the target's other rank, the draft's two
            assert [each.net_connections(kind="inet") for each in processes] == [[]] * 4
            assert set(os.listdir("/dev/shm")) == before[0]
        ranks = processes[1:]
        wait_for(lambda: all(is_gone(each.pid) for each in ranks), "the end of all ranks", 5.0)  # noqa: B023
        with pytest.raises(PearlWorkerError, match="closed"):
            pair.generate(**saved.inputs)
        with pytest.raises(PearlWorkerError, match="closed"):
            pair.target.generate(**saved.inputs)
        pair.close()
        del pair
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before[2]


@pytest.mark.slow
def test_a_thousand_calls_leave_nothing_behind_in_any_rank(launched: LaunchedPair, seed: int) -> None:
    """Resident memory of this process, the ranks and the draft's worker: within 1 KiB per call; no descriptor more."""
    chance = random.Random(seed)
    kinds = ["greedy", "sampling", "processors", "end of text", "failing processor", "failing criterion", "refused"]
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]

    def growth_per_call(num_calls: int) -> float:
        sizes: list[list[int]] = []
        for index in range(num_calls):
            kind, inputs = chance.choice(kinds), random_prompts(chance, chance.choice((1, 2, 3)), (3, 20))
            lengths, is_cached = ("auto", 1, 4), chance.random() < 0.8
            config = PearlConfig(chance.choice(lengths), cache_memory="512KiB", prefix_cache=is_cached)
            options = {"do_sample": False, "max_new_tokens": chance.randint(3, 5), **KINDS[kind]()}
            try:
                launched.generate(**inputs, **options, pearl=config)
                assert not kind.startswith(("failing", "refused"))
            except (Deliberate, ValueError, NotImplementedError):
                assert kind.startswith(("failing", "refused"))
            if index % 10 == 0:
                gc.collect()
                sizes.append([resident_memory(), *(process.memory_info().rss for process in processes[1:])])
        return max(slope(list(of_one), 10) for of_one in zip(*sizes, strict=True))

    growth_per_call(200)  # until allocators and caches are as full as they get
    descriptors = [process.num_fds() for process in processes]
    growths = [growth_per_call(250)]
    if growths[0] > 1024:  # An allocator grows in steps; what still grows over three times as many calls is a leak.
        growths.append(growth_per_call(750))
    assert min(growths) <= 1024, f"bytes of resident memory per call: {growths}"
    assert [process.num_fds() for process in processes] == descriptors


@pytest.mark.slow
def test_all_ranks_compute_with_the_same_number_of_threads(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_pearl.launching.launch.available_cores", lambda: list(range(16)))
    before, num_threads = set(psutil.Process().children(recursive=True)), torch.get_num_threads()
    seen: list[int] = []
    with saved.launch(2, 2) as pair:
        generate(pair, saved.inputs)
        others = set(psutil.Process().children(recursive=True)) - before
        assert [each.environ()["OMP_NUM_THREADS"] for each in others] == ["4"] * 3
        torch.set_num_threads(8)
        processors = LogitsProcessorList([AtToken(3, lambda: seen.append(torch.get_num_threads()))])
        generate(pair, saved.inputs, assistant_model=None, logits_processor=processors)
        assert seen == [4] and torch.get_num_threads() == 8
        torch.set_num_threads(num_threads)


@pytest.mark.slow
def test_ranks_end_with_their_model(saved: Saved) -> None:
    target = hf_pearl.launch(saved.folders[0], target_tp=2, dtype=torch.float64).target
    process_ids = ranks_of(LaunchedPair(target, None)).process_ids
    generate(target, saved.inputs)
    del target
    gc.collect()
    assert all(map(is_gone, process_ids))


def test_a_forked_child_is_refused_the_ranks_of_its_parent_also_during_a_call(
    launched: LaunchedPair, saved: Saved, tmp_path: Path
) -> None:
    def check() -> None:
        with pytest.raises(PearlWorkerError, match="belong to another process"):
            generate(launched, saved.inputs)

    def call(criterion: Any) -> None:
        generate(launched, saved.inputs, stopping_criteria=StoppingCriteriaList([criterion]))

    before = generate(launched, saved.inputs).sequences.tolist()
    with call_of_another_thread(call):
        check_in_child(check, tmp_path)
    assert generate(launched, saved.inputs).sequences.tolist() == before


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_pair_is_not_copied(copied: Callable[[Any], Any], launched: LaunchedPair) -> None:
    with pytest.raises(TypeError, match=r"not copied or pickled.*`launch`"):
        copied(launched)


def test_ranks_start_where_the_standard_streams_are_closed(saved: Saved, tmp_path: Path) -> None:
    """What is opened then has the numbers that a rank's own streams were written over."""

    def check() -> None:
        os.closerange(0, 3)
        ranks = ChildRanks(RankModel(str(saved.folders[1]), "float64", "draft", 2, 1))
        ranks.wait_until_ready()
        ranks.close()

    check_in_child(check, tmp_path)


def test_ranks_are_refused_in_a_frozen_app(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its executable is the app, which would be run again, once for every rank."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(NotImplementedError, match=r"frozen app.*target_tp.*at 1"):
        saved.launch(1, 2)


SCRIPT = """
import json, os
import hf_pearl, torch
target, draft, target_tp, draft_tp = {target!r}, {draft!r}, {target_tp}, {draft_tp}
pair = hf_pearl.launch(target, draft, target_tp=target_tp, draft_tp=draft_tp, dtype=torch.float64)
inputs = {{"input_ids": torch.tensor({ids}), "attention_mask": torch.tensor({mask})}}
outputs = []
for options in ({{"do_sample": False}}, {{"do_sample": True, "temperature": 0.9, "top_k": 20}}):
    for config in (hf_pearl.PearlConfig(draft_length=4, seed=7), hf_pearl.PearlConfig(seed=7)):
        outputs.append(pair.generate(**inputs, pearl=config, max_new_tokens={new}, **options).tolist())
with open(f"{folder}/{{os.environ.get('RANK', 0)}}.json", "w") as file:
    json.dump(outputs, file)
print("done", flush=True)
{end}
"""


def script(saved: Saved, folder: Path, draft_tp: int, target_tp: int, end: str = "pair.close()") -> str:
    """A script that writes what every rank gets into a file of its own."""
    inputs = saved.inputs
    return SCRIPT.format(
        folder=folder,
        target=str(saved.folders[0]),
        draft=str(saved.folders[1]),
        target_tp=target_tp,
        draft_tp=draft_tp,
        ids=inputs["input_ids"].tolist(),
        mask=inputs["attention_mask"].tolist(),
        new=NEW_TOKENS,
        end=end,
    )


def run(arguments: list[str], folder: Path, **options: Any) -> dict[str, Any]:
    """The results that a command's ranks write into a folder, by rank."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS, env=environment, check=False, **options
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def expected_results(saved: Saved) -> list[Any]:
    expected = (saved.expected().sequences.tolist(), saved.expected(**SAMPLING).sequences.tolist())
    return [tokens for tokens in expected for _ in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["script", "stdin", "-c"])
def test_it_works_from_an_unguarded_script_standard_input_and_a_command(way: str, saved: Saved, tmp_path: Path) -> None:
    text = script(saved, tmp_path, 1, 2, end="")  # Nobody closes it: the end of the interpreter does.
    (tmp_path / "script.py").write_text(text)
    if way == "script":
        results = run([str(tmp_path / "script.py")], tmp_path, cwd=tmp_path)
    elif way == "stdin":
        results = run(["-"], tmp_path, input=text)
    else:
        results = run(["-c", text], tmp_path)
    assert results == {"0": expected_results(saved)}


@pytest.mark.slow
def test_it_works_in_a_notebook(saved: Saved, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cell = nbformat.v4.new_code_cell(script(saved, tmp_path, 2, 2))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    nbclient.NotebookClient(notebook, timeout=RUN_SECONDS).execute()
    assert json.loads((tmp_path / "0.json").read_text()) == expected_results(saved)


@pytest.mark.parametrize(
    ("sizes", "are_stopped"),
    [((1, 2), True), *(pytest.param((2, 2), are_stopped, marks=pytest.mark.slow) for are_stopped in (False, True))],
)
def test_ranks_do_not_outlive_a_killed_process(
    sizes: tuple[int, int], are_stopped: bool, saved: Saved, tmp_path: Path
) -> None:
    text = script(saved, tmp_path, *sizes, end="import time; time.sleep(1000)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith("done") for line in process.stdout)
        ranks = psutil.Process(process.pid).children(recursive=True)
        is_inline = sizes[0] == 1 and len(available_cores()) == 1  # a draft in one piece, without a core of its own
        assert len(ranks) == sum(sizes) - 1 - is_inline
        for rank in ranks if are_stopped else ():
            rank.suspend()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    wait_for(lambda: all(is_gone(each.pid) for each in ranks), "the end of the ranks", 5.0)


IN_A_FORK = """
child = os.fork()
if not child:
    try:
        pair.generate(**inputs)
    except hf_pearl.PearlWorkerError as error:
        pair.close()
        os._exit(41 if "fork" in str(error) else 42)
    os._exit(43)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 41, "a fork is no rank"
pair.close()
"""


def torchrun(saved: Saved, sizes: tuple[int, int], folder: Path, launcher: list[str]) -> dict[str, Any]:
    (folder / "script.py").write_text(script(saved, folder, *sizes, end=IN_A_FORK))
    return run([*launcher, str(folder / "script.py")], folder, cwd=folder)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param(name, sizes, marks=[] if (name, sizes) == ("llama", (2, 1)) else pytest.mark.slow)
        for name in ("llama", "qwen3", "embedded")
        for sizes in SIZES
    ],
)
def test_every_rank_of_torchrun_gets_the_tokens_of_one_process(
    name: str, sizes: tuple[int, int], pairs: Callable[[str], Saved], tmp_path: Path
) -> None:
    saved = pairs(name)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(sum(sizes))]
    results = torchrun(saved, sizes, tmp_path, launcher)
    assert results == dict.fromkeys(map(str, range(sum(sizes))), expected_results(saved))


@pytest.mark.slow
def test_it_uses_the_process_group_that_accelerate_has_made(saved: Saved, tmp_path: Path) -> None:
    end = "pair.close(); import torch.distributed as dist; dist.barrier()"  # It is still there.
    text = script(saved, tmp_path, 1, 2, end)
    (tmp_path / "script.py").write_text("from accelerate import Accelerator\nAccelerator(cpu=True)\n" + text)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(tmp_path / "script.py")]
    assert run(launcher, tmp_path, cwd=tmp_path) == dict.fromkeys("012", expected_results(saved))


@pytest.mark.slow
def test_torchrun_with_another_number_of_ranks_is_refused(saved: Saved, tmp_path: Path) -> None:
    text = textwrap.dedent(f"""
        import hf_pearl, json, os, torch.distributed
        try:
            hf_pearl.launch({str(saved.folders[0])!r}, target_tp=3)
        except ValueError as error:
            with open(os.environ["RANK"] + ".json", "w") as file:
                json.dump([str(error), torch.distributed.is_initialized()], file)
    """)
    (tmp_path / "script.py").write_text(text)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "script.py")]
    messages = run(launcher, tmp_path, cwd=tmp_path)
    assert set(messages) == {"0", "1"}
    assert all("2 ranks run" in message and "3 + 0" in message for message, _ in messages.values())
    assert not any(has_joined for _, has_joined in messages.values())  # No process group was left behind.
