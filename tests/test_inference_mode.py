"""Forwards in inference mode leave nothing behind that could not be trained on, and nobody sees their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from architectures import FAMILIES, build
from models import enabled_for_tiny_models, left_padded, noisy_copy, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from hf_pearl import PearlConfig
from hf_pearl.cache import PagedPrefixCache
from hf_pearl.decoding.messages import Window
from hf_pearl.parallel.inference import may_use_inference_mode
from hf_pearl.parallel.lane import ModelLane

PROMPT = left_padded([[5, 9, 2, 7, 11, 3]])
EXECUTIONS = ("inline", "threads")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def generate(model: PreTrainedModel, execution: Any = "inline", **arguments: Any) -> torch.Tensor:
    draft = noisy_copy(model, 0.05, seed=1)
    config = PearlConfig(draft_length=2, execution=execution)
    output = model.generate(**PROMPT, assistant_model=draft, pearl=config, max_new_tokens=8, **arguments)
    assert isinstance(output, torch.Tensor)
    return output


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that a module keeps, under whatever name."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, torch.Tensor):
                yield value


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_no_family_keeps_anything_that_a_forward_computed(family: Any) -> None:
    model = build(family)
    assert may_use_inference_mode(model)
    before = [id(tensor) for tensor in tensors_of(model)]
    lane = ModelLane(model, PagedPrefixCache(model.config, 16))
    with lane.ready():
        lane.admit(0, (), 0)
        logits = lane.forward([Window(0, tuple(range(1, 9)), 1)])
    assert not logits.is_inference()
    assert [id(tensor) for tensor in tensors_of(model)] == before
    assert not any(tensor.is_inference() for tensor in tensors_of(model))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_model_is_trained_after_a_call_as_before(execution: str) -> None:
    model = tiny_model("llama", seed=0)
    generate(model, execution)
    model(**PROMPT, labels=PROMPT["input_ids"]).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


class Ban(LogitsProcessor):
    """Writes to the logits that it is given."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, :32] = -torch.inf
        return scores


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_processor_may_write_to_what_it_gets(execution: str) -> None:
    model = tiny_model("llama", seed=0)
    output = generate(model, execution, logits_processor=LogitsProcessorList([Ban()]))
    assert (output[:, PROMPT["input_ids"].shape[1] :] >= 32).all()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_probe_is_trained_on_what_a_hook_saw(execution: str) -> None:
    model, seen = tiny_model("llama", seed=0), []
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    generate(model, execution)
    handle.remove()
    probe = torch.nn.Linear(seen[0].shape[-1], 1, dtype=seen[0].dtype)
    probe(seen[0]).sum().backward()
    assert probe.weight.grad is not None


class OwnNorm(torch.nn.Module):
    """A user's module, which may keep what it computes."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states


def replace_forward(model: PreTrainedModel) -> None:
    model.lm_head.forward = model.lm_head.forward  # type: ignore[method-assign]


def replace_weight(model: PreTrainedModel) -> None:
    class OwnParameter(torch.nn.Parameter):
        pass

    model.lm_head.weight = OwnParameter(model.lm_head.weight.data)


def replace_module(model: PreTrainedModel) -> None:
    model.model.norm = OwnNorm()


def register_hook(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, inputs: None)


def dispatch(model: PreTrainedModel) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def compile_in_place(model: PreTrainedModel) -> None:
    model.model.norm.compile(backend="eager")


def compute_weight(model: PreTrainedModel) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


def rename_family(model: PreTrainedModel) -> None:
    model.config.model_type = "of_my_own"


@pytest.mark.parametrize(
    "change",
    [
        replace_forward,
        replace_weight,
        replace_module,
        register_hook,
        dispatch,
        compile_in_place,
        compute_weight,
        rename_family,
    ],
)
def test_models_that_may_keep_or_show_what_they_compute_run_as_in_generate(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = tiny_model("llama", seed=0)
    assert may_use_inference_mode(model)
    change(model)
    assert not may_use_inference_mode(model)


def test_inside_inference_mode_the_answer_is_the_same() -> None:
    model = tiny_model("llama", seed=0)
    outside = generate(model)
    with torch.inference_mode():
        assert generate(model).equal(outside)
