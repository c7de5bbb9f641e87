"""Nothing leaks and nothing is left broken: memory, threads, descriptors, blocks; interrupts; several threads."""

from __future__ import annotations

import ctypes
import gc
import itertools
import random
import statistics
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from callbacks import CountingProcessor, Deliberate, Raising, RecordingStreamer, SumCriterion
from conftest import take_stock
from models import (
    EXECUTIONS,
    IN_PROCESS,
    assert_nothing_held,
    enabled_for_tiny_models,
    expected_warnings,
    make_draft,
    random_prompts,
    tiny_model,
)
from transformers import PreTrainedModel

import hf_pearl
from hf_pearl import PagedPrefixCache, PearlConfig
from hf_pearl.cache.attention import paged_attention
from hf_pearl.decoding import schedule
from hf_pearl.parallel.lane import ModelLane
from hf_pearl.registry import engine_for, engines_of

TIMEOUT = 120.0  # seconds: of anything that waits for another thread


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def tiny_pair(seed: int, num_hidden_layers: int = 1) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target and a draft that is often right."""
    target = tiny_model("llama", seed, num_hidden_layers=num_hidden_layers)
    return target, make_draft(target, "noisy", seed, noise=0.02)


class RaisingStreamer(RecordingStreamer):
    """Fails at its third token."""

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.seen) == 4:
            raise Deliberate("put")


def failing(kind: Callable[[], Any], num_calls: int = 3) -> list[Any]:
    """A list of one callback that raises."""
    return [Raising(kind(), num_calls)]


# What a call is given, made anew for each; those that fail raise `Deliberate` or `ValueError`.
KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "processors": lambda: {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "callbacks": lambda: {"logits_processor": [CountingProcessor()], "stopping_criteria": [SumCriterion(7)]},
    "streamer": lambda: {"streamer": RecordingStreamer()},
    "outputs": lambda: {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    "end of text": lambda: {"eos_token_id": list(range(20)), "pad_token_id": 0},
    "failing processor": lambda: {"logits_processor": failing(CountingProcessor)},
    "failing criterion": lambda: {"stopping_criteria": failing(lambda: SumCriterion(1000))},
    "failing streamer": lambda: {"streamer": RaisingStreamer()},
    "refused": lambda: {"num_beams": 2},
}


def make_a_call(pair: tuple[PreTrainedModel, PreTrainedModel], chance: random.Random, execution: str) -> None:
    """A short call of any kind; failures that are meant are swallowed."""
    target, draft = pair
    kind = chance.choice(list(KINDS))
    inputs = random_prompts(chance, chance.choice((1, 1, 1, 2, 3)), (3, 20, 40))
    config = PearlConfig(
        draft_length=chance.choice(("auto", 1, 4)),
        execution=execution,
        overlap=chance.random() < 0.7,
        cache_memory="256KiB",
        prefix_cache=chance.random() < 0.8,
    )
    options = {"do_sample": False, "max_new_tokens": chance.randint(3, 5), **KINDS[kind]()}
    assistant = chance.choice((draft, draft, draft, target, None))
    try:
        target.generate(**inputs, **options, assistant_model=assistant, pearl=config)
        assert not kind.startswith(("failing", "refused"))
    except (Deliberate, ValueError, NotImplementedError):
        assert kind.startswith(("failing", "refused"))


def resident_memory() -> int:
    """Bytes, without what the allocator only keeps for later (where it can be told to give that back)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return psutil.Process().memory_info().rss


def workers() -> list[psutil.Process]:
    """The draft lanes' processes."""
    return [child for child in psutil.Process().children() if "hf_pearl.parallel.workers.worker" in child.cmdline()]


def slope(values: list[int], distance: int) -> float:
    """Median of the slopes between all pairs of values that lie `distance` calls apart each (Theil and Sen)."""
    return statistics.median(
        (values[j] - values[i]) / ((j - i) * distance) for i, j in itertools.combinations(range(len(values)), 2)
    )


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Collections inside look only at what was made inside, and so take no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def growth_per_call(
    pair: tuple[PreTrainedModel, PreTrainedModel], chance: random.Random, execution: str, num_calls: int
) -> float:
    """Bytes of resident memory per call, here or in the workers; nothing else may be left behind by any."""
    before, sizes, of_workers = take_stock(), [], []
    num_descriptors = sum(worker.num_fds() for worker in workers())
    with frozen_heap():
        for index in range(num_calls):
            make_a_call(pair, chance, execution)
            assert_nothing_held(*pair)
            if index % 10 == 0:
                gc.collect()
                sizes.append(resident_memory())
                of_workers.append(sum(worker.memory_info().rss for worker in workers()))
                assert not (leaked := take_stock().beyond(before)), f"left by call {index} or one before it: {leaked}"
    assert sum(worker.num_fds() for worker in workers()) == num_descriptors
    return max(slope(sizes, 10), slope(of_workers, 10))


