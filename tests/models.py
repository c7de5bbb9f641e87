"""Tiny random models, drafts and prompts for them, and what an equality test asks of its inputs and outputs."""

from __future__ import annotations

import copy
import logging
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging as transformers_logging

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.cache.attention import ATTENTION_NAME
from hf_pearl.registry import engines_of

VOCAB_SIZE = 64
SLIDING_WINDOW = 16
MAX_POSITIONS = 512
PAD_TOKEN_ID = 0
WEIGHT_STD = 0.5  # as initialised (0.02), a random tiny model repeats one token
VECTOR_STD = 0.1

INLINE = PearlConfig(execution="inline")
# The ways to run the draft lane. A process takes seconds to start for every new pair of models, so that tests with many
# pairs do without it.
IN_PROCESS = ("inline", "threads")
EXECUTIONS = (*IN_PROCESS, "processes")

_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
_WINDOWED = {**_GROUPED, "sliding_window": SLIDING_WINDOW}
_PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_TOKEN_ID,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "mistral": _WINDOWED,
    "gemma2": {**_WINDOWED, "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": _WINDOWED,
    "gpt_neox": {"intermediate_size": 64, "rotary_pct": 0.5},
    "gpt2": {},
}
SOFTCAP_ATTENTION = "softcap_in_float64"
DraftKind = Literal["unrelated", "noisy", "same"]
DRAFT_KINDS: tuple[DraftKind, ...] = ("unrelated", "noisy", "same")


@contextmanager
def own_random_state(seed: int) -> Iterator[None]:
    """Seed torch's default generator inside, and leave it outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class WarningsAreErrors(logging.Handler):
    """A lane that failed costs no token of the answer, only a warning: to a test of answers it would not show.

    That a draft does not pay is no failure: tiny ones need as long as their targets.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.expected: list[str] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if self.expected is not None:
            self.expected.append(message)
        elif not message.startswith("`assistant_model` does not make this model faster"):
            raise AssertionError(message)


_warnings = WarningsAreErrors()
_models: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


@contextmanager
def enabled_for_tiny_models() -> Iterator[None]:
    """`pearl` on every model; no warnings of ours; one torch thread, since several would get in each other's way.

    At the end every tiny model is released.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("hf_pearl").addHandler(_warnings)
    hf_pearl.enable()
    try:
        yield
    finally:
        hf_pearl.disable()
        logging.getLogger("hf_pearl").removeHandler(_warnings)
        for model in list(_models):
            hf_pearl.release(model)
        torch.set_num_threads(num_threads)


@contextmanager
def command_in_process() -> Iterator[None]:
    """Undo what a command changes in its process, and give it one thread: for tiny models, two are slower."""
    verbosity, shows_progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    transformers_logging.set_verbosity(verbosity)
    if shows_progress:
        transformers_logging.enable_progress_bar()


@contextmanager
def expected_warnings() -> Iterator[list[str]]:
    """Collect hf_pearl's warnings inside `enabled_for_tiny_models`."""
    _warnings.expected = []
    try:
        yield _warnings.expected
    finally:
        _warnings.expected = None


def tiny_model(
    architecture: str, seed: int, vocab_size: int = VOCAB_SIZE, dtype: torch.dtype = torch.float64, **overrides: Any
) -> PreTrainedModel:
    """A random model of `ARCHITECTURES`, every weight and bias of which matters; it has no end-of-text token."""
    options = {**_PLAIN, **ARCHITECTURES[architecture], "vocab_size": vocab_size, **overrides}
    with own_random_state(seed):
        config = AutoConfig.for_model(architecture, **options)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                spread = VECTOR_STD if parameter.ndim == 1 else WEIGHT_STD
                parameter.mul_(parameter.ndim == 1).add_(spread * torch.randn_like(parameter))
    if architecture == "gemma2" and dtype == torch.float64:
        model.set_attn_implementation(SOFTCAP_ATTENTION)
    _models.add(model)
    return model.to(dtype)


