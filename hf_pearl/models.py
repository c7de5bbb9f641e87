"""The transformers model inside what a user hands over, its parts, and which weights are quantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel


def unwrap(model: Any) -> Any:
    """The transformers model inside `torch.compile`'s and PEFT's wrappers, whose layers carry the adapters.

    The wrappers may be several, in any order; what holds no such model is given back without those it has.
    """
    while isinstance(model, torch.nn.Module) and not isinstance(model, PreTrainedModel):
        base: Any = getattr(model, "get_base_model", None)
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif callable(base):
            model = base()
        else:
            break
    return model


def generative_model(model: Any) -> Any:
    """`unwrap(model)`; raises `TypeError` unless that is a transformers model that can generate."""
    inner = unwrap(model)
    if not isinstance(inner, GenerationMixin):
        raise TypeError(f"`model` must be a transformers model that can generate, got {type(model).__name__}.")
    return inner


def all_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Every part of a model once, in a fixed order; `model.modules()` takes several times as long for each call."""
    modules, known = [model], {id(model)}
    for module in modules:  # It grows while it is walked.
        for part in module._modules.values():
            if part is not None and id(part) not in known:
                known.add(id(part))
                modules.append(part)
    return modules


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A scope in which a model is in evaluation mode; parts that were in training are so again at its end."""
    training = [module for module in all_modules(model) if module.training]
    try:
        if training:
            model.eval()
        yield
    finally:
        for module in training:  # One by one: a part of a model that is trained may be frozen.
            module.training = True


def shared_bytes(a: torch.nn.Module, b: torch.nn.Module) -> int:
    """Bytes of the parameters that two models have in common."""
    known = {id(parameter) for parameter in a.parameters()}
    return sum(parameter.nbytes for parameter in b.parameters() if id(parameter) in known)


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether weights were quantised, by transformers or by torch, or the configuration says that they are."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None or bool(getattr(model.config, "quantization_config", None)):
        return True
    for module in all_modules(model):
        tensors = (*module._parameters.values(), *module._buffers.values())
        if is_packed(module) or any(tensor is not None and tensor.is_quantized for tensor in tensors):
            return True
    return False


def packed_bytes(module: torch.nn.Module) -> int:
    """Bytes of the weights that torch.ao's modules within a module keep packed: they are no parameters of it."""
    if not is_packed(module):
        return sum(packed_bytes(part) for part in module._modules.values() if part is not None)
    parameters = {each.data_ptr() for each in module.parameters()}
    states = _tensors_in(list(module.state_dict().values()))
    return sum(each.nbytes for each in states if each.data_ptr() not in parameters)


def is_packed(module: torch.nn.Module) -> bool:
    """Whether it is one of torch.ao's, which keep weights as no parameters."""
    return type(module).__module__.startswith("torch.ao.")


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """A state is a tensor, or a tuple of a packed weight and its bias, or something else."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors_in(each)] if isinstance(value, (list, tuple)) else []
