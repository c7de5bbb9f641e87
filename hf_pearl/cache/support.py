"""Which models the paged cache can hold; the others are refused before any work."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..compat import supports_attention_interface
from ..errors import PearlUnsupportedModelError

# Kinds of layers, as `config.layer_types` names them, that keep keys and values and nothing else; "attention" is an old
# name.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
# Those that our attention can compute: nobody tells it the size of a layer's chunks, which only masks show.
_PAGED_LAYERS = ATTENTION_LAYERS - {"chunked_attention"}
# Families whose logits tests compare (docs/models.md); a model of another one is tried before its first use.
TESTED_FAMILIES = frozenset(
    {
        "cohere",
        "cohere2",
        "deepseek_v3",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "llama",
        "mistral",
        "mixtral",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "stablelm",
        "starcoder2",
    }
)
# Frequencies that depend on the longest position in the forward: one sequence would change the others.
_ROW_DEPENDENT_ROTARY = frozenset({"dynamic", "longrope"})


def check_supported(model: PreTrainedModel) -> None:
    """Raise `PearlUnsupportedModelError`, naming model and layer, unless the paged cache can hold `model`."""
    config = model.config.get_text_config()
    if not supports_attention_interface(model):
        raise unsupported(model, "its attention layers do not go through transformers' AttentionInterface")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _PAGED_LAYERS)
    if others:
        raise unsupported(model, f"it has layers of the kind {', '.join(map(repr, others))}")
    if getattr(config, "use_bidirectional_attention", None):
        raise unsupported(model, "its tokens see those behind them (use_bidirectional_attention)")
    try:
        getattr(config, "head_dim", None)
    except AttributeError as error:
        raise unsupported(model, "its layers have heads of different sizes") from error
    if getattr(config, "num_kv_shared_layers", None):
        raise unsupported(model, "some of its layers use the keys and values of others (num_kv_shared_layers)")
    for rotary_type in _rotary_types(getattr(config, "rope_parameters", None)):
        if rotary_type in _ROW_DEPENDENT_ROTARY:
            raise unsupported(
                model,
                f"its rotary embedding is scaled by the longest sequence of a batch (rope_type {rotary_type!r}), so "
                f"that sequences would change each other",
            )


def has_windows(config: Any) -> bool:
    """Whether some layer's queries look back a limited number of tokens."""
    kinds = getattr(config, "layer_types", None) or ()
    return bool(getattr(config, "sliding_window", None)) or "sliding_attention" in kinds


def _rotary_types(parameters: Any) -> list[str]:
    """The rotary types of a config: one, or one per kind of layer."""
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [kind for nested in parameters.values() for kind in _rotary_types(nested)]


def unsupported(model: PreTrainedModel, reason: str) -> PearlUnsupportedModelError:
    """The error that says why, and what to do."""
    return PearlUnsupportedModelError(
        f"{type(model).__name__} cannot run on the paged cache: {reason}. "
        f"Call `generate` without `pearl` for this model."
    )
