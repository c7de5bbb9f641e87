"""Every name of transformers that is not part of its documented interface, in one place.

Checked on transformers 5.17.0 and 5.24.0, torch 2.11 and 2.13.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from .models import all_modules

__all__ = [
    "AttentionInterface",
    "AttentionMaskInterface",
    "attention_configs",
    "attention_implementation",
    "cache_argument",
    "compute_buffers",
    "default_generation_values",
    "eager_attention",
    "effective_generation_config",
    "is_recorder",
    "is_stateful",
    "keys_left_in_place",
    "modules_not_to_split",
    "original_generate",
    "pad_token_id",
    "set_attention_implementation",
    "supports_attention_interface",
    "with_eager_attention",
]


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration in which a layer looks its attention up; layers copied one by one have their own."""
    configs = [vars(module).get("config") for module in all_modules(model)]
    return list({id(config): config for config in configs if isinstance(config, PreTrainedConfig)}.values())


def attention_implementation(config: PreTrainedConfig) -> str:
    """What a layer finds there."""
    name: str = config._attn_implementation
    return name


def set_attention_implementation(config: PreTrainedConfig, name: str | None) -> None:
    """Set what a layer finds there, and nothing else: the public setters write to other configurations too."""
    config._attn_implementation_internal = name


def with_eager_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that says "eager", which every model has, and so do the configurations within it."""
    copied = copy.deepcopy(config)
    copied._attn_implementation = "eager"
    return copied


def eager_attention(module: Any) -> Callable[..., Any]:
    """The eager attention function of an attention layer: every modeling file has its own, under one name."""
    modeling = sys.modules[type(module).__module__]
    return getattr(modeling, "eager_attention_forward", AttentionInterface()["sdpa"])


def effective_generation_config(
    model: GenerationMixin, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> GenerationConfig:
    """The configuration that `generate` would act on: the caller's, the model's defaults, and keyword overrides."""
    return model._prepare_generation_config(generation_config, **kwargs)[0]


def default_generation_values() -> dict[str, Any]:
    """What `generate` takes for fields that neither a model nor a call has set."""
    defaults: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    return defaults


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """The pad token that `generate` has resolved for this call."""
    tensor = generation_config._pad_token_tensor
    return None if tensor is None else int(tensor.flatten()[0])


def compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give a model that was built without memory its buffers, computed anew from the configuration.

    That is what `from_pretrained` does; weights without memory stay as they are.
    """
    with torch.no_grad():
        for module in all_modules(model):
            buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
            if buffers:
                module._buffers.update({name: torch.empty_like(each, device=device) for name, each in buffers.items()})
                model._init_weights(module)


def supports_attention_interface(model: PreTrainedModel) -> bool:
    """Whether the model's attention layers go through transformers' `AttentionInterface`."""
    return bool(model._can_set_attn_implementation())


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether transformers marks a model as one whose state cannot be taken back."""
    return bool(getattr(model, "_is_stateful", False))


def is_recorder(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is one that transformers has put there for `output_hidden_states` and the like.

    It does so when these are first asked for, and leaves the hooks there; they do nothing where they are not.
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def cache_argument(model: PreTrainedModel) -> str:
    """What a model's forward and its `generate` call a cache: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def modules_not_to_split(model: PreTrainedModel) -> list[str]:
    """Classes of modules whose parts must lie on one device."""
    return sorted(getattr(model, "_no_split_modules", None) or ())


def keys_left_in_place(model: PreTrainedModel) -> list[str]:
    """Arguments that a layer's hooks must not move to another device: caches."""
    return sorted(getattr(model, "_skip_keys_device_placement", None) or ())


_ORIGINAL_GENERATE = GenerationMixin.generate


def original_generate() -> Any:
    """transformers' own `generate`, whatever has been enabled since."""
    return getattr(_ORIGINAL_GENERATE, "hf_pearl_original", _ORIGINAL_GENERATE)
