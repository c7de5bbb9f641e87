"""The argument table is complete, and what it refuses is refused: by name, before any work, and leaving no trace."""

from __future__ import annotations

import copy
import inspect
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BatchEncoding,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkingConfig,
)

from hf_pearl import argument_table
from hf_pearl.argument_table import CUSTOM_ENTRY, MODEL_INPUT, TABLE
from hf_pearl.arguments import arguments_page, arguments_table, check_arguments
from hf_pearl.models import unwrap

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ERRORS = (ValueError, TypeError, NotImplementedError)


def make_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer that knows some words."""
    vocabulary = {word: index for index, word in enumerate(("<unk>", *words))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<unk>")))


MODEL = LlamaForCausalLM(LlamaConfig(**SIZES))
T5 = T5ForConditionalGeneration(
    T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
)
LARGE = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": VOCABULARY + 1025}))
MAMBA = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4))
TOKENIZER, SAME_TOKENIZER, OTHER_TOKENIZER = make_tokenizer("a"), make_tokenizer("a"), make_tokenizer("b")
IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
POSITIONS = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])
SYNTH_ID = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
GUIDANCE = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, MODEL)


class Case(NamedTuple):
    """A call that must be refused: the name that the error must bear, the call, and the error's type."""

    name: str
    arguments: dict[str, Any]
    error: type[Exception] = NotImplementedError
    row: str = ""


def of_config(name: str, *values: Any, error: type[Exception] = NotImplementedError) -> list[Case]:
    """Return one case per refused value of one argument that is given alone."""
    return [Case(name, {name: value}, error) for value in values]


def of_inputs(name: str, error: type[Exception], *values: Any, **others: Any) -> list[Case]:
    """Return one case per refused value of a model input, beside the default prompts and `others`."""
    return [Case(name, {"input_ids": IDS, **others, name: value}, error) for value in values]


