"""How lanes lie on devices that are known: which parts are where, and how many tokens their caches hold then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..cache.sizing import CPU_SHARE, CUDA_SHARE
from .footprint import Footprint
from .parts import Portion, fill
from .topology import Device

MOST_TOKENS = 2**62  # of a cache of which a device has nothing


class Group(NamedTuple):
    """The devices of a lane, and why it is there; an even one has as much of it on each, whether it fits or not."""

    devices: tuple[Device, ...]
    why: str
    is_even: bool = False


Lane = tuple[Group, Footprint]


def divide(lane: Footprint, devices: Sequence[Device]) -> tuple[Portion, ...] | None:
    """How to divide a lane's weights over devices so that its cache has the most room; None where they do not fit."""
    lanes = [(Group(tuple(devices), ""), lane._replace(working=0, graphs=0))]
    num_tokens = most_tokens(lambda count: lay_out(lanes, count) is not None, 0)
    found = lay_out(lanes, num_tokens)
    return None if found is None else found[0]


def lay_out(lanes: Sequence[Lane], num_tokens: int) -> list[tuple[Portion, ...]] | None:
    """How lanes are divided over their devices so that caches of so many tokens fit; None where they do not.

    Even ones take what they take. Of the others, the one with the fewest devices chooses first.
    """
    taken: dict[str, list[tuple[Footprint, Portion]]] = {}
    found: dict[int, tuple[Portion, ...]] = {}
    order = sorted(range(len(lanes)), key=lambda index: (not lanes[index][0].is_even, len(lanes[index][0].devices)))
    for index in order:
        group, lane = lanes[index]

        def holds(number: int, portion: Portion, group: Group = group, lane: Footprint = lane) -> bool:
            device = group.devices[number]
            return num_tokens_on(device, [*taken.get(device.name, []), (lane, portion)]) >= num_tokens

        size = len(group.devices)
        even = Portion(lane.weights // size, -(-lane.num_layers // size))
        portions = (even,) * size if group.is_even else fill(lane.parts, size, holds)
        if portions is None:
            return None
        found[index] = portions
        for device, portion in zip(group.devices, portions, strict=True):
            taken.setdefault(device.name, []).append((lane, portion))
    return [found[index] for index in range(len(lanes))]


def reaches_all(lanes: Sequence[Lane], num_tokens: int) -> bool:
    """Whether there is such a layout that leaves no device without a part of a lane that is on it."""
    found = lay_out(lanes, num_tokens)
    if found is None:
        return False
    asked = [portions for (group, _), portions in zip(lanes, found, strict=True) if not group.is_even]
    return all(portion.num_parts for portions in asked for portion in portions)


def most_tokens(fits: Callable[[int], bool], least: int) -> int:
    """The largest number that fits, to a thousandth; `least` where nothing above does."""
    low, step = least, 1
    while low + step < MOST_TOKENS and fits(low + step):
        low, step = low + step, 2 * step
    while step > 1 + low // 1000:
        step //= 2
        if fits(low + step):
            low += step
    return low


def num_tokens_on(device: Device, lanes: Sequence[tuple[Footprint, Portion]]) -> int:
    """Tokens that the caches on a device hold, those of all lanes on it; below 0 where it does not even hold these."""
    graphs = device.kind != "cpu"
    left = device.memory - sum(portion.weights + lane.working + lane.graphs * graphs for lane, portion in lanes)
    if left < 0:
        return -1
    budget = CUDA_SHARE * left if device.kind != "cpu" else min(CPU_SHARE * device.memory, left)
    per_token = sum(cache_per_token_of(lane, portion) for lane, portion in lanes)
    return min(MOST_TOKENS, int(budget / per_token)) if per_token else MOST_TOKENS


def cache_per_token_of(lane: Footprint, portion: Portion) -> float:
    """Bytes of a token's keys and values in these layers."""
    return lane.cache_per_token * portion.num_layers / lane.num_layers
