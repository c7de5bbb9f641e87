"""Which devices each lane of a pair gets: from memory, sizes and speeds alone. Nothing is moved or asked for here.

Two lanes on devices of their own run at the same time, which is what PEARL lives on. So every lane gets the fewest
devices that hold it: layers on several devices run one after the other, and more of them make no lane faster. What does
is tensor parallelism, where every device computes a part of each layer; there, the devices are split so that the pair
yields the most tokens per second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..cache.sizing import CPU_SHARE
from .footprint import Footprint
from .layout import Group, Lane, cache_per_token_of, lay_out, most_tokens, num_tokens_on, reaches_all
from .parts import Portion
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
    num_parts : tuple of int
        How many of the model's parts (`Footprint.parts`) each device gets; zeros where nobody knows.
    """

    shares: tuple[Share, ...]
    why: str
    seconds: float
    num_parts: tuple[int, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(share.device for share in self.shares)


class Split(NamedTuple):
    """Both lanes, and how many tokens their caches hold: the same for both."""

    target: LanePlan
    draft: LanePlan
    num_tokens: int


HERE = "where it lies"
FEWEST = "the fewest devices that hold it: layers on several run one after the other, more make it no faster"
ALONE = "the fastest device that holds it"
OWN = "not the target's, so that it drafts while the target verifies"
SHARED = "no other device has room: both run there at once, on two streams"
SHARING = "where its target is, whose weights it shares"
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
    shares_weights: bool = False,
) -> Split:
    """Find devices for both lanes.

    Parameters
    ----------
    draft : Footprint
        What the models share is not in it.
    min_tokens : int
        For which the caches must have room.
    target_on, draft_on : sequence of str or None
        Where the lane is to be, whether it fits there or not; None: to be found.
    shares_weights : bool
        Whether the models do, so that the draft has to be where its target is.

    Raises
    ------
    ValueError
        The devices do not hold the pair.
    """
    named = {device.name: device for device in devices}
    on = [
        None if names is None else Group(tuple(named[name] for name in names), HERE, True)
        for names in (target_on, draft_on)
    ]
    wanted = _Wanted(devices, target, draft, min_tokens, *on)
    found = None if shares_weights else next(_apart(wanted), None)
    found = found or next((_sharing if shares_weights else _together)(wanted), None)
    if found is not None:
        return _filled([(found[0], target), (found[1], draft)], min_tokens)
    of_a_cpu = f", of which caches take at most {CPU_SHARE:.0%}" if any(each.kind == "cpu" for each in devices) else ""
    raise ValueError(
        f"the devices do not hold the pair: weights of {gib(target.weights)} (target) and {gib(draft.weights)} "
        f"(draft), {gib(target.working + draft.working)} to work in, and caches of {min_tokens} tokens "
        f"({gib(min_tokens * (target.cache_per_token + draft.cache_per_token))}), on "
        f"{', '.join(f'{each.name} with {gib(each.memory)}' for each in devices)}{of_a_cpu}. Take smaller or "
        "quantised models, fewer tokens, or more devices."
    )


class _Wanted(NamedTuple):
    """What `split` is asked for."""

    devices: Sequence[Device]
    target: Footprint
    draft: Footprint
    min_tokens: int
    target_on: Group | None
    draft_on: Group | None


_Pairs = Iterator[tuple[Group, Group]]


def _apart(wanted: _Wanted) -> _Pairs:
    """Groups of devices that have none in common, or both lanes where they are."""
    devices, target, draft, min_tokens, target_on, draft_on = wanted
    if target_on is not None and draft_on is not None:
        yield target_on, draft_on
        return
    free = [device for device in devices if draft_on is None or device not in draft_on.devices]
    for target_group in [target_on] if target_on is not None else _groups(free, target, min_tokens):
        others = [device for device in devices if device not in target_group.devices]
        for draft_group in [draft_on] if draft_on is not None else _groups(others, draft, min_tokens):
            yield target_group, draft_group._replace(why=OWN if draft_on is None else HERE)


