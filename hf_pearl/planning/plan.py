"""`plan`: what would go where, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..arguments import check_arguments
from ..cache.support import check_supported
from ..config import PearlConfig
from ..errors import PearlUnsupportedModelError
from ..models import shared_bytes, unwrap
from ..parallel.placement import MIN_TOKENS
from ..parallel.ranks.models import check_whole
from ..parallel.tensor_parallel.plan import make_plan
from ..tuning import Tuning
from ..vocabularies import check_vocabularies
from .footprint import Footprint
from .here import Loaded, split_here
from .parts import device_map
from .planner import ASSUMED_ACCEPTANCE, LanePlan, Split, expected_tokens, split
from .tensor_parallel_split import WORTH_IT, TensorParallelSplit, tensor_parallel_split
from .topology import Device, described_devices
from .unloaded import check_dtype, unloaded

MAX_TOKENS = 2**40


@dataclass(frozen=True)
class PlannedModel:
    """A model of a plan.

    Attributes
    ----------
    name : str
        As it was given, or its class.
    source : str or None
        Folder or name that it is loaded from; None: it is loaded already.
    dtype : torch.dtype
        Of its weights.
    footprint : Footprint
        How much memory it takes.
    lane : LanePlan
        Where it goes.
    """

    name: str
    source: str | None
    dtype: torch.dtype
    footprint: Footprint
    lane: LanePlan

    def load(self) -> PreTrainedModel:
        """Load it straight onto its devices."""
        if self.source is None:
            raise ValueError(f"{self.name} is loaded already: the plan was made for the model itself, not for a name.")
        options: dict[str, Any] = {"device_map": self.device_map}
        return AutoModelForCausalLM.from_pretrained(self.source, dtype=self.dtype, **options).eval()

    @property
    def device_map(self) -> dict[str, int | str]:
        """What `from_pretrained` gets: "" for the whole model, or the device of every part of it."""
        devices = [torch.device(name) for name in self.lane.devices]
        if len(devices) == 1:
            return {"": self.lane.devices[0]}
        return device_map(self.footprint.parts, self.lane.num_parts, devices)


@dataclass(frozen=True)
class Plan:
    """Where the models of a pair go; as a string, in words.

    Attributes
    ----------
    devices : tuple of Device
        What there is, or was said to be.
    target, draft : PlannedModel
        Where each goes, what it takes there, and why.
    num_tokens : int
        For which the caches of both have room.
    tensor_parallel : TensorParallelSplit or None
        How `hf_pearl.launch` would divide the devices; None where that brings nothing.
    is_here : bool
        Whether `devices` are those of this machine.
    dtype : torch.dtype or None
        That was asked for, for models given by name; None: each in its own.
    min_tokens : int
        For which room was asked for in the caches.
    """

    devices: tuple[Device, ...]
    target: PlannedModel
    draft: PlannedModel
    num_tokens: int
    tensor_parallel: TensorParallelSplit | None
    is_here: bool
    dtype: torch.dtype | None
    min_tokens: int

    @property
    def config(self) -> PearlConfig:
        """The settings that ask for this placement, or leave a model that is partly offloaded where it is."""
        asked: dict[str, Any] = {}
        for part, model in (("target", self.target), ("draft", self.draft)):
            devices = model.lane.devices
            is_one_kind = len({name.partition(":")[0] for name in devices}) == 1
            asked[f"{part}_devices"] = list(devices) if is_one_kind else "auto"
        return PearlConfig(**asked)

    def load(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Load target and draft straight onto their devices, in evaluation mode.

        Raises
        ------
        ValueError
            The plan is for another machine, or for models that are loaded already.
        """
        if not self.is_here:
            raise ValueError("the plan is for devices that were assumed, not for this machine's. Leave out `devices`.")
        return self.target.load(), self.draft.load()

    def __str__(self) -> str:
        from .report import report  # It reads what is defined here.

        return report(self)


