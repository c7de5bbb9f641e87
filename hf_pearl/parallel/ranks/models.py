"""Models over several ranks, as this process holds them: the first part, or, where others hold all, none of it."""

from __future__ import annotations

import weakref

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..tensor_parallel import load_shard
from ..tensor_parallel.sharding import part_of
from .child_ranks import ChildRanks
from .lane import lead, leader_of
from .leader import Leader
from .linked_draft import LinkedDraft
from .wire import RankModel

_stand_ins: weakref.WeakKeyDictionary[torch.nn.Module, RankModel] = weakref.WeakKeyDictionary()


_links: weakref.WeakKeyDictionary[torch.nn.Module, LinkedDraft] = weakref.WeakKeyDictionary()


def load_first_part(model: RankModel) -> PreTrainedModel:
    """Start the other ranks of a lane and load this one's part, which leads them; they end with it.

    Raises
    ------
    PearlWorkerError
        A rank could not load its part.
    """
    ranks = ChildRanks(model)
    try:
        leader = Leader(ranks)
        sums = leader.all_reduce, leader.all_gather
        part = load_shard(model.name, 0, model.size, *sums, dtype=model.torch_dtype, device=model.device_of(0))
        ranks.wait_until_ready()
    except BaseException:
        ranks.close()
        raise
    lead(part, leader, runs_alone=True)
    weakref.finalize(part, ranks.close)
    return part


def stand_in(model: RankModel, inputs_on: torch.device | None = None) -> PreTrainedModel:
    """A model without weights for one whose parts are all elsewhere: its configuration, and a key to what is known.

    Parameters
    ----------
    inputs_on : torch.device or None
        What it says as its `device`, where pipelines over it put their inputs; None: the meta device.
    """
    config = AutoConfig.from_pretrained(model.name, trust_remote_code=False)
    with torch.device("meta"):
        standing: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.torch_dtype).eval()
    if inputs_on is not None:  # A model's device is that of its first parameter.
        standing.register_parameter("inputs_on", torch.nn.Parameter(torch.empty(0, device=inputs_on)))
    _stand_ins[standing] = model
    return standing


def close_ranks(model: torch.nn.Module) -> None:
    """End the other ranks of a model; harmless where there are none."""
    leader = leader_of(model)
    if leader is not None:
        leader.ranks.close()


def link(model: PreTrainedModel, linked: LinkedDraft) -> None:
    """Have calls draft at the other end of a link, where a model is."""
    _links[model] = linked


def link_of(model: torch.nn.Module) -> LinkedDraft | None:
    """The link to where a model drafts; None where that is in this process or in one that it starts."""
    return _links.get(model)


def rank_model_of(model: torch.nn.Module) -> RankModel | None:
    """What a stand-in stands for; None of any other model."""
    return _stand_ins.get(model)


def is_whole(model: torch.nn.Module) -> bool:
    """Whether no other ranks hold a model, or parts of it."""
    return rank_model_of(model) is None and not (isinstance(model, PreTrainedModel) and part_of(model) is not None)


def check_whole(argument: str, model: torch.nn.Module, cure: str) -> None:
    """Raise `NotImplementedError` for a model that is not whole."""
    if not is_whole(model):
        raise NotImplementedError(
            f"`{argument}` is a {type(model).__name__} of `hf_pearl.launch` of which this process holds one part, or "
            f"none. {cure}"
        )
