"""The table of everything a `generate` call can be given, and what `pearl` makes of it.

One `Row` per argument of `generate`, per field of `GenerationConfig` (transformers 5.17 to 5.24) and per kind of model
that cannot be served. `hf_pearl.arguments` checks calls by it, and `docs/arguments.md` is written from it; nothing here
knows how a call is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any, Literal, NamedTuple

import torch
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig

from .errors import PearlUnsupportedModelError

Kind = Literal["argument", "config", "model"]
Outcome = Literal["honoured", "refused", "no effect"]


class Condition(NamedTuple):
    """When a value is refused: words for the reader, and a test for values that are not None.

    `test` is None where the answer depends on more than the value; `hf_pearl.arguments` then has a function for it.
    """

    text: str
    test: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Row:
    """What becomes of one argument: its outcome, when it is refused, why, and what to do instead.

    `outcome` says what happens to a value that `condition` does not refuse; "refused" means that only the default is
    accepted. None is never refused.
    """

    name: str
    kind: Kind
    outcome: Outcome
    reason: str
    condition: Condition | None = None
    cure: str = ""
    error: type[Exception] = NotImplementedError


def _other_than(*accepted: Any) -> Condition:
    """Refuse every value that is not one of the plain values `accepted`."""
    text = "other than " + " or ".join(f"`{value!r}`" for value in accepted)
    return Condition(text, lambda value: not (isinstance(value, (Number, str)) and value in accepted))


def _not_a(text: str, *types: type) -> Condition:
    """Refuse every value that is of none of `types`."""
    return Condition(f"not {text}", lambda value: not isinstance(value, types))


def _are_not_ids(value: Any) -> bool:
    """Whether a value is neither a token id nor several."""
    several = value if isinstance(value, (list, tuple)) else [value]
    return not (isinstance(value, torch.Tensor) or all(_is_id(each) for each in several))


def _is_id(value: Any) -> bool:
    """Whether a tensor of token ids can hold a value; a fraction would be cut off there without a word."""
    return isinstance(value, Integral) and -(2**63) <= int(value) < 2**63


def _is_no_streamer(value: Any) -> bool:
    """Whether a value lacks one of a streamer's methods."""
    return not (callable(getattr(value, "put", None)) and callable(getattr(value, "end", None)))


def _rows(kind: Kind, outcome: Outcome, names: str, reason: str) -> tuple[Row, ...]:
    """Return rows that are never refused, one for each of the space-separated `names`."""
    return tuple(Row(name, kind, outcome, reason) for name in names.split())


def _refused(name: str, condition: Condition, reason: str, cure: str, kind: Kind = "config") -> Row:
    """Return a row of which only the default is accepted."""
    error = PearlUnsupportedModelError if kind == "model" else NotImplementedError
    return Row(name, kind, "refused", reason, condition, cure, error)


GIVEN = Condition("given", lambda value: True)
WITHOUT = "or call `generate` without `pearl`"
OMIT = f"Leave it out, {WITHOUT}"
MODEL_INPUT = "any other model input"
CUSTOM_ENTRY = "any other entry of the config"