def softcap_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, H, Q, D)
    key: torch.Tensor,  # (B, K, L, D)
    value: torch.Tensor,  # (B, K, L, D)
    attention_mask: torch.Tensor | None,  # (B, 1, Q, L), added
    scaling: float,
    softcap: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Gemma-2's eager attention in float64; transformers' own takes the softmax in float32, where the mask's values

    overflow and padded rows become NaN.
    """
    num_groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(num_groups, 1), value.repeat_interleave(num_groups, 1)
    weights = torch.tanh(query @ key.transpose(-1, -2) * scaling / softcap) * softcap
    if attention_mask is not None:
        weights = weights + attention_mask[..., : key.shape[2]]
    return (weights.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(SOFTCAP_ATTENTION, softcap_attention)
AttentionMaskInterface.register(SOFTCAP_ATTENTION, eager_mask)


def noisy_copy(
    model: PreTrainedModel, noise: float, seed: int, vocab_size: int | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A draft for `model`: its weights plus `noise` times their own spread; perhaps of another vocabulary or dtype."""
    draft = copy.deepcopy(model)
    draft.set_attn_implementation("eager")
    with own_random_state(seed), torch.no_grad():
        for parameter in draft.parameters():
            spread = VECTOR_STD if parameter.ndim == 1 else WEIGHT_STD
            parameter.add_(noise * spread * torch.randn_like(parameter))
        if vocab_size is not None and vocab_size != draft.config.vocab_size:
            draft.resize_token_embeddings(vocab_size, mean_resizing=False)
            for weight in (draft.get_input_embeddings().weight, draft.get_output_embeddings().weight):
                added = weight[model.config.vocab_size :]
                added.copy_(WEIGHT_STD * torch.randn_like(added))
    return draft.to(dtype or model.dtype)


def make_draft(target: PreTrainedModel, kind: DraftKind, seed: int, noise: float = 0.05) -> PreTrainedModel:
    """A draft of one of three kinds: unrelated to `target`, its weights plus noise, or `target` itself."""
    if kind == "same":
        return target
    if kind == "noisy":
        return noisy_copy(target, noise, seed)
    return tiny_model("llama", seed, target.config.vocab_size, num_hidden_layers=1)


def tiny_tokenizer(seed: int, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` tokens of one to some letters each, spaces inside them too."""
    chance = random.Random(seed)
    texts = ["".join(chance.choices("abcdef ", weights=(5, 4, 3, 2, 2, 1, 3), k=400)) for _ in range(20)]
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.decoder = decoders.Fuse()
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left", clean_up_tokenization_spaces=False
    )


def random_prompts(
    chance: random.Random, batch_size: int, lengths: Sequence[int], vocab_size: int = VOCAB_SIZE
) -> dict[str, torch.Tensor]:
    """Prompts of random tokens, each of one of `lengths`, padded on the left: `input_ids` and `attention_mask`."""
    rows = [[chance.randrange(1, vocab_size) for _ in range(chance.choice(lengths))] for _ in range(batch_size)]
    return left_padded(rows)


def left_padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(batch, length)` of prompts of any lengths."""
    length = max(map(len, rows))
    paddings = [length - len(row) for row in rows]
    return {
        "input_ids": torch.tensor(
            [[PAD_TOKEN_ID] * padding + list(row) for padding, row in zip(paddings, rows, strict=True)]
        ),
        "attention_mask": torch.tensor([[0] * padding + [1] * (length - padding) for padding in paddings]),
    }


def is_varied(generated: torch.Tensor) -> bool:
    """Whether an output `(batch, new tokens)` is one that a wrong position, prefix or row would change.

    At least one token in five of the output must differ from all others, and every row from every other.
    """
    rows = {tuple(row) for row in generated.tolist()}
    distinct = len(set(generated.flatten().tolist()))
    return len(rows) == len(generated) and distinct >= min(0.2 * generated.numel(), VOCAB_SIZE / 4)


def assert_varied(generated: torch.Tensor) -> None:
    """Fail a test whose expected output is trivial: it would pass whatever the code did."""
    assert is_varied(generated), f"the expected output is trivial: {generated.tolist()}"


def assert_equal(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    inputs: dict[str, torch.Tensor],
    config: PearlConfig = INLINE,
    **arguments: Any,
) -> tuple[torch.Tensor, Any]:
    """Fail unless ours equals transformers' `generate`; return the expected new tokens, and our output as a dict."""
    expected = target.generate(**inputs, do_sample=False, **arguments)
    output = target.generate(
        **inputs, do_sample=False, **arguments, assistant_model=draft, pearl=config, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected.tolist()
    return expected[:, inputs["input_ids"].shape[1] :], output


def assert_nothing_held(*models: PreTrainedModel) -> None:
    """Fail unless no engine of `models` has a block in use, and all books balance; `models` must be as they were."""
    for model in models:
        assert model.config._attn_implementation != ATTENTION_NAME
        for engine in engines_of(model):
            for cache in engine.caches.values():
                cache.check_integrity([])
                assert cache.pool.num_referenced == 0