REFUSED = [
    Case("inputs", {"inputs": IDS, "input_ids": IDS}, ValueError),
    *of_config("inputs", IDS.float(), IDS + VOCABULARY, error=ValueError),
    *of_inputs("input_ids", TypeError, IDS.tolist(), IDS.numpy(), "a prompt", BatchEncoding({"input_ids": IDS})),
    *of_inputs("input_ids", ValueError, IDS.float(), IDS > 5, IDS[0], IDS[None], IDS[:0], IDS[:, :0], torch.tensor(3)),
    *of_inputs("input_ids", ValueError, IDS - 4, IDS + VOCABULARY - 10, torch.full((1, 1), 2**40)),
    *of_inputs("attention_mask", TypeError, MASK.tolist(), True),
    *of_inputs("attention_mask", ValueError, MASK[:1], MASK[0], MASK[:, :3], MASK[:, None, None], MASK[:, :0]),
    *of_inputs("attention_mask", ValueError, MASK * 2, MASK - 1, MASK * 0.5, MASK * float("nan")),
    *of_inputs("attention_mask", ValueError, MASK.flip(1), MASK * 0, torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])),
    *of_inputs("attention_mask", ValueError, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])),
    Case("attention_mask", {"attention_mask": torch.ones(2, 3)}, ValueError),
    Case("attention_mask", {"input_ids": torch.tensor([[3, 0, 4]])}, ValueError),
    Case("attention_mask", {"input_ids": torch.tensor([[3, 4, 5], [3, 4, 0]])}, ValueError),
    *of_inputs("position_ids", TypeError, POSITIONS.tolist(), attention_mask=MASK),
    *of_inputs("position_ids", NotImplementedError, POSITIONS + 1, POSITIONS[:, :3], POSITIONS[None], POSITIONS[1:],
               attention_mask=MASK),
    *of_inputs("position_ids", NotImplementedError, POSITIONS),
    *of_config("generation_config", {"max_new_tokens": 3}, error=TypeError),
    *of_config("logits_processor", WatermarkingConfig, GUIDANCE, error=TypeError),
    *of_config("logits_processor", [GUIDANCE], LogitsProcessorList([SYNTH_ID.construct_processor(VOCABULARY, "cpu")])),
    *of_config("stopping_criteria", len, error=TypeError),
    *of_config("prefix_allowed_tokens_fn", [1, 2], error=TypeError),
    *of_config("streamer", True, print, error=TypeError),
    *of_config("assistant_model", "org/draft", MODEL.config, torch.nn.Linear(2, 2), LlamaModel(MODEL.config), True,
               error=TypeError),
    *of_config("assistant_model", T5, MAMBA),
    *of_config("assistant_model", LARGE, error=ValueError),
    Case("assistant_tokenizer", {"assistant_tokenizer": TOKENIZER}, ValueError),
    Case("assistant_tokenizer", {"assistant_tokenizer": "gpt2", "tokenizer": TOKENIZER}, TypeError),
    Case("assistant_tokenizer", {"assistant_tokenizer": OTHER_TOKENIZER, "tokenizer": TOKENIZER}),
    *of_config("stop_strings", "end", ["a", "b"], error=ValueError),
    *of_config("logits_to_keep", torch.tensor([0, 1])),
    *of_config("pad_token_id", "<pad>", 0.5, 10**30, error=TypeError),
    *of_config("eos_token_id", "</s>", ["</s>"], 0.5, [2, 2.5], 10**30, error=TypeError),
    *of_config("synced_gpus", True),
    *of_config("custom_generate", "org/repository", print),
    *of_config("negative_prompt_ids", IDS),
    *of_config("negative_prompt_attention_mask", MASK),
    *of_config("inputs_embeds", torch.zeros(2, 4, 16)),
    *of_config("cache", DynamicCache(), ()),
    *of_config("past_key_values", DynamicCache(), ()),
    Case("labels", {"labels": IDS}, row=MODEL_INPUT),
    Case("output_router_logits", {"output_router_logits": True}, row=MODEL_INPUT),
    Case("pixel_values", {"pixel_values": torch.zeros(1, 3, 2, 2)}, ValueError),
    Case("max_new_token", {"max_new_token": 3}, ValueError),
    *of_config("watermarking_config", SYNTH_ID),
    *of_config("num_beams", 2, 0, "4"),
    *of_config("num_beam_groups", 2),
    *of_config("diversity_penalty", 0.5),
    *of_config("constraints", [print]),
    *of_config("force_words_ids", [[3]]),
    *of_config("penalty_alpha", 0.6),
    *of_config("low_memory", True),
    *of_config("dola_layers", "high", [1]),
    *of_config("guidance_scale", 1.5, 0),
    *of_config("token_healing", True),
    *of_config("prompt_lookup_num_tokens", 3),
    *of_config("assistant_early_exit", 1),
    *of_config("use_mtp", True),
    *of_config("speculation_type", "dflash"),
    *of_config("assistant_ensemble_weight", 0.5),
    *of_config("is_assistant", True),
    *of_config("use_cache", False),
    *of_config("cache_implementation", "static", "offloaded", "quantized", "paged"),
    *of_config("cache_config", {"nbits": 4}),
    *of_config("output_attentions", True),
    *of_config("output_hidden_states", True),
    *of_config("continuous_batching_config", object()),
]  # fmt: skip