# fmt: off
ARGUMENTS: tuple[Row, ...] = (
    Row("inputs", "argument", "honoured", "the token ids of the prompts, another name of `input_ids`",
        Condition("`input_ids` is given too, and as `input_ids`"), "Pass the prompts once, as `input_ids`", ValueError),
    Row("input_ids", "argument", "honoured", "the token ids of the prompts; where there are none, the BOS token",
        Condition("not a tensor [batch, tokens] of int32 or int64, empty, or with ids outside the target's vocabulary"),
        "Pass the tokenizer's `input_ids` with `return_tensors='pt'`", ValueError),
    Row("attention_mask", "argument", "honoured", "padding is never computed; a mask that transformers infers from "
        "`pad_token_id`, where none is given, is checked in the same way",
        Condition("not of the shape of `input_ids`, or a row is not 0...0 1...1 (right padding, holes)"),
        "Pad on the left (`tokenizer.padding_side = 'left'`) and pass the tokenizer's `attention_mask`", ValueError),
    Row("position_ids", "argument", "no effect", "positions follow from the mask",
        Condition("different from those that follow from the mask (padding aside)"), OMIT),
    Row("generation_config", "argument", "honoured", "see its fields below",
        _not_a("a `GenerationConfig`", GenerationConfig), "Pass a `GenerationConfig`, or its fields as arguments",
        TypeError),
    Row("logits_processor", "argument", "honoured", "called on the target once per emitted token, in order",
        Condition("not a list, or one of SynthID or classifier-free guidance is in it"),
        f"Pass a `LogitsProcessorList` without it, {WITHOUT}", TypeError),
    Row("stopping_criteria", "argument", "honoured", "asked after every emitted token; a `MaxLengthCriteria` takes the "
        "place of the config's limit, as in `generate`",
        _not_a("a list", list, tuple), "Pass a `StoppingCriteriaList`", TypeError),
    Row("prefix_allowed_tokens_fn", "argument", "honoured", "called once per row and emitted token, in order",
        Condition("not callable", lambda value: not callable(value)), "Pass a function of batch id and ids", TypeError),
    Row("streamer", "argument", "honoured", "gets every verified token once, in order",
        Condition("without `put` and `end`", _is_no_streamer), "Pass a `BaseStreamer`", TypeError),
    Row("assistant_model", "argument", "honoured", "the draft; where there is none, plain decoding in the same engine",
        Condition("not a causal language model (PEFT-wrapped or compiled ones are), with a vocabulary that differs "
                  "from the target's by more than padding (1024 tokens), or see the kind *model*"),
        "Load it with `AutoModelForCausalLM.from_pretrained(...)` and pass the model itself", TypeError),
    Row("tokenizer", "argument", "honoured", "the target's; `stop_strings` need it"),
    Row("assistant_tokenizer", "argument", "no effect", "draft and target must share one vocabulary",
        Condition("its vocabulary differs from that of `tokenizer`, or there is no `tokenizer` to compare it with"),
        "Use a draft with the target's tokenizer, and leave `assistant_tokenizer` out"),
    Row("pearl", "argument", "honoured", "`False`: transformers' own `generate`; `True` or a `PearlConfig`: PEARL"),
    Row("logits_to_keep", "argument", "no effect", "the engine keeps the logits that it needs",
        _not_a("an integer", int), OMIT),
    *_rows("argument", "no effect", "trust_remote_code", "it only says whether a `custom_generate` may be loaded"),
    _refused("synced_gpus", _other_than(False), "ranks that wait for each other at every step (ZeRO-3, FSDP) cannot "
             "follow a free schedule", f"Gather the model on one rank, {WITHOUT}", "argument"),
    _refused("custom_generate", GIVEN, "`pearl` is itself a way to decode", OMIT, "argument"),
    _refused("negative_prompt_ids", GIVEN, "it belongs to classifier-free guidance", OMIT, "argument"),
    _refused("negative_prompt_attention_mask", GIVEN, "it belongs to classifier-free guidance", OMIT, "argument"),
    _refused("inputs_embeds", GIVEN, "prompts are cached and verified by token id", "Pass `input_ids`", "argument"),
    *(_refused(name, GIVEN, "the cache is hf_pearl's own, and prefixes are kept from call to call by itself",
               "Pass the whole text as `input_ids`: what is cached is not computed again", "argument")
      for name in ("cache", "past_key_values")),
    _refused(MODEL_INPUT, GIVEN, "of model inputs only ids, mask and positions are supported (no `pixel_values`, "
             "`token_type_ids`, ...)", OMIT, "argument"),
)

