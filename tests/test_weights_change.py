"""Weights that changed between two calls are seen: the answers, and what the draft guesses, equal a fresh engine's."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from models import (
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    left_padded,
    noisy_copy,
    own_random_state,
    tiny_model,
)
from transformers import PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.fingerprint import fingerprint

NUM_NEW = 12
PROMPT_LENGTH = 70  # some whole blocks, and a rest
PROMPT = left_padded([[random.Random(0).randrange(1, 64) for _ in range(PROMPT_LENGTH)]])
CONFIG = PearlConfig(draft_length=3, execution="inline")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def plain(model: Any) -> torch.Tensor:
    """transformers' own answer."""
    return model.generate(**PROMPT, do_sample=False, max_new_tokens=NUM_NEW)


def pearl(target: Any, draft: Any = None, config: PearlConfig = CONFIG) -> Any:
    """Our answer, with statistics."""
    options = {"do_sample": False, "max_new_tokens": NUM_NEW, "return_dict_in_generate": True}
    return target.generate(**PROMPT, **options, assistant_model=draft, pearl=config)


def train_a_step(model: PreTrainedModel, optimizer: type[torch.optim.Optimizer], **options: Any) -> None:
    """One step on the prompt, large enough to change what is said."""
    model.train()
    model(**PROMPT, labels=PROMPT["input_ids"]).loss.backward()
    optimizer(model.parameters(), **options).step()
    model.zero_grad()
    model.eval()


def other_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Other weights for `model`."""
    return noisy_copy(model, 0.3, seed=7).state_dict()


def copy_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), noisy_copy(model, 0.3, seed=8).parameters(), strict=True):
            parameter.copy_(new)


def write_in_inference_mode(model: PreTrainedModel) -> None:
    with torch.inference_mode():
        model.get_input_embeddings().weight.mul_(-1.0)


def change_one_value(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 4] += 5.0


def change_a_buffer(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq.mul_(1.5)


def new_parameter(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.weight = torch.nn.Parameter(torch.roll(layer.weight.detach(), 1, 0))


def new_parameter_in_the_place_of_a_deleted_one(model: PreTrainedModel) -> None:
    """It may have the id, the address and the version of the one that is gone."""
    layer = model.model.layers[0].self_attn.v_proj
    shape = layer.weight.shape
    del layer.weight
    with own_random_state(3):
        layer.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))


def new_data(model: PreTrainedModel) -> None:
    weight = model.get_input_embeddings().weight
    weight.data = torch.roll(weight.data, 1, 0)


def new_layer(model: PreTrainedModel) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[0])
    model.model.layers[1].self_attn.layer_idx = 1


def reordered_layers(model: PreTrainedModel) -> None:
    first, second = model.model.layers
    first.self_attn, second.self_attn = second.self_attn, first.self_attn
    first.self_attn.layer_idx, second.self_attn.layer_idx = 0, 1


def to_bfloat16_and_back(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16).to(torch.float64)


def average_of_weights(model: PreTrainedModel) -> None:
    parameters = list(model.parameters())
    vector = torch.nn.utils.parameters_to_vector(parameters).detach()
    torch.nn.utils.vector_to_parameters(0.7 * vector, parameters)


CHANGES: list[Any] = [
    pytest.param(lambda model: train_a_step(model, torch.optim.SGD, lr=0.5), id="a step of SGD"),
    pytest.param(lambda model: train_a_step(model, torch.optim.AdamW, lr=0.1), id="a step of AdamW"),
    pytest.param(
        lambda model: train_a_step(model, torch.optim.AdamW, lr=0.1, foreach=False, fused=True), id="a fused step"
    ),
    pytest.param(lambda model: model.load_state_dict(other_state(model)), id="load_state_dict"),
    pytest.param(lambda model: model.load_state_dict(other_state(model), assign=True), id="load_state_dict, assigned"),
    copy_in_place,
    write_in_inference_mode,
    change_one_value,
    change_a_buffer,
    new_parameter,
    new_parameter_in_the_place_of_a_deleted_one,
    new_data,
    new_layer,
    reordered_layers,
    to_bfloat16_and_back,
    average_of_weights,
]


def assert_prefix_cache_is_used(target: Any, draft: Any = None) -> None:
    """Call twice: the second call finds what the first has computed."""
    first, second = pearl(target, draft).pearl, pearl(target, draft).pearl
    assert second.prefilled_tokens < PROMPT_LENGTH / 2
    assert draft is None or second.draft_prefilled_tokens < PROMPT_LENGTH / 2
    assert second.prefilled_tokens <= first.prefilled_tokens


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_target_answers_as_transformers_does(change: Callable[[PreTrainedModel], object]) -> None:
    target = tiny_model("llama", 11)
    draft = noisy_copy(target, 0.02, seed=1)
    assert_prefix_cache_is_used(target, draft)
    assert_prefix_cache_is_used(target)
    before = plain(target)
    assert_varied(before[:, PROMPT_LENGTH:])
    change(target)
    expected = plain(target)
    if change not in (to_bfloat16_and_back,):  # which may leave the answer as it is
        assert not torch.equal(before, expected)
    for assistant in (draft, None):
        output = pearl(target, assistant)
        assert torch.equal(output.sequences, expected)
        assert output.pearl.prefilled_tokens == PROMPT_LENGTH
        assert output.pearl.draft_prefilled_tokens == (0 if assistant is None else 1)
    assert_prefix_cache_is_used(target, draft)
    assert_nothing_held(target)
    hf_pearl.release(target)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_draft_guesses_as_a_fresh_one_does(change: Callable[[PreTrainedModel], object]) -> None:
    """The draft is changed as the target was before, so that it is right at every position iff nothing is stale."""
    target, draft = tiny_model("llama", 11), tiny_model("llama", 11)
    change(target)
    expected = plain(target)
    assert_prefix_cache_is_used(target, draft)
    change(draft)
    output = pearl(target, draft)
    assert torch.equal(output.sequences, expected)
    assert output.pearl.draft_prefilled_tokens == PROMPT_LENGTH
    assert output.pearl.prefilled_tokens < PROMPT_LENGTH / 2
    assert output.pearl.acceptance_rate == 1.0
    hf_pearl.release(target)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_five_hundred_changes_in_a_row(part: int, seed: int) -> None:
    chance = random.Random(seed)
    changes = [getattr(change, "values", (change,))[0] for change in CHANGES]
    for _ in range(5):
        target = tiny_model("llama", chance.getrandbits(32))
        pair = (target, noisy_copy(target, 0.05, seed=1))
        weights = [copy.deepcopy(model.state_dict()) for model in pair]
        for _ in range(10):
            index = chance.randrange(2)
            pair[index].load_state_dict(weights[index])
            if chance.random() < 0.5:
                pearl(*pair)
            chance.choice(changes)(pair[index])
            assert torch.equal(pearl(*pair).sequences, plain(target))
        hf_pearl.release(target)


def with_adapters(model: PreTrainedModel) -> Any:
    """`model` with two LoRA adapters that change what it says; "first" is active."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    with own_random_state(5):
        adapted = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=32, **options), adapter_name="first")
        adapted.add_adapter("second", peft.LoraConfig(lora_alpha=64, **options))
    return adapted.eval()


