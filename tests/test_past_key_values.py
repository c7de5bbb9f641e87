"""`PagedPrefixCache` as a transformers cache, without `pearl`: every method means what it means for `DynamicCache`."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, enabled_for_tiny_models, left_padded, tiny_model
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from hf_pearl import PagedPrefixCache, PearlOutOfBlocksError, PearlUnsupportedModelError
from hf_pearl.cache import batch as batch_of_rows
from hf_pearl.cache.paged_layer import EvenRows
from hf_pearl.compat import cache_argument

BLOCK_SIZE = 4
LENGTHS = (9, 23, 40)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def padded_prompts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, torch.Tensor]:
    chance = random.Random(5)
    return left_padded([[chance.randrange(1, 64) for _ in range(length)] for length in lengths])


def new_cache(model: PreTrainedModel, **options: Any) -> PagedPrefixCache:
    return PagedPrefixCache(model.config, **{"block_size": BLOCK_SIZE, **options})


BEAMS = {"num_beams": 3, "num_return_sequences": 2}


@pytest.mark.parametrize(
    ("architecture", "options"),
    [*((architecture, {}) for architecture in ARCHITECTURES), ("llama", BEAMS), ("gemma2", BEAMS), ("gpt2", BEAMS)],
    ids=str,
)
def test_generate_gives_the_same_tokens(architecture: str, options: dict[str, Any]) -> None:
    model, inputs = tiny_model(architecture, 1), padded_prompts()
    options = {**options, "do_sample": False, "max_new_tokens": 30}
    cache = new_cache(model)
    output = model.generate(**inputs, **options, **{cache_argument(model): cache})
    assert torch.equal(output, model.generate(**inputs, **options, **{cache_argument(model): DynamicCache()}))
    assert cache.get_seq_length() == output.shape[1] - 1
    cache.check_integrity([])
    cache.reset()
    assert (cache.get_seq_length(), cache.pool.num_referenced) == (0, 0)
    assert torch.equal(model.generate(**inputs, **options, **{cache_argument(model): cache}), output)


def test_a_second_turn_computes_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model("llama", 1), padded_prompts((20,))
    cache, options = new_cache(model), {"do_sample": False, "max_new_tokens": 10}
    first = model.generate(**inputs, **options, **{cache_argument(model): cache})
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    second = model.generate(torch.cat([first, inputs["input_ids"]], dim=1), **options, **{cache_argument(model): cache})
    assert lengths[0] == 21  # the last token of the first answer has not been computed yet
    assert torch.equal(second, model.generate(torch.cat([first, inputs["input_ids"]], dim=1), **options))


def test_assisted_generation_of_transformers_rolls_it_back() -> None:
    target, draft, inputs = tiny_model("qwen3", 1), tiny_model("qwen3", 2), padded_prompts((20,))
    options = {"do_sample": False, "max_new_tokens": 30, "assistant_model": draft}
    cache = new_cache(target)
    assert torch.equal(
        target.generate(**inputs, **options, **{cache_argument(target): cache}), target.generate(**inputs, **options)
    )


Operation = Callable[[Any], None]
OPERATIONS: dict[str, Operation] = {
    "crop": lambda cache: cache.crop(-3),
    "crop nothing": lambda cache: cache.crop(0),
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "batch_select_indices by mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "deepcopy": lambda cache: None,
    "pickle": lambda cache: None,
    "reset": lambda cache: cache.reset(),  # DynamicCache's only zeroed its rows in earlier versions
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("room", [4, batch_of_rows.MIN_EXPECTED_LENGTH])
def test_operations_mean_what_they_mean_there(seed: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random operations and updates, in both caches; keys and values are compared after every update."""
    monkeypatch.setattr(batch_of_rows, "MIN_EXPECTED_LENGTH", room)
    chance, model = random.Random(seed), tiny_model("llama", 1)
    ours, theirs, batch = new_cache(model), DynamicCache(), 3
    generator = torch.Generator().manual_seed(seed)
    for _ in range(40):
        name = chance.choice([*OPERATIONS, *["update"] * 6])
        if name == "update" or not theirs.get_seq_length():
            num_new = chance.randint(1, 7)
            for layer in range(2):
                key, value = torch.randn(2, batch, 2, num_new, 4, generator=generator)
                expected, got = (cache.update(key, value, layer) for cache in (theirs, ours))
                assert all(torch.equal(mine, yours) for mine, yours in zip(got, expected, strict=True))
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_mask_sizes(5, 1) == theirs.get_mask_sizes(5, 1)
        elif name == "deepcopy":
            ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
        elif name == "pickle":
            ours, theirs = (pickle.loads(pickle.dumps(cache)) for cache in (ours, theirs))
        elif not (name.startswith(("reorder", "batch_select")) and batch < 3) and not ("mask" in name and batch != 3):
            for cache in (ours, theirs):
                OPERATIONS[name](cache)
            if name == "reset":  # Theirs kept its rows in earlier versions, as zeros.
                theirs = DynamicCache()
            batch = 3 if name == "reset" else theirs.layers[0].keys.shape[0]
            if batch > 12:
                break
        ours.check_integrity([])