def plan(
    target: PreTrainedModel | str | Path,
    draft: PreTrainedModel | str | Path,
    devices: str | Sequence[Device] | None = None,
    dtype: torch.dtype | None = None,
    num_tokens: int = MIN_TOKENS,
    measured: Tuning | None = None,
) -> Plan:
    """Say what would go where, how much memory it takes, and why. No weight is loaded, and nothing is moved.

    print(hf_pearl.plan("Qwen/Qwen3-32B", "Qwen/Qwen3-0.6B", devices="8x80GiB"))

    Parameters
    ----------
    target, draft : PreTrainedModel, str or Path
        Models, folders, or names on the Hub, of which only the configuration and the sizes of the files are fetched.
    devices : str, sequence of Device or None
        A machine to plan for, such as "8x80GiB", "2x24GiB@1TB/s" or "cpu 64GiB", 128 devices at most; None: this one.
        Models that are loaded are then where `PearlConfig()` leaves or moves them.
    dtype : torch.dtype or None
        That models given by name are loaded in; None: each in its own.
    num_tokens : int
        For which the caches must have room: of all sequences of a call together, and prefixes that are to be kept.
    measured : Tuning or None
        What `hf_pearl.tune` found for the pair on such a device; else times and acceptance are estimated.

    Returns
    -------
    Plan
        Devices and bytes of each model, and why; `print(plan)` says it in words.

    Raises
    ------
    ValueError, TypeError
        An argument that makes no sense, a model that cannot be reached, or devices that do not hold the pair.
    NotImplementedError
        A model that PEARL cannot run, or one of `launch` that is not whole in this process.
    """
    _check_options(dtype, num_tokens, measured)
    models = [_model(name, given, dtype) for name, given in (("target", target), ("draft", draft))]
    _check_pair(models[0][0], models[1][0])
    prints = [Footprint.of(model, weights) for model, weights in models]
    machine, found = _split(devices, (target, draft), models, prints, num_tokens)
    planned = [
        PlannedModel(
            str(given) if isinstance(given, (str, Path)) else type(model).__name__,
            str(given) if isinstance(given, (str, Path)) else None,
            model.dtype,
            footprint,
            lane,
        )
        for given, (model, _), footprint, lane in zip(
            (target, draft), models, prints, (found.target, found.draft), strict=True
        )
    ]
    parallel = _tensor_parallel(machine, prints, num_tokens, measured, found)
    if parallel is not None and not _can_be_cut(models[0][0], models[1][0], parallel):
        parallel = None
    return Plan(machine, planned[0], planned[1], found.num_tokens, parallel, devices is None, dtype, num_tokens)


def _check_options(dtype: Any, num_tokens: Any, measured: Any) -> None:
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int):
        raise TypeError(f"`num_tokens` must be an int, got {num_tokens!r}.")
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"`num_tokens` must be between 1 and {MAX_TOKENS}, got {num_tokens}.")
    if dtype is not None:
        check_dtype(dtype)
    if measured is not None and not isinstance(measured, Tuning):
        raise TypeError(f"`measured` must be what `tune` returned, or None, got {measured!r}.")


def _model(argument: str, given: Any, dtype: torch.dtype | None) -> tuple[PreTrainedModel, int | None]:
    """A model, or the structure of one that is not loaded, and what its files say of its size."""
    if isinstance(given, (str, Path)):
        return unloaded(argument, given, dtype)
    model = unwrap(given)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`{argument}` must be a model of transformers, a folder or a name, got {given!r}.")
    check_whole(argument, model, "Pass the folder or the name that it was loaded from.")
    return model, None


def _check_pair(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    check_vocabularies(target, draft)
    check_arguments(target, target.generation_config, {"assistant_model": draft})
    for model in (target, draft):
        check_supported(model)


def _split(
    devices: str | Sequence[Device] | None,
    given: Sequence[Any],
    models: Sequence[tuple[PreTrainedModel, int | None]],
    prints: Sequence[Footprint],
    num_tokens: int,
) -> tuple[tuple[Device, ...], Split]:
    """The machine, and what of it either model gets; what they share is counted with the target."""
    common = shared_bytes(models[0][0], models[1][0])
    alone = prints[0], prints[1].without(common) if common else prints[1]
    if devices is None:
        loaded = Loaded(*(None if isinstance(each, (str, Path)) else unwrap(each) for each in given))
        return split_here(loaded, alone, num_tokens, bool(common))
    machine = described_devices(devices)
    return machine, split(machine, *alone, num_tokens, shares_weights=bool(common))


def _tensor_parallel(
    machine: Sequence[Device],
    prints: Sequence[Footprint],
    num_tokens: int,
    measured: Tuning | None,
    layers: Split,
) -> TensorParallelSplit | None:
    """The split for `hf_pearl.launch`; None where that by layers is as good, or there are no two devices."""
    accelerators = [device for device in machine if device.kind != "cpu"]
    if len(accelerators) < 2:
        return None
    acceptance, seconds = ASSUMED_ACCEPTANCE, None
    if measured is not None:
        acceptance = min(measured.acceptance_rate, 0.99)
        seconds = measured.target_forward_seconds, measured.draft_step_seconds
    found = tensor_parallel_split(accelerators, prints[0], prints[1], num_tokens, acceptance, seconds)
    if found is None or found.target_tp + found.draft_tp == 2:
        return None
    if not set(layers.target.devices) & set(layers.draft.devices):  # Both compute at the same time there, too.
        forward, step = seconds or (layers.target.seconds, layers.draft.seconds)
        if found.tokens_per_second < WORTH_IT * expected_tokens(forward / step, acceptance) / forward:
            return None
    return found


def _can_be_cut(target: PreTrainedModel, draft: PreTrainedModel, found: TensorParallelSplit) -> bool:
    """Whether `hf_pearl.launch` would take both models on so many ranks."""
    try:
        for model, size in ((target, found.target_tp), (draft, found.draft_tp)):
            if size > 1:
                make_plan(model, 0, size)
    except PearlUnsupportedModelError:
        return False
    return True
