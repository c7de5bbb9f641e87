"""The transformers model inside what a user hands over, its parts, and whether it is quantised."""

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


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether a model's weights were quantised by transformers, or its configuration says that they are."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None or bool(getattr(model.config, "quantization_config", None))
