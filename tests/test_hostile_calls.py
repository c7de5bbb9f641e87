"""Calls that once broke the cache for those after them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import assert_nothing_held, enabled_for_tiny_models, make_draft, random_prompts, tiny_model
from transformers import DynamicCache, PreTrainedModel

import hf_pearl
from hf_pearl import PagedPrefixCache, PearlConfig, PearlOutOfBlocksError
from hf_pearl.cache.block_pool import BlockPool
from hf_pearl.compat import cache_argument
from hf_pearl.registry import engine_for

OPTIONS = {"do_sample": False, "max_new_tokens": 12}
INLINE = PearlConfig(execution="inline")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture
def target() -> Iterator[PreTrainedModel]:
    model = tiny_model("llama", 51, dtype=torch.float32)
    yield model
    hf_pearl.release(model)


def test_inference_mode_in_one_call_and_not_in_the_next(target: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(1), 2, (20, 31))
    expected = target.generate(**inputs, **OPTIONS)
    for is_on in (True, False, True):
        with torch.inference_mode(is_on):
            assert torch.equal(target.generate(**inputs, **OPTIONS, pearl=INLINE), expected)
    cache = PagedPrefixCache(target.config)
    for is_on in (True, False, True):
        with torch.inference_mode(is_on):
            assert torch.equal(target.generate(**inputs, **OPTIONS, **{cache_argument(target): cache}), expected)
        cache.reset()


def test_autocast_in_one_call_and_not_in_the_next(target: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(2), 2, (20, 31))
    for is_on in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            output = target.generate(**inputs, **OPTIONS, pearl=INLINE, return_dict_in_generate=True)
            assert output.pearl.prefilled_tokens == inputs["attention_mask"].sum()  # Nothing foreign was found.
            again = target.generate(**inputs, **OPTIONS, pearl=INLINE, return_dict_in_generate=True)
            assert again.pearl.prefilled_tokens == 2
        assert_nothing_held(target)


@pytest.mark.parametrize("execution", ["inline", "threads", "processes"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"pad_token_id": 0}])
def test_another_default_device_changes_nothing(
    options: dict[str, Any], execution: str, target: PreTrainedModel
) -> None:
    """Of tensors that are made without a device; `generate` itself makes none so."""
    inputs = random_prompts(random.Random(3), 3, (20, 31))
    if "pad_token_id" in options:
        inputs = {"input_ids": inputs["input_ids"]}
    draft = make_draft(target, "noisy", 52)
    config = PearlConfig(execution=execution, draft_length=3, seed=5)
    asked: dict[str, Any] = {**OPTIONS, **inputs, **options}
    expected = target.generate(**asked, assistant_model=draft, pearl=config)
    hf_pearl.release(target)
    with torch.device("meta"):
        if not asked["do_sample"]:
            assert torch.equal(target.generate(**asked), expected)
        for _ in range(2):  # The second finds the prompts in the cache.
            assert torch.equal(target.generate(**asked, assistant_model=draft, pearl=config), expected)
        assert_nothing_held(target, draft)
        hf_pearl.release(target)


def test_a_cache_that_was_reset_takes_another_dtype(target: PreTrainedModel) -> None:
    cache = PagedPrefixCache(target.config)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        states = torch.randn(2, 2, 5, 8, dtype=dtype)
        assert cache.update(states, states, 0)[0].dtype == dtype
        cache.reset()


def test_gradients_are_those_of_a_dynamic_cache(target: PreTrainedModel) -> None:
    ids = torch.arange(1, 20)[None]
    gradients = []
    for cache in (DynamicCache(), PagedPrefixCache(target.config)):
        target.zero_grad()
        target(input_ids=ids, labels=ids, **{cache_argument(target): cache}).loss.backward()
        gradients.append(target.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_a_first_update_that_does_not_fit_leaves_nothing_behind(target: PreTrainedModel) -> None:
    cache = PagedPrefixCache(target.config, max_blocks=4, block_size=4)
    with pytest.raises(PearlOutOfBlocksError):
        cache.update(torch.zeros(5, 2, 4, 8), torch.zeros(5, 2, 4, 8), 0)
    cache.check_integrity([])
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    assert cache.batch_size == 1


@pytest.mark.parametrize("num_blocks", [5, 6, 7, 8])
def test_answers_to_one_prompt_give_way_to_each_other(target: PreTrainedModel, num_blocks: int) -> None:
    """A sequence needs five blocks; two that share their prompt need seven."""
    inputs = random_prompts(random.Random(3), 1, (60,))
    options = {**OPTIONS, "max_new_tokens": 20}
    block = 2 * 2 * 2 * 8 * 4 * 16  # layers, keys and values, heads, head size, bytes, tokens of a block
    twice = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    config = PearlConfig(execution="inline", cache_memory=num_blocks * block)
    output = target.generate(**twice, **options, pearl=config, return_dict_in_generate=True)
    assert torch.equal(output.sequences, target.generate(**inputs, **options).repeat(2, 1))
    assert output.pearl.prefilled_tokens == 60
    assert_nothing_held(target)


@pytest.mark.parametrize("number", range(1, 60, 3))
def test_an_interrupt_while_blocks_change_hands(
    target: PreTrainedModel, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_prompts(random.Random(4), 2, (20, 31))
    expected = target.generate(**inputs, **OPTIONS)
    num_calls = 0

    def interrupted(pool: BlockPool, block: int, keep: bool) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == number:
            raise KeyboardInterrupt
        release(pool, block, keep)

    release = BlockPool.release
    target.generate(**inputs, **OPTIONS, assistant_model=target, pearl=INLINE)
    monkeypatch.setattr(BlockPool, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(20):
            target.generate(**inputs, **OPTIONS, assistant_model=target, pearl=INLINE)
    monkeypatch.undo()
    assert_nothing_held(target)
    assert torch.equal(target.generate(**inputs, **OPTIONS, assistant_model=target, pearl=INLINE), expected)
    assert all(cache.pool.num_referenced == 0 for cache in engine_for(target, target).caches.values())


def test_a_prompt_that_gives_nan_leaves_nothing_to_be_found(target: PreTrainedModel) -> None:
    """Masked attention multiplies what it does not see by zero, and a NaN reaches the tokens before it."""
    shared, bad = list(range(10, 50)), 7
    with torch.no_grad():
        target.get_input_embeddings().weight[bad] = torch.nan
    prompts = [torch.tensor([[*shared, last]]) for last in (bad, 5)]
    expected = target.generate(prompts[1], **OPTIONS)
    assert expected[0, len(shared) + 1 :].any()
    for prompt in (*prompts, prompts[1]):
        output = target.generate(prompt, **OPTIONS, pearl=INLINE, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert output.pearl.prefilled_tokens == 1
