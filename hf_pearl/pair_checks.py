"""What `tune`, `record_traces` and `plan` refuse before any work, and prompts as token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .arguments import check_arguments
from .cache.support import check_supported
from .models import unwrap
from .parallel.ranks.models import check_whole
from .vocabularies import check_vocabularies

LEAST_TEMPERATURE = 1e-6  # Logits over less may overflow; the noise is long lost in their rounding then.
_CURE = "Pass token ids, such as `[tokenizer(text).input_ids for text in texts]`."


def checked_models(target: Any, draft: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Both models without wrappers; raises `TypeError`, `ValueError`, `NotImplementedError` where PEARL cannot run."""
    models = {"target": unwrap(target), "draft": unwrap(draft)}
    for name, model in models.items():
        if not isinstance(model, PreTrainedModel) or not model.can_generate():
            raise TypeError(f"`{name}` must be a causal language model of transformers, got {type(model).__name__}.")
        check_whole(name, model, "Pass a whole one, loaded by `from_pretrained`: it is called by itself, too.")
    target, draft = models.values()
    check_vocabularies(target, draft)
    check_arguments(target, target.generation_config, {"assistant_model": draft})
    for model in models.values():
        check_supported(model)
    return target, draft


def checked_prompts(
    prompts: Any, models: Sequence[PreTrainedModel], max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Token ids of every prompt; raises `TypeError` or `ValueError` for what is none, or too long for a model."""
    if isinstance(prompts, (str, dict)) or not isinstance(prompts, (Sequence, torch.Tensor)):
        raise TypeError(f"`prompts` must be a sequence of prompts, got {type(prompts).__name__}. {_CURE}")
    if not len(prompts):
        raise ValueError("`prompts` must hold at least one prompt, got none.")
    found = [_token_ids(f"prompts[{place}]", prompt) for place, prompt in enumerate(prompts)]
    if len(found) % batch_size:
        raise ValueError(
            f"`batch_size` must divide the number of prompts, got {batch_size} for {len(found)}: calls of other sizes "
            "are not of the same speed. Leave prompts out, or add some."
        )
    vocab_size = models[0].get_input_embeddings().num_embeddings
    for place, token_ids in enumerate(found):
        unknown = [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]
        if unknown:
            raise ValueError(
                f"`prompts[{place}]` has the token {unknown[0]}; the target knows those below {vocab_size}."
            )
    check_room(max(map(len, found)), models, max_new_tokens)
    return found


def _token_ids(name: str, prompt: Any) -> list[int]:
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim == 2 and prompt.shape[0] == 1:
            prompt = prompt[0]
        if prompt.ndim != 1 or prompt.dtype not in (torch.int32, torch.int64):
            raise TypeError(
                f"`{name}` must be one row of token ids, of shape (length,) or (1, length), got {prompt.dtype} of "
                f"shape {tuple(prompt.shape)}. {_CURE}"
            )
        prompt = prompt.tolist()
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        raise TypeError(f"`{name}` must be token ids, got {type(prompt).__name__}. {_CURE}")
    others = [each for each in prompt if isinstance(each, bool) or not isinstance(each, int)]
    if others:
        raise TypeError(f"`{name}` must be token ids, got {others[0]!r} among them. {_CURE}")
    if not prompt:
        raise ValueError(f"`{name}` must have at least one token, got none.")
    return list(prompt)


def check_room(longest: int, models: Sequence[PreTrainedModel], max_new_tokens: int) -> None:
    """Raise `ValueError` where a prompt of `longest` tokens and what is to follow are too long for target or draft."""
    for name, model in zip(("target", "draft"), models, strict=True):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        if longest + max_new_tokens > limit:
            raise ValueError(
                f"`prompts` must leave room for `max_new_tokens`: {longest} tokens and {max_new_tokens} new ones are "
                f"more than the {limit} positions of `{name}`. Shorten the prompts, or lower `max_new_tokens`."
            )


def check_numbers(max_new_tokens: Any, batch_size: Any, temperature: Any, seed: Any) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, for a number that makes no sense."""
    whole = {"max_new_tokens": (max_new_tokens, 1), "batch_size": (batch_size, 1), "seed": (seed, 0)}
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an int, got {value!r}.")
        if not least <= value < 2**63:
            raise ValueError(f"`{name}` must be from {least} to 2**63 - 1, got {value}.")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"`temperature` must be a number, got {temperature!r}.")
    if temperature != 0.0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"`temperature` must be 0 (greedy), or at least {LEAST_TEMPERATURE:g} and finite, got {temperature}."
        )
