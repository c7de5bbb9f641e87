"""The allocator fails at call n, for every n of a run: a typed error or the right answer; the next call is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import assert_nothing_held, enabled_for_tiny_models, noisy_copy, random_prompts, tiny_model
from transformers import PreTrainedModel

import hf_pearl
from hf_pearl import PagedPrefixCache, PearlConfig, PearlOutOfBlocksError
from hf_pearl.cache import paged_layer

CONFIG = PearlConfig(execution="inline", draft_length=4)
OPTIONS = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


class FailsOnce:
    """Stands before a function, and fails at its call `number` as it would fail without memory."""

    def __init__(self, function: Callable[..., Any], number: int, failure: Callable[[], Any]) -> None:
        self.function, self.number, self.failure = function, number, failure
        self.num_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return self.failure() if self.num_calls == self.number else self.function(*args, **kwargs)


def run(target: PreTrainedModel, draft: PreTrainedModel, prompts: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The answer; None where memory ran out."""
    try:
        return target.generate(**prompts, **OPTIONS, assistant_model=draft, pearl=CONFIG)
    except PearlOutOfBlocksError as error:
        assert "cache_memory" in str(error)
        return None


def no_memory() -> None:
    raise torch.OutOfMemoryError("allocation failed")


def fail_at_every_call(what: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks: a row gives way, or the draft stops drafting. Pools: nothing could be computed at all."""
    chance = random.Random(seed)
    target = tiny_model("llama", seed)
    draft = noisy_copy(target, 0.03, seed)
    prompts = random_prompts(chance, chance.choice((2, 3)), (20, 33))
    expected = target.generate(**prompts, **OPTIONS)
    number, num_answers = 0, 0
    while True:
        number += 1
        hf_pearl.release(target)
        with monkeypatch.context() as patch:
            if what == "a block":
                failing = FailsOnce(PagedPrefixCache._take, number, lambda: None)
                patch.setattr(PagedPrefixCache, "_take", lambda *args, failing=failing: failing(*args))
            else:
                failing = FailsOnce(paged_layer._memory, number, no_memory)
                patch.setattr(paged_layer, "_memory", failing)
            output = run(target, draft, prompts)
        assert_nothing_held(target, draft)
        if output is not None:
            num_answers += 1
            assert torch.equal(output, expected)
        assert torch.equal(target.generate(**prompts, **OPTIONS, assistant_model=draft, pearl=CONFIG), expected)
        assert_nothing_held(target, draft)
        if failing.num_calls < number:
            break
    assert number > 8
    assert num_answers > 1
    hf_pearl.release(target)


@pytest.mark.parametrize("what", ["a block", "a pool"])
def test_the_allocator_fails_at_every_call(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at_every_call(what, 31, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["a block", "a pool"])
@pytest.mark.parametrize("case", range(10))
def test_the_allocator_fails_at_every_call_of_twenty_runs(
    what: str, case: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at_every_call(what, seed + case, monkeypatch)
