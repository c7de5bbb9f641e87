"""Refuse, before any work, what `pearl` cannot honour in a `generate` call, by the table in `argument_table.py`.

`python -m hf_pearl.arguments > docs/arguments.md` writes the documentation's page.
"""

from __future__ import annotations

import difflib
import inspect
import reprlib
from numbers import Number
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.utils import TransformersKwargs

from .argument_table import MODEL_INPUT, TABLE, Row, arguments_page, arguments_table
from .cache.support import ATTENTION_LAYERS
from .compat import default_generation_values, is_stateful
from .models import unwrap
from .vocabularies import MAX_PADDING, can_share_a_tokenizer, vocabulary_sizes

__all__ = ["arguments_page", "arguments_table", "check_arguments"]

STATEFUL_PROCESSORS = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 60


def check_arguments(
    model: PreTrainedModel, generation_config: GenerationConfig, call_arguments: dict[str, Any]
) -> None:
    """Raise one error that names the argument, the value seen, why, and what to do, if PEARL cannot honour a call.

    Nothing is run, and nothing that is passed in is changed.

    Parameters
    ----------
    model
        The target.
    generation_config
        The config in effect: the caller's or the model's own, with the call's keywords applied.
    call_arguments
        The call's arguments by name, model inputs included; what is None counts as not given.

    Raises
    ------
    ValueError
        An argument contradicts another, or its value makes no sense.
    TypeError
        An argument is not of a kind that `generate` could use.
    NotImplementedError
        `generate` could do it, PEARL cannot.
    """
    given = {name: value for name, value in call_arguments.items() if value is not None}
    _check_model("model", model)
    _check_assistant(given.get("assistant_model"), unwrap(model))
    _check_names(model, generation_config, given)
    fields = {name: getattr(generation_config, name, None) for name, row in TABLE.items() if row.kind == "config"}
    values = {name: value for name, value in fields.items() if value is not None} | given
    _check_values(values)
    _check_processors(values.get("logits_processor", ()))
    _check_tokenizers(values)
    _check_inputs(model, values)


def _refusal(
    name: str, value: object, row: Row, reason: str = "", cure: str = "", error: type[Exception] | None = None
) -> Exception:
    """Return the error for a value, in the words of its row where nothing more exact is given."""
    text = f"`pearl` refuses `{name}` ({_shown(value)}): {reason or row.reason}. {cure or row.cure}."
    return (error or row.error)(text)