CONFIG: tuple[Row, ...] = (
    *_rows("config", "honoured", "max_length max_new_tokens min_length min_new_tokens", "counted as in `generate`"),
    *_rows("config", "honoured", "max_time", "looked at after every emitted token"),
    Row("stop_strings", "config", "honoured", "looked for after every emitted token",
        Condition("`tokenizer` is not given"), "Pass the target's tokenizer as `tokenizer`", ValueError),
    *_rows("config", "honoured", "do_sample", "exactly the target's law, drawn with hf_pearl's own seeded noise"),
    *_rows("config", "honoured", "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff",
           "as in `generate`, with `do_sample=True`"),
    *_rows("config", "honoured", "repetition_penalty no_repeat_ngram_size bad_words_ids sequence_bias suppress_tokens "
           "begin_suppress_tokens forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty "
           "remove_invalid_values renormalize_logits", "as in `generate`, at every position with its own prefix"),
    *_rows("config", "honoured", "encoder_repetition_penalty encoder_no_repeat_ngram_size",
           "as in `generate`, where a decoder-only model's prompt stands for the encoder's input"),
    Row("watermarking_config", "config", "honoured", "the green-list watermark is a function of the prefix; SynthID's "
        "keeps a state from token to token",
        Condition("of the SynthID kind", lambda value: isinstance(value, SynthIDTextWatermarkingConfig)),
        f"Use `WatermarkingConfig`, {WITHOUT}"),
    *_rows("config", "honoured", "num_return_sequences", "with `do_sample=True`, as in `generate`"),
    *_rows("config", "honoured", "return_dict_in_generate", "the output also carries `pearl`, the statistics"),
    *_rows("config", "honoured", "output_scores output_logits", "the target's, for every emitted token"),
    Row("pad_token_id", "config", "honoured", "as in `generate`",
        Condition("not a token id", _are_not_ids), "Pass an integer", TypeError),
    Row("eos_token_id", "config", "honoured", "as in `generate`, one or several",
        Condition("not a token id or a list of them", _are_not_ids), "Pass an integer or several", TypeError),
    *_rows("config", "honoured", "bos_token_id", "as in `generate`, where there is no prompt"),
    *_rows("config", "no effect", "early_stopping length_penalty", "as in `generate`: they belong to beam search"),
    *_rows("config", "no effect", "decoder_start_token_id", "as in `generate`: it belongs to encoder-decoder models"),
    *_rows("config", "no effect", "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold",
           "`PearlConfig.draft_length` decides how far to draft; the tokens do not depend on it"),
    *_rows("config", "no effect", "max_matching_ngram_size", "as in `generate`: it belongs to prompt lookup"),
    *_rows("config", "no effect", "assistant_lookbehind target_lookbehind",
           "as in `generate`: they belong to drafts with another tokenizer"),
    *_rows("config", "no effect", "max_cache_len compile_config disable_compile",
           "as in `generate` with the default cache: they belong to static caches"),
    *_rows("config", "no effect", "prefill_chunk_size", "the engine divides prompts itself; the tokens are the same"),
    *_rows("config", "no effect", "_from_model_config _commit_hash transformers_version", "the config's origin"),
    Row(CUSTOM_ENTRY, "config", "no effect", "as in `generate`, which carries entries that it does not know"),
    _refused("num_beams", _other_than(1), "beam search keeps several lines per sequence, PEARL verifies one", OMIT),
    _refused("num_beam_groups", _other_than(1), "it belongs to beam search", OMIT),
    _refused("diversity_penalty", _other_than(0), "it belongs to beam search", OMIT),
    _refused("constraints", GIVEN, "constrained decoding is a beam search", OMIT),
    _refused("force_words_ids", GIVEN, "constrained decoding is a beam search", OMIT),
    _refused("penalty_alpha", _other_than(0), "contrastive search compares the hidden states of several tokens", OMIT),
    _refused("low_memory", _other_than(False), "it belongs to contrastive search", OMIT),
    _refused("dola_layers", GIVEN, "DoLa needs the logits of inner layers", OMIT),
    _refused("guidance_scale", _other_than(1), "classifier-free guidance runs the target on a second prompt, with a "
             "cache of its own", OMIT),
    _refused("token_healing", _other_than(False), "it rewrites the prompt after its mask was made", OMIT),
    _refused("prompt_lookup_num_tokens", GIVEN, "the draft is a model, not the prompt",
             f"Pass `assistant_model` instead, {WITHOUT}"),
    _refused("assistant_early_exit", GIVEN, "the draft is a model of its own, not the target's first layers",
             f"Pass `assistant_model` instead, {WITHOUT}"),
    _refused("use_mtp", _other_than(False), "the draft is a model of its own, not the target's prediction heads",
             f"Pass `assistant_model` instead, {WITHOUT}"),
    _refused("speculation_type", GIVEN, "it chooses another way to speculate", OMIT),
    _refused("assistant_ensemble_weight", GIVEN, "it lets the draft change the answer, which PEARL never does", OMIT),
    _refused("is_assistant", _other_than(False), "it marks a call that drafts for another one",
             "Leave it out; neither the target nor the draft needs it"),
    _refused("use_cache", _other_than(True), "there is no decoding without the cache", OMIT),
    _refused("cache_implementation", _other_than("dynamic", "hybrid"), "keys and values are kept in hf_pearl's paged "
             "cache (`hybrid` counts as unset, as in `generate`)", "Leave it out; `PearlConfig.cache_memory` sizes it"),
    _refused("cache_config", GIVEN, "keys and values are kept in hf_pearl's paged cache",
             "Leave it out; `PearlConfig.cache_memory` sizes it"),
    _refused("output_attentions", _other_than(False), "attention weights are never formed", OMIT),
    _refused("output_hidden_states", _other_than(False), "hidden states are not kept", OMIT),
    _refused("continuous_batching_config", GIVEN, "it belongs to `generate_batch`", OMIT),
)

