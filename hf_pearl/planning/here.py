"""This machine as a plan sees it: what is free on its devices, and where models that are loaded already stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..model_devices import check_loaded, devices_of
from ..parallel.placement import stays
from .footprint import Footprint
from .planner import Split, split
from .topology import Device, other_device, present_devices


class Loaded(NamedTuple):
    """The models of a pair that are loaded already; None for one that is not."""

    target: PreTrainedModel | None
    draft: PreTrainedModel | None

    def check(self) -> None:
        """Raise `ValueError`, naming the model, for one without weights: calls here would not take it."""
        for argument, model in zip(self._fields, self, strict=True):
            if model is not None:
                check_loaded(
                    f"`{argument}`", model, ", pass its folder or name, or say by `devices` which machine to plan for"
                )


def split_here(
    loaded: Loaded, prints: Sequence[Footprint], min_tokens: int, shares_weights: bool
) -> tuple[tuple[Device, ...], Split]:
    """The devices of this machine, and where `PearlConfig()` leaves or moves the models, or they are to be loaded.

    Raises
    ------
    ValueError
        The devices do not hold the pair, or a model has no weights.
    """
    loaded.check()
    held = _held(loaded)
    present = [
        each._replace(memory=each.memory + (held.get(each.name, 0) if each.kind != "cpu" else 0))
        for each in present_devices(measured=True)
    ]
    target, draft = loaded
    target_on = None if target is None else devices_of(target)
    choices: list[list[torch.device] | None] = [None]
    if draft is not None:
        everywhere = target_on or [torch.device(each.name) for each in present]
        must_stay = shares_weights or stays(draft, everywhere)
        choices = [devices_of(draft), *([] if must_stay else [None])]
    for draft_on in choices:
        # A target that is to be loaded finds its place beside the draft, or "auto" moves the draft then.
        machine = (*present, *_others(present, held, [*(target_on or ()), *(draft_on or ())]))
        on = _names(target_on), _names(draft_on)
        try:
            found = split(machine, prints[0], prints[1], min_tokens, on[0], on[1], shares_weights)
        except ValueError:
            if draft_on is choices[-1]:
                raise
            continue
        if draft is None or stays(draft, [torch.device(name) for name in found.target.devices]):
            break
    return machine, found


def _names(devices: Sequence[torch.device] | None) -> list[str] | None:
    return None if devices is None else [str(device) for device in devices]


def _held(loaded: Loaded) -> dict[str, int]:
    """Bytes that the models hold already, by device; what they share once."""
    held: dict[str, int] = {}
    parameters = {id(each): each for model in loaded if model is not None for each in model.parameters()}
    for parameter in parameters.values():
        held[str(parameter.device)] = held.get(str(parameter.device), 0) + parameter.nbytes
    return held


def _others(present: Sequence[Device], held: dict[str, int], used: Sequence[torch.device]) -> list[Device]:
    """The devices that models are on and that `present_devices` does not count."""
    names = {each.name for each in present}
    return [other_device(name, held.get(name, 0)) for name in dict.fromkeys(map(str, used)) if name not in names]
