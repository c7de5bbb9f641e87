"""Whether a model's forwards may run in inference mode, which takes a small model 5 to 8% less time than no_grad does.

What is computed there can never take part in training. So it must not stay behind in the model, nor reach anybody who
may look into its forward: such models run without gradients only, as in transformers' own `generate`.
"""

from __future__ import annotations

import functools

import torch
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from ..cache.support import TESTED_FAMILIES
from ..models import all_modules

_KNOWN_PACKAGES = ("torch", "transformers", "hf_pearl")
_PLAIN = frozenset({torch.nn.Parameter, type(None)})


def may_use_inference_mode(model: PreTrainedModel) -> bool:
    """Whether nothing that is computed in a forward of `model` is kept in it or shown to anybody.

    Known to be so for the families of docs/models.md, made of torch's, transformers' and our own modules with plain
    weights (quantised ones may be converted in the first forward), without hooks when a call begins, and with no
    forward replaced (accelerate, torch.compile) or weight computed (torch.nn.utils.parametrize, which may keep it).
    """
    return (
        model.config.get_text_config().model_type in TESTED_FAMILIES
        and not torch_module._has_any_global_hook()
        and all(map(_is_plain, all_modules(model)))
    )


def _is_plain(module: torch.nn.Module) -> bool:
    """This is done for every module before every call: what is asked most cheaply comes first."""
    attributes = vars(module)
    is_watched = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
    is_replaced = "forward" in attributes or module._compiled_call_impl is not None
    is_computed = "parametrizations" in attributes["_modules"]  # what `is_parametrized` asks for, in less time
    if is_watched or is_replaced or is_computed or not _is_known(type(module).__module__):
        return False
    parameters = attributes["_parameters"]
    return not parameters or _PLAIN.issuperset(map(type, parameters.values()))


@functools.cache
def _is_known(module_name: str) -> bool:
    return module_name.partition(".")[0] in _KNOWN_PACKAGES
