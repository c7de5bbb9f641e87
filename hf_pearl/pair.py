"""The embedded pair: a small target and its draft, for the demo, the notebook and first steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = Path(__file__).parent / "demo_pair"
PROMPTS = PACKAGED / "held_out_prompts.jsonl"
PARTS = ("target", "draft")


def load_demo_pair(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the pair of models that comes with hf_pearl.

    Parameters
    ----------
    device : torch.device or str, optional
        Where both models go; by default a CUDA device if there is one, else the CPU.
    dtype : torch.dtype or str, optional
        Of both models; by default float32 on a CPU and bfloat16 elsewhere.

    Returns
    -------
    tuple
        Target, draft, and the tokenizer of both.

    Raises
    ------
    FileNotFoundError
        Neither the package nor the cache folder (`demo_pair_folder`) holds the weights.
    """
    folder = demo_pair_folder()
    device = default_device() if device is None else torch.device(device)
    target, draft = (load_model(folder / part, device, dtype) for part in PARTS)
    return target, draft, AutoTokenizer.from_pretrained(folder / "target")


def demo_pair_folder() -> Path:
    """Where the pair lies: in the package, or in `$HF_PEARL_HOME/pair` (default: `~/.cache/hf_pearl/pair`).

    Raises
    ------
    FileNotFoundError
        Neither folder holds both models.
    """
    cached = cache_folder() / "pair"
    for folder in (PACKAGED, cached):
        if all((folder / part / "model.safetensors").is_file() for part in PARTS):
            return folder
    raise FileNotFoundError(
        f"the weights of the embedded pair are neither in {PACKAGED} nor in {cached}. Train a small pair there, in the "
        f"repository of hf_pearl: make pair ARGS='--minutes 10 --output {cached}'. Or name two models of your own."
    )


def cache_folder() -> Path:
    """`$HF_PEARL_HOME`, else `hf_pearl` in the user's cache folder."""
    home = os.environ.get("HF_PEARL_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_pearl"


def default_device() -> torch.device:
    """A CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    name: str | Path, device: torch.device, dtype: torch.dtype | str | None = None, **more: Any
) -> PreTrainedModel:
    """A causal language model by name or folder; by default in float32 on a CPU and in bfloat16 elsewhere.

    `more` goes to `from_pretrained`.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch.device("cpu"):  # `from_pretrained` would take a default device for `device_map`, and fails on "meta".
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **more)
    return model.to(device).eval()