def _together(wanted: _Wanted) -> _Pairs:
    """Groups of devices of which the draft has one of the target's."""
    devices, target, draft, min_tokens, target_on, draft_on = wanted
    for target_group in [target_on] if target_on is not None else _groups(devices, target, min_tokens):
        if len(devices) == 1:
            target_group = target_group._replace(why=ONLY)
        for device in target_group.devices:
            why = SHARED if len(devices) > 1 else CORES if device.kind == "cpu" else STREAMS
            draft_group = draft_on if draft_on is not None else Group((device,), why)
            if lay_out([(target_group, target), (draft_group, draft)], min_tokens) is not None:
                yield target_group, draft_group


def _sharing(wanted: _Wanted) -> _Pairs:
    """Groups of the same devices, or both lanes where they are."""
    devices, target, draft, min_tokens, target_on, draft_on = wanted
    for target_group in [target_on] if target_on is not None else _groups(devices, target, min_tokens, draft):
        yield target_group, draft_on or Group(target_group.devices, SHARING, True)


def _groups(
    devices: Sequence[Device], lane: Footprint, min_tokens: int, beside: Footprint | None = None
) -> Iterator[Group]:
    """Groups of devices that hold a lane, and `beside` with it, the smallest first; of one size, the fastest."""
    accelerators = [device for device in devices if device.kind != "cpu"] or devices
    fastest = sorted(accelerators, key=lambda device: -(device.bandwidth or 0.0))  # stable: of equals the first
    for size in range(1, min(len(fastest), len(lane.parts)) + 1):
        why = FEWEST if size > 1 else ALONE
        for smallest in sorted({device.memory for device in fastest}):
            large = [device for device in fastest if device.memory >= smallest][:size]
            if len(large) < size or sum(device.memory for device in large) < lane.weights:
                continue
            group = Group(tuple(large), why)
            lanes = [(group, lane)] + ([] if beside is None else [(group._replace(is_even=True), beside)])
            if reaches_all(lanes, min_tokens):
                yield group
                break


def _filled(lanes: Sequence[Lane], min_tokens: int) -> Split:
    """A split with what every lane takes of every device; the caches take what the engine would give them."""
    least = min_tokens if lay_out(lanes, min_tokens) is not None else 0
    if any(len(group.devices) > 1 and not group.is_even for group, _ in lanes):
        least = most_tokens(lambda count: reaches_all(lanes, count), least)
    layout = lay_out(lanes, least)
    assert layout is not None, "both are where they are, or there is one for `min_tokens`"
    on: dict[Device, list[tuple[Footprint, Portion]]] = {}
    for (group, lane), portions in zip(lanes, layout, strict=True):
        for device, portion in zip(group.devices, portions, strict=True):
            on.setdefault(device, []).append((lane, portion))
    num_tokens = max(0, min(num_tokens_on(device, held) for device, held in on.items()))
    plans = []
    for (group, lane), portions in zip(lanes, layout, strict=True):
        shares = tuple(
            Share(
                device.name,
                portion.weights,
                int(num_tokens * cache_per_token_of(lane, portion)),
                lane.working,
                lane.graphs if device.kind != "cpu" else 0,
            )
            for device, portion in zip(group.devices, portions, strict=True)
        )
        bandwidth = min(each.bandwidth or ASSUMED_BANDWIDTH for each in group.devices)
        num_parts = tuple(portion.num_parts for portion in portions)
        plans.append(LanePlan(shares, group.why, forward_seconds(lane, 1, bandwidth), num_parts))
    return Split(plans[0], plans[1], num_tokens)


def forward_seconds(lane: Footprint, num_ranks: int, bandwidth: float) -> float:
    """What a forward of one token takes where memory is what limits it, over `num_ranks` tensor-parallel devices."""
    between = 2 * ALL_REDUCE_SECONDS if num_ranks > 1 else 0.0
    return lane.read / (num_ranks * bandwidth) + lane.num_layers * (LAYER_SECONDS + between)


def gib(num_bytes: float) -> str:
    """Bytes in words: "1.5 GiB", "12 MiB", "256 bytes"."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.1f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB" if num_bytes >= 2**10 else f"{num_bytes:.0f} bytes"
