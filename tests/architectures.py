"""Tiny configurations of every model family that docs/models.md names, those that run and those refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from models import MAX_POSITIONS, own_random_state
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WINDOW = 16


class Family(NamedTuple):
    """A model family: its `model_type`, what its tiny configuration sets, and what is particular about it."""

    model_type: str
    options: dict[str, Any]
    particular: str = ""


_BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
_HEADS = {"head_dim": 8}

FAMILIES = {
    "Llama": Family("llama", _GROUPED),
    "Llama, yarn": Family(
        "llama",
        {**_GROUPED, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
        "scaled rotary embedding",
    ),
    "Qwen2": Family("qwen2", _GROUPED, "bias on queries, keys and values"),
    "Qwen2, window": Family(
        "qwen2", {**_GROUPED, **_MIXED, "use_sliding_window": True, "max_window_layers": 1}, "mixed windows"
    ),
    "Qwen2-MoE": Family("qwen2_moe", {**_GROUPED, **_MOE, "shared_expert_intermediate_size": 16}, "mixture of experts"),
    "Qwen3": Family("qwen3", {**_GROUPED, **_HEADS}, "normalised queries and keys"),
    "Qwen3-MoE": Family("qwen3_moe", {**_GROUPED, **_MOE, **_HEADS}, "mixture of experts"),
    "Mistral": Family("mistral", {**_GROUPED, "sliding_window": WINDOW}, "window in every layer"),
    "Mixtral": Family("mixtral", {**_GROUPED, "num_local_experts": 4}, "mixture of experts"),
    "Gemma": Family("gemma", {**_GROUPED, **_HEADS}),
    "Gemma-2": Family("gemma2", {**_GROUPED, **_HEADS, **_MIXED, "query_pre_attn_scalar": 8}, "soft-cap, windows"),
    "Gemma-3": Family(
        "gemma3_text", {**_GROUPED, **_HEADS, **_MIXED, "query_pre_attn_scalar": 8}, "mixed windows, two rotary bases"
    ),
    "Phi": Family("phi", {"intermediate_size": 48}, "rotary embedding of a part of each head"),
    "Phi-3": Family("phi3", {**_GROUPED, "sliding_window": WINDOW}, "window in every layer"),
    "GPT-NeoX": Family("gpt_neox", {"intermediate_size": 64, "rotary_pct": 0.5}),
    "GPT-J": Family("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "from transformers 5.24 on"),
    "GPT-2": Family("gpt2", {}, "learned positions"),
    "GPT-BigCode": Family("gpt_bigcode", {}, "learned positions, one key-value head"),
    "OPT": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "learned positions"),
    "GPT-OSS": Family(
        "gpt_oss",
        {
            **_GROUPED,
            **_HEADS,
            **_MIXED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "attention sinks, mixed windows",
    ),
    "OLMo": Family("olmo", _GROUPED),
    "OLMo-2": Family("olmo2", _GROUPED),
    "OLMo-3": Family("olmo3", {**_GROUPED, **_MIXED}, "mixed windows"),
    "StarCoder2": Family("starcoder2", {**_GROUPED, "sliding_window": WINDOW}, "window in every layer"),
    "Granite": Family("granite", {**_GROUPED, "attention_multiplier": 0.5}, "scaled attention"),
    "Cohere": Family("cohere", _GROUPED),
    "Cohere-2": Family("cohere2", {**_GROUPED, **_MIXED, "head_dim": 8}, "mixed windows, some layers without rotary"),
    "SmolLM3": Family("smollm3", {**_GROUPED, "no_rope_layers": [1, 0]}, "layers without rotary embedding"),
    "StableLM": Family("stablelm", _GROUPED),
    "Nemotron": Family("nemotron", {**_GROUPED, **_HEADS}),
    "Persimmon": Family("persimmon", {"intermediate_size": 48}),
    "GLM-4": Family("glm4", {**_GROUPED, **_HEADS}),
    "EXAONE-4": Family("exaone4", {**_GROUPED, **_MIXED}, "mixed windows"),
    "ERNIE-4.5": Family("ernie4_5", {**_GROUPED, **_HEADS}),
    "DeepSeek-V3": Family(
        "deepseek_v3",
        {
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        "latent attention, kept expanded",
    ),
}


def build(family: Family, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model with logits of the order of 1, in which every weight and bias matters."""
    with own_random_state(seed):
        config = AutoConfig.for_model(family.model_type, **{**_BASE, **family.options})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.1 if parameter.ndim == 1 else 0.15
                parameter.mul_(parameter.ndim == 1).add_(spread * torch.randn_like(parameter))
    return model.to(dtype)


def _rotary(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **more}}


_LONGROPE = _rotary(
    "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=MAX_POSITIONS // 2
)
REFUSED = {
    "Phi-3 128k": Family("phi3", {**_GROUPED, **_LONGROPE}, "rope_type 'longrope'"),
    "Llama, dynamic": Family("llama", {**_GROUPED, **_rotary("dynamic")}, "rope_type 'dynamic'"),
    "Llama-4": Family("llama4_text", {**_GROUPED, **_HEADS, "num_local_experts": 2}, "'chunked_attention'"),
    "Gemma-3n": Family(
        "gemma3n_text",
        {
            **_GROUPED,
            **_HEADS,
            "vocab_size_per_layer_input": 64,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["full_attention"] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "num_kv_shared_layers",
    ),
    "Qwen3-Next": Family(
        "qwen3_next",
        {**_GROUPED, **_MOE, **_HEADS, "layer_types": ["linear_attention", "full_attention"]},
        "'linear_attention'",
    ),
    "Mamba": Family("mamba", {}, "'linear_attention'"),
    "BLOOM": Family("bloom", {"n_head": 4}, "AttentionInterface"),
    "Falcon": Family("falcon", {}, "AttentionInterface"),
    "MPT": Family("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "AttentionInterface"),
}