# A value other than the default for every argument and field that is honoured or has no effect.
ACCEPTED: dict[str, Any] = {
    "inputs": IDS, "input_ids": IDS.int(), "attention_mask": torch.ones(2, 1), "position_ids": torch.zeros(1, 1),
    "generation_config": GenerationConfig(max_new_tokens=3), "logits_processor": [lambda ids, scores: scores],
    "stopping_criteria": StoppingCriteriaList(), "prefix_allowed_tokens_fn": lambda batch_id, ids: [3],
    "streamer": TextStreamer(TOKENIZER), "assistant_model": MODEL, "tokenizer": TOKENIZER, "pearl": True,
    "assistant_tokenizer": TOKENIZER, "logits_to_keep": 0, "trust_remote_code": True,
    "max_length": 9, "max_new_tokens": 5, "min_length": 2, "min_new_tokens": 2, "max_time": 1.5, "stop_strings": "a",
    "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5,
    "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2,
    "bad_words_ids": [[3, 4]], "sequence_bias": {(3,): 1.0}, "suppress_tokens": [3], "begin_suppress_tokens": [3],
    "forced_bos_token_id": 3, "forced_eos_token_id": [2], "exponential_decay_length_penalty": (2, 1.1),
    "remove_invalid_values": True, "renormalize_logits": True, "encoder_repetition_penalty": 1.5,
    "encoder_no_repeat_ngram_size": 2, "watermarking_config": WatermarkingConfig(), "num_return_sequences": 3,
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "pad_token_id": 5,
    "bos_token_id": 5, "eos_token_id": [2, 3], "early_stopping": "never", "length_penalty": 2.0,
    "decoder_start_token_id": 3, "num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1, "max_matching_ngram_size": 3, "assistant_lookbehind": 3,
    "target_lookbehind": 3, "max_cache_len": 50, "compile_config": CompileConfig(), "disable_compile": True,
    "prefill_chunk_size": 3, "_from_model_config": True, "_commit_hash": "0", "transformers_version": "5.17.0",
    CUSTOM_ENTRY: "an entry",
}  # fmt: skip
NEEDED = {"stop_strings": {"tokenizer": TOKENIZER}, "assistant_tokenizer": {"tokenizer": SAME_TOKENIZER}}


def merged_config(**fields: Any) -> GenerationConfig:
    """Return the config that `generate` would work with: the model's own, defaults, then fields of the call."""
    config = copy.deepcopy(MODEL.generation_config)
    defaults = GenerationConfig._get_default_generation_params()
    for name, value in {**defaults, **fields}.items():
        if name in fields or getattr(config, name, None) is None:
            setattr(config, name, value)  # not `update`, which refuses some of the values itself
    return config


def check_call(arguments: dict[str, Any], model: Any = MODEL) -> None:
    """Check a call as `generate` would make it: fields of the config are in the config, and still in the call."""
    fields = {name: value for name, value in arguments.items() if TABLE.get(name) and TABLE[name].kind == "config"}
    check_arguments(model, merged_config(**fields), arguments)