def scale_adapters(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(3.0)


def train_adapters(model: Any) -> None:
    train_a_step(model, torch.optim.AdamW, lr=0.5, fused=True)


@contextlib.contextmanager
def kept(change: Callable[[Any], object], model: Any) -> Iterator[None]:
    """A change that lasts."""
    change(model)
    yield


ADAPTER_CHANGES: list[Any] = [
    pytest.param(lambda model: kept(lambda each: each.set_adapter("second"), model), id="set_adapter"),
    pytest.param(lambda model: model.disable_adapter(), id="disable_adapter"),
    pytest.param(lambda model: kept(lambda each: each.delete_adapter("first"), model), id="delete_adapter"),
    pytest.param(lambda model: kept(lambda each: each.unload(), model), id="unload"),
    pytest.param(lambda model: kept(scale_adapters, model), id="scale_layer"),
    pytest.param(lambda model: kept(train_adapters, model), id="a fused step"),
]


@pytest.mark.parametrize("change", ADAPTER_CHANGES)
def test_a_switched_adapter_is_seen(change: Callable[[Any], contextlib.AbstractContextManager[None]]) -> None:
    base = tiny_model("llama", 11)
    adapted = with_adapters(base)
    assert_prefix_cache_is_used(adapted, adapted)
    before = plain(adapted)
    with change(adapted):
        expected = plain(base)
        assert not torch.equal(before, expected)
        output = pearl(base, base)
        assert torch.equal(output.sequences, expected)
        assert output.pearl.prefilled_tokens == output.pearl.draft_prefilled_tokens == PROMPT_LENGTH
        assert output.pearl.acceptance_rate == 1.0
    assert torch.equal(pearl(base, base).sequences, plain(base))
    assert_prefix_cache_is_used(base, base)
    hf_pearl.release(base)


def test_a_merged_adapter_is_seen() -> None:
    """It says the same, rounding apart, so the keys that were computed before it do not count any more."""
    base = tiny_model("llama", 11)
    adapted = with_adapters(base)
    assert_prefix_cache_is_used(adapted)
    for change in (adapted.merge_adapter, adapted.unmerge_adapter):
        change()
        output = pearl(adapted)
        assert torch.equal(output.sequences, plain(adapted))
        assert output.pearl.prefilled_tokens == PROMPT_LENGTH
    hf_pearl.release(base)


def test_a_new_model_in_the_place_of_one_that_is_gone_starts_cold() -> None:
    """Whatever ids and addresses it inherits; some of its parameters must have inherited some."""
    num_inherited, ids, addresses = 0, set[int](), set[int]()
    for seed in range(4):
        target, draft = tiny_model("llama", seed, num_hidden_layers=1), tiny_model("llama", seed, num_hidden_layers=1)
        num_inherited += sum(id(each) in ids or each.data_ptr() in addresses for each in target.parameters())
        for assistant in (None, draft):
            output = pearl(target, assistant)
            assert torch.equal(output.sequences, plain(target))
            assert output.pearl.prefilled_tokens == PROMPT_LENGTH
        assert output.pearl.draft_prefilled_tokens == PROMPT_LENGTH
        assert output.pearl.acceptance_rate == 1.0
        gone = weakref.ref(target)
        ids |= {id(each) for each in target.parameters()}
        addresses |= {each.data_ptr() for each in target.parameters()}
        del target, draft, assistant, output
        gc.collect()
        assert gone() is None
    assert num_inherited


def test_a_write_that_nobody_can_see_needs_clear_cache() -> None:
    target = tiny_model("llama", 11)
    assert_prefix_cache_is_used(target)
    before = fingerprint(target)
    target.get_input_embeddings().weight.data.mul_(-1.0)
    assert fingerprint(target) == before, "it is seen now: say so in `clear_cache`"
    hf_pearl.clear_cache(target)
    output = pearl(target)
    assert torch.equal(output.sequences, plain(target))
    assert output.pearl.prefilled_tokens == PROMPT_LENGTH


def _replace(module: torch.nn.Linear) -> None:
    module.weight = torch.nn.Parameter(module.weight.data, requires_grad=False)


def _set_data(module: torch.nn.Linear, data: torch.Tensor) -> None:
    module.weight.data = data


MEMORY = bytearray(64)
TENSOR_CHANGES: dict[str, Callable[[torch.nn.Linear], object]] = {
    "in place": lambda module: module.weight.add_(1.0),
    "another parameter in the same memory": _replace,
    "another part of its memory": lambda module: _set_data(module, module.weight.data[1:]),
    "another storage in the same memory": lambda module: _set_data(module, weight_in_memory()),
    "another dtype in the same memory": lambda module: _set_data(module, module.weight.data.view(torch.int32)),
    "offloaded": lambda module: module.to("meta"),
}


def weight_in_memory() -> torch.Tensor:
    return torch.frombuffer(MEMORY, dtype=torch.float32).view(4, 4)


@pytest.mark.parametrize("change", TENSOR_CHANGES.values(), ids=TENSOR_CHANGES)
def test_every_change_of_a_tensor_is_told_from_what_it_was(change: Callable[[torch.nn.Linear], object]) -> None:
    """Both by looking at all of it, and by comparing it with what was found last."""
    module = torch.nn.Linear(4, 4, bias=False)
    module.weight = torch.nn.Parameter(weight_in_memory(), requires_grad=False)
    last = fingerprint(module)
    assert fingerprint(module, last) == fingerprint(module) == last
    change(module)
    assert fingerprint(module, last) == fingerprint(module) != last
    assert fingerprint(module, fingerprint(module)).tensors == fingerprint(module).tensors


def test_a_model_made_in_inference_mode_is_taken_for_changed_every_time() -> None:
    """Its tensors count no versions."""
    with torch.inference_mode():
        target = tiny_model("llama", 11)
        for factor in (1.0, -1.0):
            target.get_input_embeddings().weight.mul_(factor)
            output = pearl(target, target)
            assert torch.equal(output.sequences, plain(target))
            assert output.pearl.prefilled_tokens == PROMPT_LENGTH


@pytest.mark.parametrize("num_trained", [0, 1])
def test_what_is_trained_and_what_is_not_is_left_as_it_was(num_trained: int) -> None:
    """A call between two training steps: dropout modes, gradients and `requires_grad` are the user's."""
    target = tiny_model("llama", 11)
    target.train(bool(num_trained))
    target.model.layers[0].eval()
    target.get_input_embeddings().requires_grad_(False)
    target(**PROMPT, labels=PROMPT["input_ids"]).loss.backward()
    modes = [module.training for module in target.modules()]
    gradients = [None if each.grad is None else each.grad.clone() for each in target.parameters()]
    pearl(target, target)
    assert [module.training for module in target.modules()] == modes
    for parameter, gradient in zip(target.parameters(), gradients, strict=True):
        assert parameter.requires_grad == (gradient is not None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
