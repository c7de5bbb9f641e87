"""The transformers model inside what a user hands over, and its parts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin


def unwrap(model: Any) -> Any:
    """The transformers model inside `torch.compile`'s and PEFT's wrappers, whose layers carry the adapters."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
