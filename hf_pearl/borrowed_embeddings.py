"""A draft that works on its target's embeddings, at both ends, and guesses the first tokens of the vocabulary only.

A large vocabulary's output layer costs more than the layers of a small draft, and byte-pair encodings number their
tokens by how early they were merged, so that frequent ones come first (a shortened output as in FR-Spec, Zhao et al.
2025, arXiv 2502.14856). Saved are the layers and the last norm alone; the embeddings are the target's own tensor.

Shapes: `V` the vocabulary, `K` tokens that the draft guesses, `H` the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

WEIGHTS = "model.safetensors"
BORROWED = frozenset({"model.embed_tokens.weight", "lm_head.weight"})


class ShortHead(nn.Module):
    """Logits of the first `K` tokens; the others get -inf.

    Parameters
    ----------
    vocab_size : int
        `V`: the weight is `(V, H)`, the embeddings themselves.
    num_guessed_tokens : int
        `K`.
    """

    def __init__(self, hidden_size: int, vocab_size: int, num_guessed_tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.num_guessed_tokens = num_guessed_tokens

    def short(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., H)` to the logits `(..., K)`."""
        return F.linear(hidden, self.weight[: self.num_guessed_tokens])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., H)` to `(..., V)`."""
        num_others = self.weight.shape[0] - self.num_guessed_tokens
        return F.pad(self.short(hidden), (0, num_others), value=-torch.inf)


class BorrowingLlama(LlamaForCausalLM):
    """A Llama with a `ShortHead`; `config.num_guessed_tokens` is its `K`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head = ShortHead(config.hidden_size, config.vocab_size, config.num_guessed_tokens)
        self.post_init()


def borrow(target: LlamaForCausalLM, config: LlamaConfig, weights: dict[str, torch.Tensor]) -> BorrowingLlama:
    """A draft of `weights` on the embeddings of `target`, in its dtype and on its device.

    They are one tensor, not a copy: what is done to it in place (`draft.half()`, a training step) is done to both.

    Parameters
    ----------
    weights : dict of str to torch.Tensor
        All of the draft's state but embeddings and output layer.

    Raises
    ------
    ValueError
        The target's output layer is not its embeddings, the draft was made for embeddings of another shape, or its
        weights do not fit.
    """
    embeddings = target.get_input_embeddings().weight
    if target.get_output_embeddings().weight is not embeddings:
        raise ValueError(f"{target.name_or_path} does not tie its output layer to its embeddings: nothing to borrow")
    if embeddings.shape != (config.vocab_size, config.hidden_size):
        raise ValueError(
            f"the draft works on embeddings ({config.vocab_size}, {config.hidden_size}), and those of "
            f"{target.name_or_path} are {tuple(embeddings.shape)}; use the target that it was trained for"
        )
    with torch.device("meta"):
        draft = BorrowingLlama(config)
    draft.model.embed_tokens.weight = draft.lm_head.weight = embeddings
    weights = {name: tensor.to(embeddings.device, embeddings.dtype) for name, tensor in weights.items()}
    found = draft.load_state_dict(weights, strict=False, assign=True)
    missing = set(found.missing_keys) - BORROWED
    if missing or found.unexpected_keys:
        raise ValueError(f"weights of the draft: {len(missing)} are missing, unknown are {found.unexpected_keys[:3]}")
    with torch.device("cpu"):  # Its frequencies are no weights: they come from the configuration.
        draft.model.rotary_emb = type(draft.model.rotary_emb)(config=config).to(embeddings.device)
    draft.generation_config = GenerationConfig.from_model_config(config)
    return draft.eval()


def first_draft(target: LlamaForCausalLM, layers: Sequence[int], num_guessed_tokens: int) -> BorrowingLlama:
    """An untrained draft: copies of some of the target's layers, and of its last norm."""
    inherited = {name: value for name, value in target.config.to_dict().items() if not name.startswith("_")}
    inherited.pop("layer_types", None)  # of all the target's layers
    own = {"num_hidden_layers": len(layers), "num_guessed_tokens": num_guessed_tokens}
    config = LlamaConfig.from_dict({**inherited, **own, "architectures": [BorrowingLlama.__name__]})
    state = target.state_dict()
    weights = {"model.norm.weight": state["model.norm.weight"].clone()}
    for place, layer in enumerate(layers):
        prefix = f"model.layers.{layer}."
        for name, value in state.items():
            if name.startswith(prefix):
                weights[f"model.layers.{place}.{name.removeprefix(prefix)}"] = value.clone()
    return borrow(target, config, weights)


def save_draft(draft: BorrowingLlama, folder: Path) -> None:
    """Save what is the draft's own, in bfloat16."""
    own = {name: value for name, value in draft.state_dict().items() if name not in BORROWED}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.bfloat16().contiguous() for name, value in own.items()}, folder / WEIGHTS, {"format": "pt"})
    draft.config.save_pretrained(folder)


def load_draft(target: LlamaForCausalLM, folder: Path) -> BorrowingLlama:
    """The draft that `save_draft` wrote, on the embeddings of `target`."""
    return borrow(target, LlamaConfig.from_pretrained(folder), load_file(folder / WEIGHTS))
