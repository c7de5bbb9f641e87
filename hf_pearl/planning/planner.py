"""Which devices each lane of a pair gets: from memory, sizes and speeds alone. Nothing is moved or asked for here.

Two lanes on devices of their own run at the same time, which is what PEARL lives on. So every lane gets the fewest
devices that hold it: layers on several devices run one after the other, and more of them make no lane faster. What does
is tensor parallelism, where every device computes a part of each layer; there, the devices are split so that the pair
yields the most tokens per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..cache.sizing import CPU_SHARE, CUDA_SHARE
from .footprint import Footprint
from .topology import Device

ASSUMED_BANDWIDTH = 2e12  # bytes per second, where a device's own is not known
ASSUMED_ACCEPTANCE = 0.8  # chance that a draft token stands
LAYER_SECONDS = 20e-6  # of a layer's dozen kernels beside what it reads
ALL_REDUCE_SECONDS = 10e-6  # two a layer between the devices of a tensor-parallel lane


def expected_tokens(num_guesses: float, acceptance: float) -> float:
    """Tokens of a forward over guesses of which each stands with this chance if the one before does.

    Leviathan et al. 2023 (arXiv 2211.17192), equation 1; `num_guesses` need not be whole here.
    """
    return (1.0 - acceptance ** (num_guesses + 1.0)) / (1.0 - acceptance)


class Share(NamedTuple):
    """What one lane takes of one device, in bytes."""

    device: str
    weights: int
    cache: int
    working: int
    graphs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working + self.graphs


class LanePlan(NamedTuple):
    """Where a lane goes.

    Attributes
    ----------
    shares : tuple of Share
        One for every device, in the order of its layers.
    why : str
        In words.
    seconds : float
        What a forward of one token takes, by an estimate.
    """

    shares: tuple[Share, ...]
    why: str
    seconds: float

    @property
    def devices(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(share.device for share in self.shares)


class Split(NamedTuple):
    """Both lanes, and how many tokens their caches hold: the same for both."""

    target: LanePlan
    draft: LanePlan
    num_tokens: int


class _Group(NamedTuple):
    devices: tuple[Device, ...]
    why: str


HERE = "where it lies"
FEWEST = "the fewest devices that hold it: layers on several run one after the other, more make it no faster"
ALONE = "the fastest device that holds it"
OWN = "not the target's, so that it drafts while the target verifies"
SHARED = "no other device has room: both run there at once, on two streams"
ONLY = "the only device"
STREAMS = "the only device: both run there at once, on two streams"
CORES = "the only device: a process on a core of its own, while the target takes the others"


def split(
    devices: Sequence[Device],
    target: Footprint,
    draft: Footprint,
    min_tokens: int,
    target_on: Sequence[str] | None = None,
    draft_on: Sequence[str] | None = None,
) -> Split:
    """Find devices for both lanes.

    Parameters
    ----------
    min_tokens : int
        For which the caches must have room.
    target_on, draft_on : sequence of str or None
        Where the lane is to be, whether it fits there or not; None: to be found.

    Raises
    ------
    ValueError
        The devices do not hold the pair.
    """
    named = {device.name: device for device in devices}
    fixed_target = None if target_on is None else _Group(tuple(named[name] for name in target_on), HERE)
    fixed_draft = None if draft_on is None else _Group(tuple(named[name] for name in draft_on), HERE)
    for target_group in [fixed_target] if fixed_target else _groups(devices, target, min_tokens):
        others = [device for device in devices if device not in target_group.devices]
        draft_group = fixed_draft or next(iter(_groups(others, draft, min_tokens)), None)
        if draft_group is not None:
            if fixed_draft is None:
                draft_group = draft_group._replace(why=OWN)
            return _filled(target_group, draft_group, target, draft)
    for target_group in [fixed_target] if fixed_target else _groups(devices, target, min_tokens):
        for device in target_group.devices:
            if _room(device, [(target, len(target_group.devices)), (draft, 1)], min_tokens) >= 0:
                if len(devices) == 1:
                    target_group = target_group._replace(why=ONLY)
                why = SHARED if len(devices) > 1 else CORES if device.kind == "cpu" else STREAMS
                return _filled(target_group, _Group((device,), why), target, draft)
    raise ValueError(
        f"the devices do not hold the pair: weights of {gib(target.weights)} (target) and {gib(draft.weights)} "
        f"(draft), {gib(target.working + draft.working)} to work in, and caches of {min_tokens} tokens "
        f"({gib(min_tokens * (target.cache_per_token + draft.cache_per_token))}), on "
        f"{', '.join(f'{each.name} with {gib(each.memory)}' for each in devices)}. Take smaller or quantised models, "
        "fewer tokens, or more devices."
    )


def _groups(devices: Sequence[Device], lane: Footprint, min_tokens: int) -> list[_Group]:
    """Groups of devices that hold a lane, the smallest first; of one size, the fastest."""
    accelerators = [device for device in devices if device.kind != "cpu"] or devices
    fastest = sorted(accelerators, key=lambda device: -(device.bandwidth or 0.0))  # stable: of equals the first
    found = []
    for size in range(1, min(len(fastest), lane.num_layers) + 1):
        holding = [device for device in fastest if _room(device, [(lane, size)], min_tokens) >= 0]
        if len(holding) >= size:
            found.append(_Group(tuple(holding[:size]), FEWEST if size > 1 else ALONE))
    return found


def _room(device: Device, lanes: Sequence[tuple[Footprint, int]], min_tokens: int) -> float:
    """Bytes that a device has left beside parts of lanes, each `(lane, number of its devices)`; negative: too few."""
    room = float(device.memory)
    for lane, size in lanes:
        layer = lane.weights / lane.num_layers if size > 1 else 0.0  # layers are not divided
        room -= lane.weights / size + layer + lane.working + _graphs(device, lane)
        room -= min_tokens * _cache_per_token(lane, size) / _share(device)
    return room


def _share(device: Device) -> float:
    return CUDA_SHARE if device.kind != "cpu" else 1.0


def _graphs(device: Device, lane: Footprint) -> int:
    return lane.graphs if device.kind != "cpu" else 0


def _cache_per_token(lane: Footprint, size: int) -> float:
    return lane.cache_per_token * -(-lane.num_layers // size) / lane.num_layers


def _filled(target_group: _Group, draft_group: _Group, target: Footprint, draft: Footprint) -> Split:
    """A split with what every lane takes of every device; the caches take what the engine would give them."""
    lanes = [(target_group, target), (draft_group, draft)]
    devices = dict.fromkeys((*target_group.devices, *draft_group.devices))
    num_tokens = min(_num_tokens(device, lanes) for device in devices)
    plans = []
    for group, lane in lanes:
        size = len(group.devices)
        cache = int(num_tokens * _cache_per_token(lane, size))
        shares = [
            Share(each.name, lane.weights // size, cache, lane.working, _graphs(each, lane)) for each in group.devices
        ]
        bandwidth = min(each.bandwidth or ASSUMED_BANDWIDTH for each in group.devices)
        plans.append(LanePlan(tuple(shares), group.why, forward_seconds(lane, 1, bandwidth)))
    return Split(plans[0], plans[1], num_tokens)


def _num_tokens(device: Device, lanes: Sequence[tuple[_Group, Footprint]]) -> int:
    """Tokens that the caches on a device hold, those of all lanes on it."""
    here = [(lane, len(group.devices)) for group, lane in lanes if device in group.devices]
    left = _room(device, here, 0)
    budget = CUDA_SHARE * left if device.kind != "cpu" else min(CPU_SHARE * device.memory, left)
    return max(0, int(budget / sum(_cache_per_token(lane, size) for lane, size in here)))


def forward_seconds(lane: Footprint, num_ranks: int, bandwidth: float) -> float:
    """What a forward of one token takes where memory is what limits it, over `num_ranks` tensor-parallel devices."""
    between = 2 * ALL_REDUCE_SECONDS if num_ranks > 1 else 0.0
    return lane.read / (num_ranks * bandwidth) + lane.num_layers * (LAYER_SECONDS + between)


def gib(num_bytes: float) -> str:
    """Bytes in words: "1.5 GiB", "12 MiB"."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