def test_rows_share_memory_until_they_differ() -> None:
    model = tiny_model("llama", 1)
    cache = new_cache(model)
    states = torch.randn(1, 2, 40, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    cache.batch_repeat_interleave(16)
    assert cache.pool.num_referenced == 10
    for layer in range(2):
        cache.update(states[:, :, :1].expand(16, -1, -1, -1), states[:, :, :1].expand(16, -1, -1, -1), layer)
    assert cache.pool.num_referenced == 26


def test_rows_are_read_as_a_view_however_long_they_become(monkeypatch: pytest.MonkeyPatch) -> None:
    """They move when their room for 8 tokens is used up, and then have room for 18, and for 42."""
    monkeypatch.setattr(batch_of_rows, "MIN_EXPECTED_LENGTH", 4)
    cache, places = new_cache(tiny_model("llama", 1)), set()
    states = torch.randn(3, 2, 40, 4)
    cache.update(states[:, :, :3], states[:, :, :3], 0)
    for length in range(4, 41):
        new = states[:, :, length - 1 : length]
        keys, values = cache.update(new, new, 0)
        assert torch.equal(keys, states[:, :, :length]) and torch.equal(values, keys)
        assert isinstance(cache._row_slots.slots, EvenRows)
        places.add(cache._row_slots.slots)
        cache.check_integrity([])
    assert len(places) == 3
    assert cache.pool.num_referenced == 30


def test_keys_saved_for_a_backward_pass_are_not_written_to() -> None:
    cache = new_cache(tiny_model("llama", 1))
    query, states = torch.randn(2, 2, 1, 4, requires_grad=True), torch.randn(2, 2, 3, 4)
    scores = []
    for _ in range(2):
        keys, _ = cache.update(states, states, 0)
        scores.append((query @ keys.transpose(2, 3)).sum())
    torch.stack(scores).sum().backward()
    assert torch.allclose(query.grad, 3 * states.sum(dim=2, keepdim=True))


def test_a_pickled_cache_is_as_large_as_what_is_in_use() -> None:
    cache = new_cache(tiny_model("llama", 1))
    states = torch.randn(1, 2, 40, 8)
    cache.update(states, states, 1)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 2 * 2 * states.nbytes
    assert torch.equal(pickle.loads(pickled).states()[1][0], states)


def test_a_copy_takes_only_what_is_in_use() -> None:
    model, inputs = tiny_model("llama", 1), padded_prompts((20,))
    cache = new_cache(model)
    model.generate(**inputs, max_new_tokens=5, do_sample=False, **{cache_argument(model): cache})
    copied = copy.deepcopy(cache)
    cache.crop(-10)
    assert (copied.get_seq_length(), cache.get_seq_length()) == (24, 14)
    keys = [each.layers[1].read(each.batch_rows[0].slots(BLOCK_SIZE, 0, 14))[0] for each in (cache, copied)]
    assert torch.equal(*keys)


def test_another_batch_size_is_refused() -> None:
    cache = new_cache(tiny_model("llama", 1))
    cache.update(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), 0)
    with pytest.raises(ValueError, match=r"holds 2 rows, got .* 3.*reset"):
        cache.update(torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 4), 0)


def test_a_cache_for_another_model_is_refused() -> None:
    cache = new_cache(tiny_model("llama", 1))
    with pytest.raises(ValueError, match=r"made for a model of 2 layers, got layer 2"):
        cache.update(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), 2)


@pytest.mark.parametrize("rows", [[5, 0], [-1, 0]])
def test_rows_that_are_not_there_are_refused(rows: list[int]) -> None:
    cache = new_cache(tiny_model("llama", 1))
    for layer_index in range(2):
        cache.update(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4), layer_index)
    with pytest.raises(IndexError, match=r"holds 2 rows, counted from 0; got the row (5|-1)"):
        cache.reorder_cache(torch.tensor(rows))
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert (cache.batch_size, cache.get_seq_length(), cache.pool.num_referenced) == (-1, 0, 0)


@pytest.mark.parametrize(
    ("model_type", "what"),
    [
        ("qwen3_next", "'linear_attention'"),
        ("jamba", "'linear_attention'"),
        ("recurrent_gemma", "'(linear_attention|recurrent)'"),
        ("mamba", "no attention layers"),
        ("rwkv", "no attention layers"),
    ],
)
def test_a_model_with_other_state_is_refused_by_name(model_type: str, what: str) -> None:
    with pytest.raises(PearlUnsupportedModelError, match=f"'{model_type}' has .*{what}.*past_key_values"):
        PagedPrefixCache(AutoConfig.for_model(model_type))


def test_a_full_cache_leaves_the_rows_as_they_were() -> None:
    cache = new_cache(tiny_model("llama", 1), max_blocks=5)
    states = torch.randn(2, 2, 8, 4)
    cache.update(states, states, 0)
    with pytest.raises(PearlOutOfBlocksError, match="the paged cache is full"):
        cache.update(states, states, 0)
    cache.check_integrity([])
    assert (cache.get_seq_length(), cache.pool.num_referenced) == (8, 4)