def state_of(model: torch.nn.Module, config: GenerationConfig, arguments: dict[str, Any]) -> list[Any]:
    """Return what a check could have changed: attributes, weights' versions, configs, the call and its tensors."""
    versions = [(name, id(weight), weight._version) for name, weight in model.named_parameters()]
    tensors = {name: repr(value.tolist()) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    attributes = {name: id(value) for name, value in vars(model).items()}
    owned = repr((model.config.to_dict(), vars(model.generation_config), vars(config)))
    return [versions, tensors, attributes, owned, dict.fromkeys(arguments), [id(each) for each in arguments.values()]]


def test_every_field_of_the_generation_config_is_in_the_table() -> None:
    fields = set(vars(GenerationConfig())) | set(GenerationConfig().to_dict())
    assert fields - {name for name, row in TABLE.items() if row.kind == "config"} == set()


def test_every_parameter_of_generate_is_in_the_table() -> None:
    parameters = inspect.signature(GenerationMixin.generate).parameters.values()
    names = {each.name for each in parameters if each.kind != each.VAR_KEYWORD} - {"self"}
    for function in (GenerationMixin.generate, GenerationMixin._extract_generation_mode_kwargs):
        names |= set(re.findall(r"\bkwargs\.(?:pop|get)\(\"(\w+)\"", inspect.getsource(function)))
    assert {"inputs", "streamer", "tokenizer", "trust_remote_code"} <= names
    assert names - set(TABLE) == set()


def test_the_table_names_nothing_twice_and_nothing_that_is_gone() -> None:
    assert len(TABLE) == len(argument_table.ARGUMENTS + argument_table.CONFIG + argument_table.MODELS)
    fields = {name for name, row in TABLE.items() if row.kind == "config"}
    assert fields - set(vars(GenerationConfig())) - {CUSTOM_ENTRY} <= {"_commit_hash"}  # gone after 5.17


def test_the_documentation_is_the_table() -> None:
    text = (ROOT / "docs" / "arguments.md").read_text("utf-8")
    assert text == arguments_page(), "run: python -m hf_pearl.arguments > docs/arguments.md"
    assert arguments_table() in text
    lines = arguments_table().splitlines()
    assert len(lines) == 2 + len(TABLE)
    assert {line.count("|") for line in lines} == {7}


def test_every_row_has_a_case_here() -> None:
    refused = {case.row or case.name for case in REFUSED}
    assert {name for name, row in TABLE.items() if row.condition and row.kind != "model"} - refused == set()
    assert {name for name, row in TABLE.items() if row.outcome != "refused"} == set(ACCEPTED)
    assert {
        row.kind for row in TABLE.values() if row.outcome == "refused" and not (row.condition and row.cure)
    } == set()


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_refusal_names_the_argument_and_leaves_no_trace(case: Case) -> None:
    fields = {name: value for name, value in case.arguments.items() if TABLE.get(name) and TABLE[name].kind == "config"}
    config, arguments = merged_config(**fields), dict(case.arguments)
    before = state_of(MODEL, config, arguments)
    with pytest.raises(ERRORS, match=rf"^`pearl` refuses `{case.name}` \(.+\): .+\. .+\.$") as caught:
        check_arguments(MODEL, config, arguments)
    assert isinstance(caught.value, case.error)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert state_of(MODEL, config, arguments) == before


@pytest.mark.parametrize("case", [case for case in REFUSED if TABLE.get(case.name, TABLE["pearl"]).kind == "config"],
                         ids=lambda case: case.name)  # fmt: skip
def test_a_field_is_refused_wherever_it_is_given(case: Case) -> None:
    with pytest.raises(case.error, match=f"`{case.name}`"):
        check_arguments(MODEL, merged_config(**case.arguments), {})
    with pytest.raises(case.error, match=f"`{case.name}`"):
        check_arguments(MODEL, merged_config(), case.arguments)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_honoured_or_without_effect_is_accepted(name: str) -> None:
    arguments = {name: ACCEPTED[name], **NEEDED.get(name, {})}
    if name == CUSTOM_ENTRY:
        check_arguments(MODEL, merged_config(entry=1), {"entry": 1})
    else:
        check_call(arguments)


def test_defaults_are_never_refused() -> None:
    parameters = inspect.signature(GenerationMixin.generate).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not each.empty}
    check_arguments(MODEL, GenerationConfig(), {})
    check_arguments(MODEL, merged_config(), defaults)
    for name, value in {**dict.fromkeys(TABLE), **GenerationConfig._get_default_generation_params()}.items():
        check_call({name: value})
    check_call({"guidance_scale": 1.0, "penalty_alpha": 0.0, "use_cache": True, "cache_implementation": "dynamic"})
    check_call({"output_attentions": False, "synced_gpus": False, "cache_implementation": "hybrid"})


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({}, id="none: the BOS token"),
        pytest.param({"input_ids": IDS}, id="ids"),
        pytest.param({"input_ids": torch.tensor([[0, VOCABULARY - 1]])}, id="the ends of the vocabulary"),
        pytest.param({"input_ids": IDS, "attention_mask": MASK}, id="left padding"),
        pytest.param({"input_ids": IDS, "attention_mask": MASK.bool()}, id="boolean mask"),
        pytest.param({"input_ids": IDS, "attention_mask": MASK.float()}, id="float mask"),
        pytest.param({"attention_mask": torch.ones(3, 1)}, id="mask of three BOS tokens"),
        pytest.param({"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS}, id="positions"),
        pytest.param({"input_ids": IDS, "attention_mask": MASK, "position_ids": POSITIONS + 1 - MASK}, id="of padding"),
        pytest.param({"input_ids": IDS, "position_ids": torch.arange(4)[None]}, id="one row of positions"),
        pytest.param({"input_ids": torch.tensor([[0, 0, 3]])}, id="pads on the left, no mask"),
        pytest.param(
            {"input_ids": torch.tensor([[0, 0, 3]]), "position_ids": torch.tensor([[0, 0, 0]])}, id="inferred"
        ),
        pytest.param({"input_ids": torch.tensor([[3, 0, 3]]), "eos_token_id": [2, 0]}, id="pad ends a text: no mask"),
        pytest.param({"input_ids": torch.tensor([[3, 0, 3]]), "attention_mask": torch.ones(1, 3)}, id="pad in a text"),
    ],
)
def test_good_prompts_are_accepted(inputs: dict[str, Any]) -> None:
    check_call(inputs)


