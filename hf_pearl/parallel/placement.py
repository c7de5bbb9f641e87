"""Where the models of a pair are to lie, and bringing them there: through accelerate, and back again.

Who may be moved: a model that lies on one device, as a whole. One that accelerate has dispatched, that is offloaded,
quantised or tensor-parallel was placed by somebody who knew why; it is left there.

What "auto" moves: the draft alone, on which no token of the output depends. The target decides how logits are rounded,
and stays where its user has put it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import get_balanced_memory
from transformers import PreTrainedModel
from transformers.utils import logging

from ..compat import keys_left_in_place, modules_not_to_split
from ..config import PearlConfig
from ..device_arguments import named_devices, present
from ..model_devices import check_loaded, devices_of, input_device, is_dispatched, is_offloaded
from ..models import all_modules, is_quantised, shared_bytes
from ..planning.footprint import Footprint
from ..planning.layout import divide
from ..planning.parts import device_map, place_of
from ..planning.planner import gib, split
from ..planning.topology import Device, present_devices
from .ranks.lane import num_ranks
from .ranks.models import rank_model_of

logger = logging.get_logger(__name__)

_UNLIMITED = 2**62
MIN_TOKENS = 8192  # for which the caches must have room before "auto" moves a draft
Devices = tuple[torch.device, ...]


class Placed(NamedTuple):
    """A model that was moved: where from, and where to."""

    origin: torch.device
    devices: Devices


class Move(NamedTuple):
    """A model that is to be moved, why, and whether its user asks for it."""

    model: PreTrainedModel
    devices: Devices
    why: str
    is_asked: bool = True


_placed: weakref.WeakKeyDictionary[torch.nn.Module, Placed] = weakref.WeakKeyDictionary()


def why_fixed(model: PreTrainedModel) -> str | None:
    """Why a model must not be moved; None if it may be."""
    if is_quantised(model):
        return "is quantised"
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        return "is tensor-parallel"
    if num_ranks(model) > 1 or rank_model_of(model) is not None:
        return "lies on the ranks that `launch` has started"
    if model in _placed:
        return None
    if is_offloaded(model):
        return "is offloaded"
    if is_dispatched(model):
        return "was dispatched by accelerate"
    return "lies on several devices" if len(devices_of(model)) > 1 else None


def check_pair_loaded(target: PreTrainedModel, draft: PreTrainedModel | None) -> None:
    """Raise `ValueError`, naming the model, for one without weights."""
    for name, model in (("The target", target), ("`assistant_model`", draft)):
        if model is not None and rank_model_of(model) is None:
            check_loaded(name, model)


def placed_devices(model: PreTrainedModel) -> Devices | None:
    """Where a model was moved to and still lies; None where it was not."""
    placed = _placed.get(model)
    if placed is None or not set(devices_of(model)) <= set(placed.devices):
        return None
    return placed.devices


def wanted_moves(target: PreTrainedModel, draft: PreTrainedModel | None, config: PearlConfig) -> list[Move]:
    """What has to be moved for a call; mostly nothing.

    Raises
    ------
    ValueError
        A device that is not there, or is asked for a model that must not be moved.
    """
    target_devices = named_devices("target_devices", config.target_devices)
    draft_devices = named_devices("draft_devices", config.draft_devices)
    moves = []
    if target_devices is not None:
        moves += _asked("target_devices", target, target_devices)
    if draft is None or (draft is target and draft_devices in (None, target_devices)):
        return moves
    if draft_devices is not None:
        moves += _asked("draft_devices", draft, draft_devices)
    elif (moves[0].devices[0] if moves else input_device(target)).type == "cuda":
        moves += _automatic(target, draft, moves[0].devices if moves else tuple(devices_of(target)))
    if moves and target_devices != draft_devices and shared_bytes(target, draft):
        if draft_devices is None and target_devices is None:
            return []
        raise ValueError(
            "`target_devices` and `draft_devices` must be the same for models that share weights (the draft uses its "
            f"target's), got {config.target_devices!r} and {config.draft_devices!r}."
        )
    return moves


def _asked(name: str, model: PreTrainedModel, devices: Devices) -> list[Move]:
    """The move that a user asks for, if there is one."""
    devices = present(name, devices)
    if lies_on(model, devices):
        return []
    _check_may_move(name, model, devices)
    return [Move(model, devices, f"`{name}` asks for it")]


def lies_on(model: PreTrainedModel, devices: Devices) -> bool:
    """Whether a model need not be moved to be on devices."""
    return placed_devices(model) == devices or set(devices_of(model)) == set(devices)


def _check_may_move(name: str, model: PreTrainedModel, devices: Devices) -> None:
    reason = why_fixed(model)
    if reason is not None:
        raise ValueError(
            f"`{name}` asks for {_shown(devices)}, but the {type(model).__name__} {reason} and stays on "
            f"{_shown(devices_of(model))}. Load it there (`from_pretrained(..., device_map=...)`), or leave it out."
        )


def _automatic(target: PreTrainedModel, draft: PreTrainedModel, target_devices: Devices) -> list[Move]:
    """The move of a draft by "auto", if there is one, beside a target on GPUs."""
    draft_devices = devices_of(draft)
    is_on_gpu = draft_devices[0].type == "cuda"
    if stays(draft, target_devices) or (is_on_gpu and torch.cuda.device_count() == 1):
        return []
    chosen = automatic_devices(present_devices(), target, draft, target_devices)
    if chosen is None or set(chosen) <= set(draft_devices):
        return []
    why = "to draft while the target verifies" if is_on_gpu else "its target is on a GPU"
    return [Move(draft, chosen, why, is_asked=False)]


def stays(draft: PreTrainedModel, target_devices: Sequence[torch.device]) -> bool:
    """Whether "auto" leaves a draft where it is, whatever other devices there are."""
    if target_devices[0].type != "cuda" or placed_devices(draft) is not None or why_fixed(draft) is not None:
        return True
    draft_devices = devices_of(draft)
    return draft_devices[0].type == "cuda" and not set(draft_devices) & set(target_devices)


def automatic_devices(
    devices: tuple[Device, ...], target: PreTrainedModel, draft: PreTrainedModel, target_devices: Devices
) -> Devices | None:
    """The devices that a draft gets beside a target that has its own already; None where it fits nowhere.

    Parameters
    ----------
    devices : tuple of Device
        With the memory that is free, the target's weights being there already; the target's first is one of them.
    """
    names = {each.name for each in devices}
    on = [str(device) for device in target_devices if str(device) in names]  # What is offloaded takes none of them.
    there = Footprint.of(target)._replace(weights=0)
    try:
        found = split(devices, there, Footprint.of(draft), MIN_TOKENS, target_on=on)
    except ValueError:  # it fits nowhere
        return None
    return tuple(torch.device(name) for name in found.draft.devices)


def move(model: PreTrainedModel, devices: Devices) -> None:
    """Move a model that lies on one device to others, and remember where it came from.

    It is moved as a whole to one device; over several its layers are spread, through hooks of accelerate.

    Raises
    ------
    ValueError
        The devices do not hold it; it is where it was then.
    """
    origin = _placed[model].origin if model in _placed else input_device(model)
    _undo_hooks(model)
    try:
        if len(devices) == 1:
            model.to(devices[0])
        else:
            _spread(model, devices)
    except BaseException:
        _undo_hooks(model)
        model.to(origin)
        _placed.pop(model, None)
        raise
    _placed[model] = Placed(origin, devices)


def put_back(model: PreTrainedModel) -> None:
    """Move a model back to where `move` found it, unless its user has moved it since."""
    is_there = placed_devices(model) is not None
    placed = _placed.get(model)
    if placed is not None and is_there:
        _undo_hooks(model)
        model.to(placed.origin)
    _placed.pop(model, None)


def _spread(model: PreTrainedModel, devices: Devices) -> None:
    free = {each.name: each.memory for each in present_devices()}
    places = layers_to_devices(model, devices, [free.get(str(device), _UNLIMITED) for device in devices])
    dispatch_model(model, places, main_device=devices[0], skip_keys=keys_left_in_place(model))


def layers_to_devices(
    model: PreTrainedModel, devices: Devices, room: Sequence[int]
) -> dict[str, int | str | torch.device]:
    """accelerate's device map that spreads a model's layers evenly over devices with `room` bytes each.

    Where accelerate would offload what fits if devices are filled more exactly, that is done.

    Raises
    ------
    ValueError
        They do not hold it.
    """
    not_split = modules_not_to_split(model)
    places: dict[int | str, int] = dict(enumerate(room))  # Numbers are what accelerate balances.
    balanced = get_balanced_memory(model, dict(places), no_split_module_classes=not_split)
    found = infer_auto_device_map(model, balanced, no_split_module_classes=not_split)
    if set(found.values()) <= set(places):
        return {name: place_of(devices[place]) for name, place in found.items()}
    lane = Footprint.of(model)
    portions = divide(lane, [Device(str(device), free) for device, free in zip(devices, room, strict=True)])
    if portions is None:
        raise ValueError(
            f"{', '.join(f'{device} ({gib(free)} free)' for device, free in zip(devices, room, strict=True))} do not "
            f"hold this {type(model).__name__} of {gib(lane.weights)}. Name more devices, or load a quantised model."
        )
    return {**device_map(lane.parts, [portion.num_parts for portion in portions], devices)}


def _shown(devices: Sequence[torch.device]) -> str:
    return ", ".join(map(str, devices))


def _undo_hooks(model: PreTrainedModel) -> None:
    if not is_dispatched(model):
        return
    remove_hook_from_module(model, recurse=True)
    vars(model).pop("hf_device_map", None)
    for module in all_modules(model):
        # accelerate leaves the class's own `forward` as an attribute, which looks like a replaced one.
        left = getattr(vars(module).get("forward"), "__func__", None)
        if left is not None and left is type(module).forward:
            del module.forward
