"""Keys and values in 8 bits: how far off they are, what they weigh, and that drafts still change nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from models import assert_nothing_held, assert_varied, enabled_for_tiny_models, noisy_copy, random_prompts, tiny_model

import hf_pearl
from hf_pearl import PagedPrefixCache, PearlConfig
from hf_pearl.cache.paged_layer import FLOAT8, SlotPool
from hf_pearl.cache.sizing import CacheNeeds
from hf_pearl.registry import engine_for

EIGHT_BIT = PearlConfig(execution="inline", cache_dtype="float8_e4m3fn", draft_length=4)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_value_is_off_by_a_sixteenth_of_itself_at_most(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(1, 3, 500, 16, generator=generator) * torch.logspace(-6, 6, 500)[None, None, :, None]
    states[0, 1, 7] = 0
    states = states.to(dtype)
    pool = SlotPool(512, states, eight_bit=True)
    for slots in (slice(5, 505), torch.randperm(512, generator=generator)[:500]):
        pool.write(slots, states)
        scale = states.abs().amax(dim=-1, keepdim=True).double() / torch.finfo(FLOAT8).max
        error = (pool.read(slots).double() - states.double()).abs()
        bound = torch.maximum(states.double().abs() / 16, scale / 2**10) * (1.01 if dtype == torch.bfloat16 else 1.0001)
        assert (error <= bound + states.double().abs() * torch.finfo(dtype).eps).all()
        assert error.max() > 0


def test_it_takes_half_the_memory_of_bfloat16() -> None:
    model = tiny_model("llama", 1, head_dim=64).to(torch.bfloat16)
    plain, eight_bit = (CacheNeeds.of(model, each).bytes_per_block() for each in (False, True))
    assert 0.5 < eight_bit / plain < 0.54
    states = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    for is_eight_bit, num_bytes in ((False, plain), (True, eight_bit)):
        cache = PagedPrefixCache(model.config, 8, eight_bit=is_eight_bit)
        for layer in range(2):
            cache.update(states, states, layer)
        assert cache.num_bytes == 8 * num_bytes


def test_any_draft_and_any_schedule_give_the_same_tokens() -> None:
    """What is kept of a token depends on this token alone, not on the draft tokens that stood beside it."""
    target = tiny_model("llama", 41)
    inputs = random_prompts(random.Random(41), 3, (9, 30))
    options = {"do_sample": False, "max_new_tokens": 50}
    expected = target.generate(**inputs, **options, pearl=EIGHT_BIT)
    assert_varied(expected[:, inputs["input_ids"].shape[1] :])
    for draft in (noisy_copy(target, 0.03, 1), tiny_model("llama", 42), target):
        for config in (EIGHT_BIT, replace(EIGHT_BIT, draft_length=9, overlap=False, prefix_cache=False)):
            output = target.generate(**inputs, **options, assistant_model=draft, pearl=config)
            assert torch.equal(output, expected)
    assert not torch.equal(target.generate(**inputs, **options), expected)
    assert_nothing_held(target)


@pytest.mark.parametrize("execution", ["threads", "processes"])
def test_both_lanes_keep_8_bits(execution: str) -> None:
    target = tiny_model("llama", 43)
    config = replace(EIGHT_BIT, execution=execution)
    inputs = random_prompts(random.Random(43), 1, (30,))
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=30, pearl=EIGHT_BIT)
    output = target.generate(
        **inputs, do_sample=False, max_new_tokens=30, assistant_model=target, pearl=config, return_dict_in_generate=True
    )
    assert torch.equal(output.sequences, expected)
    assert output.pearl.acceptance_rate == 1.0  # A draft with other keys and values would not guess everything.
    assert all(cache.eight_bit for cache in engine_for(target, target).caches.values())
    hf_pearl.release(target)