MODELS: tuple[Row, ...] = (
    _refused("encoder-decoder", GIVEN, "PEARL decodes decoder-only models", "Use a causal language model", "model"),
    _refused("recurrent state", GIVEN, "the cache holds keys and values, and what a state has seen of rejected tokens "
             "cannot be taken back", "Use a model all layers of which attend to keys and values", "model"),
    _refused("soft prompt", GIVEN, "a prompt-learning adapter puts vectors without token ids before the prompt",
             f"Use an adapter that changes weights (LoRA, ...), {WITHOUT}", "model"),
)
# fmt: on

TABLE: dict[str, Row] = {row.name: row for row in ARGUMENTS + CONFIG + MODELS}

PAGE = """# The arguments of `generate` with `pearl`

<!-- Written by `python -m hf_pearl.arguments > docs/arguments.md` from hf_pearl/argument_table.py: do not edit. -->

Every argument of `generate` and every field of `GenerationConfig` (transformers 5.17 to 5.24), and what becomes of it
in `model.generate(..., assistant_model=draft, pearl=True)`:

- *honoured*: it means what it means without `pearl`;
- *no effect*: it is accepted, and changes nothing;
- *refused*: only its default is accepted.

What is refused raises one error before any work; some of what is honoured or without effect is refused in the case that
the table states. `None` counts as not given. The kind *model* is about the models of a call, target and draft alike.
A field of the config that your transformers has and this table has not is refused unless it has its default.

{table}
"""


def arguments_table() -> str:
    """Return the table in Markdown: one line per argument, field and kind of model."""
    lines = ["| name | kind | outcome | refused if | note | instead |", "|---|---|---|---|---|---|"]
    for row in TABLE.values():
        name = f"`{row.name}`" if row.name.isidentifier() else f"*{row.name}*"
        condition = row.condition.text if row.condition else ""
        lines.append(f"| {name} | {row.kind} | {row.outcome} | {condition} | {row.reason} | {row.cure} |")
    return "\n".join(lines)


def arguments_page() -> str:
    """Return the text of `docs/arguments.md`."""
    return PAGE.format(table=arguments_table())
