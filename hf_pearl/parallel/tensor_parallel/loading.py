"""Load a rank's part of a model: only its slices are read, so that no rank needs the memory of the whole."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ...compat import compute_buffers
from .checkpoint import Checkpoint, find_folder
from .cuts import Cut, Piece
from .modules import Collective
from .plan import Plan, make_plan
from .sharding import check_rank, make_part, replace_parameters

_LOAD_WHOLE = "Load the whole model with `from_pretrained`, which knows more names of weights, and `shard` it."


def load_shard(
    name: str | Path,
    rank: int,
    size: int,
    all_reduce: Collective,
    all_gather: Collective,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a rank's part of a causal language model: what `shard` would make of it, bit for bit.

    The model is built without memory, and of every weight only the rank's slice is read. A rank thus needs the memory
    of its part, and, while it loads, at most that of one more slice in the dtype of the file.

    Parameters
    ----------
    name : str or Path
        A folder with weights in safetensors, in one file or several with an index, or a model on the Hub.
    rank, size, all_reduce, all_gather
        As in `shard`. With size 1 the model is what `from_pretrained` loads.
    dtype : torch.dtype, optional
        Of the weights; by default as the model's configuration says.
    device : torch.device or str
        Where they go.
    revision : str, optional
        Branch, tag or commit on the Hub.

    Returns
    -------
    PreTrainedModel
        In evaluation mode.

    Raises
    ------
    FileNotFoundError
        There are no safetensors files.
    ValueError
        `rank` or `size` is out of range; weights are missing, or of another shape than the configuration says.
    PearlUnsupportedModelError
        As in `shard`.
    """
    check_rank(rank, size)
    if size == 1:
        with torch.device("cpu"):
            whole = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype or "auto")
        return whole.to(device).eval()
    folder = find_folder(name, revision)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = _without_memory(config, dtype)
    plan = make_plan(model, rank, size)
    # transformers and safetensors make tensors on the default device, which may be "meta".
    with torch.device("cpu"), Checkpoint(folder, model.base_model_prefix) as checkpoint:
        compute_buffers(model, torch.device(device))
        _load(model, plan, checkpoint, torch.device(device))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return make_part(model, plan, rank, size, all_reduce, all_gather)


def _without_memory(config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return model.eval()


def _load(model: PreTrainedModel, plan: Plan, checkpoint: Checkpoint, device: torch.device) -> None:
    """Give a model without memory this rank's part of the weights."""

    def local(names: list[str], whole: nn.Parameter) -> torch.Tensor:
        cut = plan.cuts.get(names[0], Cut(0, (Piece(0, whole.shape[0], whole.shape[0]),)))
        parts = []
        for found in filter(None, map(checkpoint.find, names)):
            slices = checkpoint.open(found, whole.shape)
            parts.append(cut.take(whole, device, functools.partial(_read, slices, cut.dim)))
        if not parts:
            raise ValueError(f"there is no {names[0]!r} in {checkpoint.folder}. {_LOAD_WHOLE}")
        if not all(torch.equal(part, parts[0]) for part in parts):
            raise ValueError(f"{' and '.join(names)} are one in the configuration and differ in {checkpoint.folder}.")
        return parts[0]

    replace_parameters(model, local)
    buffers = dict(model.named_buffers())
    for name in buffers.keys() & model.state_dict().keys():
        found = checkpoint.find(name)
        if found is None:
            raise ValueError(f"there is no {name!r} in {checkpoint.folder}. {_LOAD_WHOLE}")
        buffers[name].copy_(checkpoint.open(found, buffers[name].shape)[...])


def _read(slices: Any, dim: int, start: int, stop: int) -> torch.Tensor:
    return slices[start:stop] if dim == 0 else slices[:, start:stop]