def _shown(value: object) -> str:
    """Return a value in a few words, whatever it is."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, (Number, str, list, tuple, dict, set)):
        return _BRIEF.repr(value)
    return f"a {type(value).__name__}"


# Models.


def _check_assistant(assistant: Any, target: PreTrainedModel) -> None:
    """Refuse a draft that is no causal language model, of a kind that a lane cannot run, or no draft for the target."""
    if assistant is None:
        return
    row, inner = TABLE["assistant_model"], unwrap(assistant)
    if not isinstance(inner, PreTrainedModel):
        cure = "" if isinstance(assistant, str) else "Pass a `PreTrainedModel`, without any wrapper but PEFT's"
        raise _refusal("assistant_model", assistant, row, "it is not a model of transformers", cure)
    _check_model("assistant_model", assistant)
    if not inner.can_generate():
        raise _refusal("assistant_model", inner, row, "it has no language-model head to draft with")
    if not can_share_a_tokenizer(target, inner):
        target_size, draft_size = vocabulary_sizes(target, inner)
        reason = f"its vocabulary has {draft_size} tokens, and the target's {target_size}, which is more than padding"
        cure = f"Take a draft that was made with the target's tokenizer (sizes may differ by {MAX_PADDING})"
        raise _refusal("assistant_model", inner, row, reason, cure, ValueError)


def _check_model(name: str, model: Any) -> None:
    """Refuse a target (`name` is "model") or draft whose architecture or adapter a lane cannot run."""
    inner = unwrap(model)
    if getattr(inner.config, "is_encoder_decoder", False):
        kind = "encoder-decoder"
    elif _is_recurrent(inner):
        kind = "recurrent state"
    elif _has_soft_prompt(model):
        kind = "soft prompt"
    else:
        return
    raise _refusal(name, inner, TABLE[kind], f"{kind}: {TABLE[kind].reason}")


def _is_recurrent(model: PreTrainedModel) -> bool:
    """Whether a layer keeps anything between tokens but keys and values."""
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return is_stateful(model) or not ATTENTION_LAYERS.issuperset(layers)


def _has_soft_prompt(model: Any) -> bool:
    """Whether a prompt-learning PEFT adapter is active on a model.

    PEFT's `generate` calls its base model's, after it has put its own `prepare_inputs_for_generation` there.
    """
    caller = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    configs = [getattr(each, "active_peft_config", None) for each in (model, caller)]
    return any(getattr(config, "is_prompt_learning", False) is True for config in configs)


# Names and values.


def _check_names(model: PreTrainedModel, generation_config: GenerationConfig, given: dict[str, Any]) -> None:
    """Refuse names that the table has not: other model inputs, typing errors, fields of a later transformers."""
    known = {name for name, row in TABLE.items() if row.kind != "model" and name.isidentifier()}
    inputs = inspect.signature(model.forward).parameters.keys() | TransformersKwargs.__annotations__.keys()
    inputs |= inspect.signature(model.prepare_inputs_for_generation).parameters.keys()
    for name in sorted(given.keys() - known - vars(generation_config).keys()):
        if name in inputs:
            raise _refusal(name, given[name], TABLE[MODEL_INPUT])
        reason = f"it is neither an argument of `generate` nor an input of {type(model).__name__}"
        similar = difflib.get_close_matches(name, known, n=1)
        cure = f"Perhaps you mean `{similar[0]}`" if similar else "Leave it out"
        raise _refusal(name, given[name], TABLE[MODEL_INPUT], reason, cure, ValueError)
    for name in sorted(vars(GenerationConfig()).keys() - known):
        value = getattr(generation_config, name, None)
        if not (name.startswith("_") or value is None or value == default_generation_values().get(name)):
            reason = "this version of hf_pearl does not know it; your transformers is newer"
            raise _refusal(name, value, TABLE[MODEL_INPUT], reason, "Leave it out, or update hf-pearl")


def _check_values(values: dict[str, Any]) -> None:
    """Refuse what can be judged by the value alone."""
    for name, row in TABLE.items():
        condition = row.condition
        if condition and condition.test and name in values and condition.test(values[name]):
            reason = row.reason if row.error is NotImplementedError else f"it is {condition.text}"
            raise _refusal(name, values[name], row, reason)


def _check_processors(processors: Any) -> None:
    """Refuse what is not a list, and processors that stand for arguments that are refused."""
    row = TABLE["logits_processor"]
    if not isinstance(processors, (list, tuple)):
        raise _refusal("logits_processor", processors, row, "it is not a list", "Pass a `LogitsProcessorList`")
    for processor in processors:
        if isinstance(processor, STATEFUL_PROCESSORS):
            reason = f"{type(processor).__name__} keeps a state from token to token"
            raise _refusal("logits_processor", processor, row, reason, error=NotImplementedError)


def _check_tokenizers(values: dict[str, Any]) -> None:
    """Refuse stop strings without a tokenizer, and a draft with another vocabulary."""
    target, draft = values.get("tokenizer"), values.get("assistant_tokenizer")
    if "stop_strings" in values and target is None:
        reason = "they cannot be found without the target's tokenizer"
        raise _refusal("stop_strings", values["stop_strings"], TABLE["stop_strings"], reason)
    if draft is None or draft is target:
        return
    row = TABLE["assistant_tokenizer"]
    if target is None:
        cure = "Pass the target's as `tokenizer`, or leave `assistant_tokenizer` out"
        raise _refusal(
            "assistant_tokenizer", draft, row, "there is no `tokenizer` to compare it with", cure, ValueError
        )
    for name, tokenizer in (("tokenizer", target), ("assistant_tokenizer", draft)):
        if not callable(getattr(tokenizer, "get_vocab", None)):
            raise _refusal(name, tokenizer, row, "it is not a tokenizer", "Pass a tokenizer of transformers", TypeError)
    if target.get_vocab() != draft.get_vocab():
        raise _refusal("assistant_tokenizer", draft, row, "its vocabulary differs from that of `tokenizer`")


# Inputs.


def _check_inputs(model: PreTrainedModel, values: dict[str, Any]) -> None:
    """Refuse prompts, masks and positions that are not rows of left-padded token ids."""
    name = "inputs" if "inputs" in values else "input_ids"
    ids, mask = values.get(name), values.get("attention_mask")
    if name == "inputs" and "input_ids" in values:
        raise _refusal(name, ids, TABLE["inputs"], "`input_ids` is given too")
    if ids is not None:
        _check_ids(name, ids, model)
    elif isinstance(mask, torch.Tensor):  # the prompt is then the BOS token, once per row of the mask
        ids = torch.zeros((max(mask.shape[:1], default=1), 1), dtype=torch.long, device="cpu")
    else:
        ids = torch.zeros((1, 1), dtype=torch.long, device="cpu")
    origin = ""
    if mask is None:
        mask = _inferred_mask(ids, values) if name in values else torch.ones_like(ids)
        origin = f", in the mask that transformers infers from pad_token_id={values.get('pad_token_id')}"
    _check_mask(mask, ids.shape, origin)
    if "position_ids" in values:
        _check_positions(values["position_ids"], mask != 0)


def _check_ids(name: str, ids: Any, model: PreTrainedModel) -> None:
    """Refuse prompts that are not token ids [batch, tokens] of the target's vocabulary."""
    row = TABLE["input_ids"]
    if not isinstance(ids, torch.Tensor):
        cure = "Unpack it: `generate(**inputs)`" if hasattr(ids, "keys") else ""
        raise _refusal(name, ids, row, "it is not a tensor", cure, TypeError)
    if ids.dtype not in (torch.int32, torch.int64):
        raise _refusal(name, ids, row, "token ids are int32 or int64")
    if ids.ndim != 2 or 0 in ids.shape:
        raise _refusal(name, ids, row, "prompts are [batch, tokens], one row of one token at least")
    size = _vocabulary_size(model)
    unknown = ids[(ids < 0) | (ids >= size)]
    if len(unknown):
        reason = f"token id {int(unknown[0])} is outside the target's vocabulary of {size}"
        raise _refusal(name, ids, row, reason, "Use the target's own tokenizer, or resize the target's embeddings")


