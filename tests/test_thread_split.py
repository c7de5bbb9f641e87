"""How many threads the draft's worker gets, on more cores than there are here."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from models import enabled_for_tiny_models, make_draft, random_prompts, tiny_model
from transformers import PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.parallel import thread_split
from hf_pearl.parallel.thread_split import MAX_SECONDS, best_split, expected_rate, threads_of_draft
from hf_pearl.registry import engine_for

Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture
def pair() -> Iterator[Pair]:
    target = tiny_model("llama", seed=0)
    yield target, make_draft(target, "noisy", seed=1, noise=0.02)
    hf_pearl.release(target)


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the split can see; torch would take all of them."""
    monkeypatch.setattr(thread_split, "available_cores", lambda: list(range(16)))
    monkeypatch.setattr(thread_split, "torch", SimpleNamespace(get_num_threads=lambda: 16))


def amdahl(work: float, serial: float, memory: int) -> Callable[[int], float]:
    """Seconds of a forward by its threads: a part that only one can do; from `memory` threads on, more are no help."""
    return lambda threads: work * (serial + (1.0 - serial) / min(threads, memory))


@pytest.mark.parametrize(
    ("draft", "target", "expected"),
    [
        (amdahl(0.001, 0.0, 16), amdahl(1.0, 0.0, 16), 1),  # The draft is far ahead anyway.
        (amdahl(0.1, 0.0, 16), amdahl(0.8, 0.0, 4), 8),  # It guesses too little, and the target has cores to spare.
        (amdahl(0.1, 1.0, 16), amdahl(0.8, 0.0, 4), 1),  # More threads are no help to it.
        (amdahl(0.5, 0.0, 16), amdahl(0.5, 0.0, 16), 1),  # Both want all there are.
    ],
)
def test_the_draft_gets_more_threads_where_that_gains(
    draft: Callable[[int], float], target: Callable[[int], float], expected: int
) -> None:
    num_cores = 16
    asked = []

    def seconds(threads: int) -> tuple[float, float]:
        asked.append(threads)
        return draft(threads), target(num_cores - threads)

    assert best_split(seconds, num_cores // 2) == expected
    rates = {threads: expected_rate(draft(threads), target(num_cores - threads)) for threads in (1, 2, 4, 8)}
    assert max(rates.values()) <= 1.06 * rates[expected], rates
    assert asked == sorted(set(asked)), "something was measured twice"


def test_nothing_more_is_tried_when_the_time_is_over() -> None:
    now = itertools.count(step=MAX_SECONDS / 2)
    asked = []

    def seconds(threads: int) -> tuple[float, float]:
        asked.append(threads)
        return 1.0 / threads, 1.0

    assert best_split(seconds, 64, lambda: next(now)) == 2
    assert asked == [1, 2]


@pytest.mark.parametrize("num_cores", [1, 2, 3])
def test_where_there_is_one_core_for_the_draft_nothing_is_tried(
    num_cores: int, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_split, "available_cores", lambda: list(range(num_cores)))
    monkeypatch.setattr(thread_split, "_Trial", None)
    assert threads_of_draft(*pair) == 1


def test_what_torch_may_take_is_not_exceeded(pair: Pair, sixteen_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_split, "torch", SimpleNamespace(get_num_threads=lambda: 1))
    monkeypatch.setattr(thread_split, "_Trial", None)
    assert threads_of_draft(*pair) == 1


def test_the_worker_has_as_many_threads_and_the_answer_is_the_same(
    pair: Pair, sixteen_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out once, not again in the second call."""
    target, draft = pair
    tried = []

    def split(seconds: Callable[[int], tuple[float, float]], most: int) -> int:
        tried.append((most, *seconds(2)))  # real forwards of both models
        return 2

    monkeypatch.setattr(thread_split, "best_split", split)
    num_threads = torch.get_num_threads()
    prompt = random_prompts(random.Random(0), 2, [8, 20])
    expected = target.generate(**prompt, do_sample=False, max_new_tokens=20)
    config = PearlConfig(draft_length=3, execution="processes")
    for _ in range(2):
        output = target.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=20,
            assistant_model=draft,
            pearl=config,
            return_dict_in_generate=True,
        )
        assert torch.equal(output.sequences, expected)
        assert (output.pearl.execution, output.pearl.draft_cores) == ("processes", 2)
        worker = engine_for(target, draft).workers.worker
        assert worker is not None and worker.num_cores == 2
    assert torch.get_num_threads() == num_threads
    (only,) = tried
    assert only[0] == 8 and min(only) > 0.0


def test_other_dtypes_are_tried_anew(pair: Pair, sixteen_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = pair
    tried = []
    monkeypatch.setattr(thread_split, "best_split", lambda seconds, most: tried.append(most) or 1)
    workers, config = engine_for(target, draft).workers, PearlConfig()
    for dtype, num_tried in ((torch.float32, 1), (torch.float32, 1), (torch.float64, 2)):
        target.to(dtype)
        workers.share_cores(config, target, draft, None)
        assert len(tried) == num_tried
    workers.close()
    workers.share_cores(config, target, draft, None)
    assert len(tried) == 3, "models that were moved are not what was tried"