@pytest.mark.parametrize(
    "mask, fault",
    [
        pytest.param([[1, 1, 1], [1, 1, 0]], "row 1 ends in padding", id="right padding"),
        pytest.param([[1, 0, 1], [1, 1, 1]], "row 0 has a hole", id="hole"),
        pytest.param([[0, 1, 1], [0, 0, 0]], "row 1 masks every token", id="nothing"),
    ],
)
def test_a_refused_mask_says_which_row_and_why(mask: list[list[int]], fault: str) -> None:
    with pytest.raises(ValueError, match=f"`attention_mask` .*{fault}.*padding_side = 'left'"):
        check_call({"input_ids": IDS[:, :3], "attention_mask": torch.tensor(mask)})


def test_a_refused_token_id_is_named_with_the_size_of_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="token id 40 is outside the target's vocabulary of 40"):
        check_call({"input_ids": torch.tensor([[3, VOCABULARY]])})


@pytest.mark.parametrize("model, kind", [(T5, "encoder-decoder"), (MAMBA, "recurrent state")])
def test_models_that_no_lane_can_run_are_refused(model: Any, kind: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"`model` \(a {type(model).__name__}\): {kind}"):
        check_call({"input_ids": IDS}, model)
    with pytest.raises(NotImplementedError, match=rf"`assistant_model` \(a {type(model).__name__}\): {kind}"):
        check_call({"input_ids": IDS, "assistant_model": model})


def test_a_model_without_keys_and_values_in_one_layer_is_refused() -> None:
    sizes = {**SIZES, "layer_types": ["full_attention", "conv"]}
    with pytest.raises(NotImplementedError, match="recurrent state"):
        check_call({}, Lfm2ForCausalLM(Lfm2Config(**sizes)))


def test_sliding_windows_are_accepted() -> None:
    check_call({"input_ids": IDS}, MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)))


def test_a_draft_may_have_a_padded_or_shortened_vocabulary_and_no_wholly_different_one() -> None:
    padded = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": VOCABULARY + 1024}))
    check_call({"assistant_model": padded})
    check_call({"assistant_model": MODEL}, padded)
    short = LlamaForCausalLM(MODEL.config)
    short.lm_head = torch.nn.Linear(16, 8, bias=False)
    check_call({"assistant_model": short})
    with pytest.raises(ValueError, match=r"`assistant_model` .* 1065 tokens, and the target's 40, .*'s tokenizer"):
        check_call({"assistant_model": LARGE})
    with pytest.raises(ValueError, match=r"`assistant_model` .* 40 tokens, and the target's 1065, "):
        check_call({"assistant_model": torch.compile(MODEL)}, Adapter(LARGE))