def _vocabulary_size(model: PreTrainedModel) -> int:
    """Return how many token ids the target can read."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return size if isinstance(size, int) else model.config.get_text_config().vocab_size


def _inferred_mask(ids: torch.Tensor, values: dict[str, Any]) -> torch.Tensor:
    """Return the mask that transformers makes where none is given: without pads, unless the pad also ends a text."""
    pads, ends = (
        torch.as_tensor(values.get(name, ()), device="cpu").flatten() for name in ("pad_token_id", "eos_token_id")
    )
    if set(pads.tolist()) & set(ends.tolist()):
        return torch.ones_like(ids)
    return torch.isin(ids, pads.to(ids.device, torch.long), invert=True)


def _check_mask(mask: Any, shape: torch.Size, origin: str) -> None:
    """Refuse a mask that is not of a shape, or a row of it that is not 0...0 1...1."""
    row = TABLE["attention_mask"]
    if not isinstance(mask, torch.Tensor):
        raise _refusal("attention_mask", mask, row, "it is not a tensor", error=TypeError)
    if mask.shape != shape:
        raise _refusal("attention_mask", mask, row, f"the prompts need a mask of shape {tuple(shape)}")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise _refusal("attention_mask", mask, row, "it holds values other than 0 and 1")
    seen = mask != 0
    faulty = ~seen[:, -1] | (seen[:, :-1] & ~seen[:, 1:]).any(dim=-1)
    if bool(faulty.any()):
        index = int(faulty.nonzero()[0])
        tokens = seen[index]
        fault = "has a hole" if bool(tokens[-1]) else "ends in padding" if bool(tokens.any()) else "masks every token"
        raise _refusal("attention_mask", mask, row, f"row {index} {fault}{origin}")


def _check_positions(positions: Any, seen: torch.Tensor) -> None:
    """Refuse positions other than those that follow from the mask `seen`; at padding they do not matter."""
    row = TABLE["position_ids"]
    if not isinstance(positions, torch.Tensor):
        raise _refusal("position_ids", positions, row, "it is not a tensor", error=TypeError)
    expected = seen.long().cumsum(dim=-1) - 1
    if positions.shape not in (expected.shape, expected[:1].shape):
        raise _refusal("position_ids", positions, row, f"the prompts need positions of shape {tuple(expected.shape)}")
    if bool(((positions.to(seen.device) != expected) & seen).any()):
        raise _refusal("position_ids", positions, row, "they differ from those that follow from the mask")


if __name__ == "__main__":
    print(arguments_page(), end="")