def run_calls(execution: str, num_calls: int, seed: int) -> None:
    """Fail unless `num_calls` calls leave the process as it was, its memory within 1 KiB per call.

    Two stages: an allocator grows in steps, and every thread may open another of its arenas; what still grows over
    three times as many calls is a leak.
    """
    pair, chance = tiny_pair(0), random.Random(seed)
    for _ in range(120):  # every kind, until allocators and caches are as full as they get
        make_a_call(pair, chance, execution)
    stages = (growth_per_call(pair, chance, execution, num) for num in (num_calls, 3 * num_calls))
    growths = list(itertools.takewhile(lambda growth: growth > 1024, stages))
    assert len(growths) < 2, f"bytes of resident memory per call: {growths}"
    for model in pair:
        hf_pearl.release(model)


@pytest.mark.parametrize("execution", IN_PROCESS)
def test_a_thousand_mixed_calls_leave_nothing_behind(execution: str, seed: int) -> None:
    run_calls(execution, 1000 // len(IN_PROCESS), seed)


@pytest.mark.slow
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("part", range(4))
def test_twenty_thousand_mixed_calls_leave_nothing_behind(part: int, execution: str, seed: int) -> None:
    run_calls(execution, 20_000 // 4 // len(EXECUTIONS), seed)


def test_a_leak_would_be_seen() -> None:
    """2 KiB a call, in steps of 128 KiB as an allocator takes them, beside a jump; and nothing but the jump."""
    noise = random.Random(0)
    leaking = [(call * 2048 // 131072) * 131072 + noise.randrange(8192) for call in range(0, 500, 10)]
    still = [noise.randrange(8192) for _ in range(0, 500, 10)]
    for values in (leaking, still):
        values[20:] = [value + 700_000 for value in values[20:]]
    assert slope(leaking, 10) > 1024 > slope(still, 10)


PROMPT = random_prompts(random.Random(0), 2, (40,))


def answer(model: PreTrainedModel) -> torch.Tensor:
    """transformers' own."""
    return model.generate(**PROMPT, do_sample=False, max_new_tokens=10)


def pearl_answer(pair: tuple[PreTrainedModel, PreTrainedModel], execution: str, **options: Any) -> torch.Tensor:
    """Ours."""
    config = PearlConfig(draft_length=3, execution=execution)
    options = {"do_sample": False, "max_new_tokens": 10, **options}
    return pair[0].generate(**PROMPT, **options, assistant_model=pair[1], pearl=config)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_release_gives_the_pools_back(execution: str) -> None:
    pair = tiny_pair(1)
    before = take_stock()
    pearl_answer(pair, execution)
    caches = engine_for(*pair).caches.values()
    pools = [weakref.ref(each) for cache in caches for layer in cache.layers if layer.pools for each in layer.pools]
    assert len(pools) == 2 * (1 + (execution != "processes"))  # keys and values of one layer
    del caches
    hf_pearl.release(pair[1])
    assert not [pool for pool in pools if pool() is not None]
    assert engines_of(pair[0]) == engines_of(pair[1]) == []
    assert not take_stock().beyond(before)
    assert torch.equal(pearl_answer(pair, "inline"), answer(pair[0]))


@pytest.mark.parametrize("kept", ["target", "draft", "neither"])
def test_an_engine_ends_with_either_of_its_models(kept: str) -> None:
    target, draft = tiny_pair(1)
    pearl_answer((target, draft), "threads")
    engine = weakref.ref(engine_for(target, draft))
    assert engine() is not None
    if kept != "target":
        del target
    if kept != "draft":
        del draft
    gc.collect()
    assert engine() is None


def raising_forward(error: type[BaseException], num_calls: int) -> Callable[..., None]:
    """A hook that raises in the `num_calls`-th forward after it was set."""
    calls = 0

    def hook(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == num_calls:
            raise error(f"forward {calls}")

    return hook


@contextmanager
def interrupted(pair: tuple[PreTrainedModel, PreTrainedModel], where: str, num_calls: int) -> Iterator[dict[str, Any]]:
    """An interrupt in a forward of either model, or in a callback, whose argument is given."""
    error = KeyboardInterrupt
    if where in ("target", "draft"):
        layer = pair[where == "draft"].model.layers[0].mlp  # behind the layer's attention: keys are half written
        handle = layer.register_forward_pre_hook(raising_forward(error, num_calls))
        yield {}
        handle.remove()
    elif where == "criterion":
        yield {"stopping_criteria": [Raising(SumCriterion(1000), num_calls, error)]}
    elif where == "processor":
        yield {"logits_processor": [Raising(CountingProcessor(), num_calls, error)]}
    else:
        streamer = RecordingStreamer()
        streamer.put = Raising(streamer.put, num_calls, error)
        yield {"streamer": streamer}


def in_threads(functions: list[Callable[[], None]]) -> None:
    """Run all at the same time; raise what one of them raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions), timeout=TIMEOUT)

    def run(function: Callable[[], None]) -> None:
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("execution", IN_PROCESS)
@pytest.mark.parametrize("where", ["target", "draft", "criterion", "processor", "streamer"])
def test_after_an_interrupt_the_next_call_is_right(where: str, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "STEP_TIMEOUT", 10 * TIMEOUT)  # nobody may wait for a lane that has ended
    pair = tiny_pair(2)
    expected = answer(pair[0])
    modes = [model.training for model in pair]
    for num_calls in (1, 2, 4):
        with interrupted(pair, where, num_calls) as callbacks:
            if where == "draft" and execution == "threads":  # It ends the lane; the call goes on without a draft.
                answers: list[torch.Tensor] = []
                with expected_warnings() as warnings:
                    in_threads([lambda: answers.append(pearl_answer(pair, execution))])  # noqa: B023
                assert torch.equal(answers[0], expected)
                assert ["draft lane" in warning for warning in warnings] == [True]
            else:
                with pytest.raises(KeyboardInterrupt):
                    pearl_answer(pair, execution, **callbacks)
        assert_nothing_held(*pair)
        assert [model.training for model in pair] == modes
        assert torch.equal(pearl_answer(pair, execution), expected)
        assert torch.equal(answer(pair[0]), expected)
    hf_pearl.release(pair[0])


@pytest.mark.parametrize("execution", IN_PROCESS)
def test_two_threads_on_one_pair_take_turns_and_are_both_right(execution: str) -> None:
    pair, chance = tiny_pair(3), random.Random(0)
    calls = [random_prompts(chance, 1, (5, 40)) for _ in range(6)]
    expected = [pair[0].generate(**each, do_sample=False, max_new_tokens=8) for each in calls]

    def run(order: list[int]) -> None:
        for index in order:
            options = {"do_sample": False, "max_new_tokens": 8, "assistant_model": pair[1]}
            output = pair[0].generate(**calls[index], **options, pearl=PearlConfig(execution=execution))
            assert torch.equal(output, expected[index])

    in_threads([lambda: run([0, 1, 2, 3, 4, 5]), lambda: run([3, 0, 5, 1, 4, 2])])
    assert_nothing_held(*pair)
    hf_pearl.release(pair[0])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_third_thread_that_calls_the_target_meanwhile_gets_what_it_gets_alone(
    attention: str, architecture: str
) -> None:
    """Also where its forward begins beside a call and ends after it, or the other way round."""
    target = tiny_model(architecture, 4, num_hidden_layers=4)
    if (architecture, attention) != ("gemma2", "sdpa"):  # as made, it has an attention of the tests' own
        target.set_attn_implementation(attention)
    pair = (target, make_draft(target, "noisy", 4))
    expected, inputs = answer(target), {"input_ids": PROMPT["input_ids"]}
    with torch.no_grad():
        alone = target(**inputs).logits
    is_done = threading.Event()

    def call() -> None:
        try:
            for _ in range(4):
                assert torch.equal(pearl_answer(pair, "threads"), expected)
        finally:
            is_done.set()

    def look_on() -> None:
        num_forwards = 0
        while not is_done.is_set() or not num_forwards:
            with torch.no_grad():
                torch.testing.assert_close(target(**inputs).logits, alone, rtol=1e-9, atol=1e-9)
            num_forwards += 1

    in_threads([call, look_on])
    assert target.config._attn_implementation != "hf_pearl_paged"
    hf_pearl.release(target)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("switches_to", ["paged", "original"])
def test_a_forward_during_which_the_attention_is_switched_is_right(switches_to: str, attention: str) -> None:
    """What a forward of another thread sees if a call begins or ends in the middle of it."""
    target = tiny_model("llama", 5, num_hidden_layers=4)
    target.set_attn_implementation(attention)
    ModelLane(target, PagedPrefixCache(target.config, 8))  # makes the paged attention known
    alone, scope = target(PROMPT["input_ids"]).logits, paged_attention(target)
    if switches_to == "original":
        scope.__enter__()

    def switch(*args: Any) -> None:
        if switches_to == "paged":
            scope.__enter__()
        else:
            scope.__exit__(None, None, None)

    handle = target.model.layers[2].register_forward_pre_hook(switch)
    torch.testing.assert_close(target(PROMPT["input_ids"]).logits, alone, rtol=1e-12, atol=1e-12)
    handle.remove()
    if switches_to == "paged":
        scope.__exit__(None, None, None)
    assert target.config._attn_implementation == attention
