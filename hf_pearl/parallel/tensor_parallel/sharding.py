"""Make a rank's part of a model: cut its weights, and put in the modules that speak with the other ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .cuts import HeadLayout
from .modules import Collective, RowParallelLinear, VocabParallelEmbedding, VocabParallelHead
from .plan import Plan, make_plan, unsupported

_PART = "hf_pearl_part"


class Part(NamedTuple):
    """Which part of a model this is.

    Attributes
    ----------
    rank, size : int
        The `rank`-th of `size`, from 0.
    num_key_value_heads : int
        Of a layer, here: what a cache keeps, zeros included. The model's configuration has the whole number.
    """

    rank: int
    size: int
    num_key_value_heads: int


def part_of(model: PreTrainedModel) -> Part | None:
    """Which part of a model this is; None if it is a whole one."""
    return getattr(model, _PART, None)


def num_key_value_heads(model: PreTrainedModel) -> int | None:
    """Key-value heads of a layer here, if the model is a part; None of a whole one, whose configuration says it."""
    part = part_of(model)
    return None if part is None else part.num_key_value_heads


def shard(
    model: PreTrainedModel, rank: int, size: int, all_reduce: Collective, all_gather: Collective
) -> PreTrainedModel:
    """Cut a model that is loaded whole into a rank's part, in place; the ranks' forwards then compute the whole's.

    Results differ from the whole model's by the order of summation at most. The part is for inference: gradients do
    not pass the ranks.

    Parameters
    ----------
    model : PreTrainedModel
        With plain weights on one device. Its configuration stays that of the whole model.
    rank, size : int
        The `rank`-th of `size` ranks, from 0. With size 1 nothing is changed. Any size will do: where it does not
        divide heads, feed-forward width or vocabulary, zeros fill up.
    all_reduce, all_gather : callable
        Sum a tensor over the ranks; join the ranks' tensors along the last dimension. Called by all ranks in the same
        order, with equal shapes; the given tensor may be overwritten.

    Returns
    -------
    PreTrainedModel
        `model`.

    Raises
    ------
    ValueError
        `rank` or `size` is out of range.
    PearlUnsupportedModelError
        transformers has no tensor-parallel plan for the model, or one that leaves something whole; the model is then
        unchanged.
    """
    check_rank(rank, size)
    if size == 1:
        return model
    if part_of(model) is not None:
        raise ValueError(f"this {type(model).__name__} is already a part: {part_of(model)}. Load it again.")
    if any(hasattr(module, "_hf_hook") for module in model.modules()) or any(p.is_meta for p in model.parameters()):
        raise unsupported(model, "some of its weights are offloaded, or on several devices")
    plan = make_plan(model, rank, size)

    def local(names: list[str], whole: nn.Parameter) -> torch.Tensor:
        cut = plan.cuts.get(names[0])
        if cut is None:
            return whole
        return cut.take(whole, whole.device, lambda start, stop: whole.narrow(cut.dim, start, stop - start))

    replace_parameters(model, local)
    return make_part(model, plan, rank, size, all_reduce, all_gather)


def check_rank(rank: int, size: int) -> None:
    """Raise `ValueError` unless there is such a rank."""
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"`rank` must be from 0 to `size` - 1, and `size` at least 1; got {rank} and {size}.")


def replace_parameters(model: nn.Module, make: Callable[[list[str], nn.Parameter], torch.Tensor]) -> None:
    """Replace every parameter by what `make` returns for its names and itself; tied ones stay one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    with torch.no_grad():
        for own in names.values():  # One by one: nobody holds a whole any longer when the next part is made.
            made = nn.Parameter(make(own, model.get_parameter(own[0])), requires_grad=False)
            for name in own:
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, made)


def make_part(
    model: PreTrainedModel, plan: Plan, rank: int, size: int, all_reduce: Collective, all_gather: Collective
) -> PreTrainedModel:
    """Make a model whose weights are cut already compute its part, and ask the other ranks for theirs."""
    for name in plan.cuts:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    for name in plan.rows:
        model.set_submodule(name, RowParallelLinear(model.get_submodule(name), all_reduce))
    embedding, head = model.get_submodule(plan.embeddings), model.get_submodule(plan.head)
    vocab_size, embedding.num_embeddings = embedding.num_embeddings, embedding.weight.shape[0]
    parallel = VocabParallelEmbedding(embedding, plan.vocabulary.start, vocab_size, all_reduce)
    model.set_submodule(plan.embeddings, parallel)
    model.set_submodule(plan.head, VocabParallelHead(head, vocab_size, all_gather))
    for name, layout in plan.layouts.items():
        _tell_heads(model.get_submodule(name), layout)
    setattr(model, _PART, Part(rank, size, max(layout.per_rank for layout in plan.layouts.values())))
    model.save_pretrained = partial(_refuse_to_save, size)
    return model


def _refuse_to_save(size: int, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"this model is one of {size} parts, and its configuration is that of the whole: `from_pretrained` could not "
        "load what would be saved. Load the whole model with `from_pretrained`, and save that."
    )


def _tell_heads(attention: nn.Module, layout: HeadLayout) -> None:
    """Correct what an attention layer says of its heads; most read the shapes they get, all need the group's size."""
    told = {
        "num_key_value_groups": layout.group,
        "num_key_value_heads": layout.per_rank,
        "num_heads": layout.group * layout.per_rank,
    }
    for name in told.keys() & vars(attention).keys():
        setattr(attention, name, told[name])
    if hasattr(attention, "qkv_proj"):  # Phi-3 looks up in its configuration where the queries end.
        config: Any = copy.copy(attention.config)
        config.num_attention_heads = layout.group * layout.per_rank
        attention.config = config
