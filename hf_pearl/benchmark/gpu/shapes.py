"""Models of real shapes with random weights, made on the device without a download."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

# Standard deviation of the logits. From about 5 on (the square root of twice the logarithm of the vocabulary) one of so
# many random logits has a likely token: a draft's guesses are then as far apart as a trained model's.
LOGIT_SPREAD = 8.0


class Shape(NamedTuple):
    """What decides how long a forward takes."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    ties_embeddings: bool
    head_dim: int = 128
    vocab_size: int = 151_936


# Of the models' own configurations (https://huggingface.co/Qwen).
QWEN3 = {
    "0.6B": Shape(28, 1024, 3072, 16, 8, True),
    "1.7B": Shape(28, 2048, 6144, 16, 8, True),
    "8B": Shape(36, 4096, 12288, 32, 8, False),
    "32B": Shape(64, 5120, 25600, 64, 8, False),
}


def shape_config(shape: Shape) -> Qwen3Config:
    """The configuration of a Qwen3 model; it knows no end of text."""
    return Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.ties_embeddings,
        max_position_embeddings=32_768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


@torch.no_grad()
def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Qwen3 model of a shape, whose logits are spread as wide as a trained model's."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=dtype).eval()
    # Of random sign, or a head that is the embedding, too, would say each token again.
    model.get_decoder().norm.weight.copy_(torch.randn(shape.hidden_size).sign())
    # What goes into the head is normalised: its entries' squares are 1 on average.
    model.get_output_embeddings().weight.normal_(std=LOGIT_SPREAD / math.sqrt(shape.hidden_size))
    return model


def step_weights(model: PreTrainedModel) -> int:
    """How many weights a decode step reads: all but an embedding that is not the head, too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(each.numel() for each in model.parameters()) - (0 if embedding is head else embedding.numel())


def shape_step_weights(shape: Shape) -> int:
    """The same of a shape, for which no weight is made."""
    with torch.device("meta"):
        return step_weights(AutoModelForCausalLM.from_config(shape_config(shape)))