class Adapter(torch.nn.Module):
    """A wrapper of PEFT's kind, around anything."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> torch.nn.Module:
        return self.base


def test_wrappers_are_taken_off_in_any_order() -> None:
    for wrapped in (Adapter(torch.compile(MODEL)), torch.compile(Adapter(MODEL)), Adapter(Adapter(MODEL)), MODEL):
        assert unwrap(wrapped) is MODEL
        check_call({"assistant_model": wrapped})
    for other in (None, "a name", MODEL.lm_head):
        assert unwrap(other) is other


def test_wrapped_drafts_are_accepted() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    draft = LlamaForCausalLM(MODEL.config)
    check_call({"assistant_model": torch.compile(draft)})
    lora = peft.get_peft_model(draft, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    check_call({"assistant_model": lora})
    check_call({"assistant_model": torch.compile(lora)})


def test_soft_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    base = LlamaForCausalLM(MODEL.config)
    prompted = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(NotImplementedError, match=r"`assistant_model` .*soft prompt"):
        check_call({"assistant_model": prompted})
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, **arguments: check_call(arguments, self))
    with pytest.raises(NotImplementedError, match=r"`model` .*soft prompt"):
        prompted.generate(input_ids=IDS)
    base.generate(input_ids=IDS)  # the adapter is not in the way of the model itself
    lora = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    lora.generate(input_ids=IDS)


def test_a_typing_error_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match="Perhaps you mean `max_new_tokens`"):
        check_call({"max_new_token": 3})


def test_a_field_of_a_later_transformers_is_refused_unless_it_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TABLE, "guidance_scale")
    monkeypatch.delitem(TABLE, "num_beams")
    check_arguments(MODEL, merged_config(), {})
    for name in ("guidance_scale", "num_beams"):
        with pytest.raises(NotImplementedError, match=rf"`{name}` \(4\).*update hf-pearl"):
            check_arguments(MODEL, merged_config(**{name: 4}), {})


def test_any_call_passes_or_is_refused_by_name(seed: int) -> None:
    """400 calls of one to five arguments, with values that fit them and values that fit nothing."""
    draw = random.Random(seed)
    names = [name for name, row in TABLE.items() if row.kind != "model" and name not in (MODEL_INPUT, CUSTOM_ENTRY)]
    names += ["pixel_values", "labels", "soft prompt", MODEL_INPUT, ""]
    anything = [None, True, False, 0, 1, -1, 3, 2.5, 1j, float("nan"), "", "a", [], [3], [[3, 4]], (), {}, {"a": 1},
                b"a", object(), print, int, MODEL, T5, TOKENIZER, GUIDANCE, SYNTH_ID, DynamicCache(), torch.tensor(3),
                torch.zeros(0), torch.ones(2), IDS, MASK, MASK.flip(1), POSITIONS, IDS.double(), torch.ones(1, 2, 3),
                torch.zeros(2, 0, dtype=torch.long), IDS.to(torch.complex64), torch.full((2, 4), 1e9)]  # fmt: skip
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        chosen = draw.sample(names, draw.randint(1, 5))
        arguments = {
            name: ACCEPTED[name] if name in ACCEPTED and draw.random() < 0.6 else draw.choice(anything)
            for name in chosen
        }
        fields = {name: value for name, value in arguments.items() if name in TABLE and TABLE[name].kind == "config"}
        config = merged_config(**fields)
        before = state_of(MODEL, config, arguments)
        try:
            check_arguments(MODEL, config, arguments)
        except ERRORS as error:
            name = re.match(r"`pearl` refuses `([^`]*)` \(", str(error))
            assert name and name[1] in {*arguments, "attention_mask"}, f"{arguments}: {error!r}"
            outcomes[False] += 1
        else:
            outcomes[True] += 1
        assert state_of(MODEL, config, arguments) == before
    assert min(outcomes.values()) > 50, outcomes
