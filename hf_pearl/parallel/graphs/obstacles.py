"""Which models' forwards may be captured and replayed: those in which nobody's Python has to run again."""

from __future__ import annotations

import torch
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from ...compat import is_recorder
from ...model_devices import devices_of, is_dispatched
from ...models import all_modules, is_quantised
from ..tensor_parallel import part_of

_KNOWN = ("torch.", "transformers.", "peft.", "hf_pearl.borrowed_embeddings.")  # packages and modules


def obstacle_to_capture(model: PreTrainedModel) -> str | None:
    """Why the forwards of `model` run one operation after the other; None: they may be captured.

    What only the attempt shows, such as a forward that reads a value on the host, is not known here.
    """
    if is_dispatched(model) or len(devices_of(model)) > 1:
        return "accelerate's hooks move tensors in its forward"
    if part_of(model) is not None:
        return "it is one of several parts, whose ranks wait for each other in its forward"
    if is_quantised(model):
        return "it is quantised"
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        return "autocast is on, which keeps what it has cast"
    if torch_module._has_any_global_hook():
        return "torch has hooks on all modules"
    for name, module in zip(_names(model), all_modules(model), strict=True):
        reason = _obstacle_in(module)
        if reason is not None:
            return f"its module {name} ({type(module).__name__}) {reason}"
    return None


def _names(model: PreTrainedModel) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in all_modules(model)]


def _obstacle_in(module: torch.nn.Module) -> str | None:
    if module._forward_pre_hooks or not all(map(is_recorder, module._forward_hooks.values())):
        return "has forward hooks"
    if "forward" in vars(module):
        return "has had its forward replaced"
    if module._compiled_call_impl is not None:
        return "is compiled"
    if "parametrizations" in module._modules:
        return "computes its weights"
    if not f"{type(module).__module__}.".startswith(_KNOWN):
        return "is of a class that may do anything"
    return None
