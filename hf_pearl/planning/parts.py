"""The parts of a model of which each lies on one device as a whole, and how they are divided over several devices.

Device for device in the order of the parts, as accelerate does it: then hidden states change devices the fewest times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..compat import modules_not_to_split
from ..models import all_modules, is_packed, packed_bytes


class Part(NamedTuple):
    """What is not divided: a layer, the embeddings, the head.

    Attributes
    ----------
    names : tuple of str
        Of its modules; more than one where these share weights.
    weights : int
        Bytes, what modules share once.
    num_layers : int
        Layers that keep keys and values.
    """

    names: tuple[str, ...]
    weights: int
    num_layers: int


class Portion(NamedTuple):
    """What one device gets of a model.

    Attributes
    ----------
    weights : int
        Bytes.
    num_layers : int
        Layers that keep keys and values.
    num_parts : int
        How many of the model's parts these are, counted from where the device before ends.
    """

    weights: int = 0
    num_layers: int = 0
    num_parts: int = 0

    def and_a(self, part: Part) -> Portion:
        """This and one part more."""
        return Portion(self.weights + part.weights, self.num_layers + part.num_layers, self.num_parts + 1)


def parts_of(model: PreTrainedModel) -> tuple[Part, ...]:
    """The parts of a model, which may lie on the meta device, in the order in which it has them."""
    parts: list[Part] = []
    owners: dict[int, int] = {}  # id of a parameter -> the part that it is counted with
    for name, module in _undivided(model, "", set(modules_not_to_split(model))):
        inside = {id(each): each.nbytes for each in module.parameters()}
        owner = min((owners[each] for each in inside if each in owners), default=len(parts))
        if owner == len(parts):
            parts.append(Part((), 0, 0))
        names, weights, num_layers = parts[owner]
        weights += packed_bytes(module) + sum(size for each, size in inside.items() if each not in owners)
        indices = {index for each in all_modules(module) if isinstance(index := vars(each).get("layer_idx"), int)}
        parts[owner] = Part((*names, name), weights, num_layers + len(indices))
        owners |= {each: owner for each in inside if each not in owners}
    return tuple(parts)


def _undivided(module: torch.nn.Module, name: str, whole: set[str]) -> Iterator[tuple[str, torch.nn.Module]]:
    """The largest modules that are not divided, by name: those that say so, items of lists, and what has weights."""
    children = [(key, child) for key, child in module._modules.items() if child is not None]
    if type(module).__name__ in whole or module._parameters or is_packed(module) or not children:
        yield name, module
        return
    for key, child in children:
        inner = f"{name}.{key}" if name else key
        if isinstance(module, torch.nn.ModuleList):
            yield inner, child
        else:
            yield from _undivided(child, inner, whole)


def fill(parts: Sequence[Part], num_devices: int, holds: Callable[[int, Portion], bool]) -> tuple[Portion, ...] | None:
    """Give every device as many parts as it holds, one after the other; None where some are left over at the end.

    Parameters
    ----------
    holds : callable
        Whether the device of this number holds such a portion.
    """
    portions: list[Portion] = []
    rest = list(reversed(parts))
    for number in range(num_devices):
        portion = Portion()
        while rest and holds(number, portion.and_a(rest[-1])):
            portion = portion.and_a(rest.pop())
        portions.append(portion)
    return None if rest else tuple(portions)


def place_of(device: torch.device) -> int | str:
    """What accelerate calls a device."""
    return device.index if device.type == "cuda" else str(device)


def device_map(
    parts: Sequence[Part], num_parts: Sequence[int], devices: Sequence[torch.device]
) -> dict[str, int | str]:
    """accelerate's map from modules to devices, of which each has so many parts."""
    places = [place_of(device) for number, device in zip(num_parts, devices, strict=True) for _ in range(number)]
    return {name: place for part, place in zip(parts, places, strict=True) for name in part.names}
