"""What may be said about devices: `"auto"`, a device, a list of devices, or a `DeviceMesh`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DeviceArgument: TypeAlias = "str | torch.device | Sequence[str | torch.device] | DeviceMesh"
_HOW = 'Give "auto", a device such as "cuda:1", a list of devices of one kind, or a one-dimensional DeviceMesh.'


def named_devices(name: str, value: Any) -> tuple[torch.device, ...] | None:
    """The devices that the argument `name` asks for; None for "auto". Whether they are there is not looked at.

    Raises
    ------
    TypeError, ValueError
        It is none of these, names no device, one device twice, or devices of several kinds.
    """
    if isinstance(value, str) and value == "auto":
        return None
    if _is_mesh(value):
        return _devices_of_mesh(name, value)
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    devices = tuple(one_device(name, each) for each in (value if several else (value,)))
    if not devices:
        raise ValueError(f"`{name}` must name at least one device, got {value!r}. {_HOW}")
    twice = sorted({str(device) for device in devices if devices.count(device) > 1})
    if twice:
        raise ValueError(f"`{name}` names {', '.join(twice)} more than once, got {value!r}. Name every device once.")
    if len({device.type for device in devices}) > 1:
        raise ValueError(
            f"`{name}` must name devices of one kind, got {value!r}. A model that is to lie partly in main memory is "
            'loaded so (`from_pretrained(..., device_map="auto")`), and then left where it is.'
        )
    return devices


def check_apart(target: tuple[torch.device, ...] | None, draft: tuple[torch.device, ...] | None) -> None:
    """Raise `ValueError` for two lists of devices that overlap, unless all of the draft's are its target's."""
    common = sorted({str(device) for device in target or () if device in (draft or ())})
    if common and not set(draft or ()) <= set(target or ()):
        raise ValueError(
            f"`target_devices` {_shown(target)} and `draft_devices` {_shown(draft)} share {', '.join(common)}, and the "
            "draft has others, too. Give it those alone, so that both models run at the same time."
        )


def present(name: str, devices: tuple[torch.device, ...]) -> tuple[torch.device, ...]:
    """The same devices, "cuda" with the number of the current one.

    Raises
    ------
    ValueError
        One of them is not there.
    """
    return tuple(_present(name, device) for device in devices)


def device_count(kind: str) -> int:
    """How many devices of a kind ("cuda") there are here."""
    try:
        module = torch.get_device_module(kind)
        return int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError):  # torch was built without it
        return 0


def _present(name: str, device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    count = device_count(device.type)
    if (device.index or 0) >= count:
        there = (
            ", ".join(f"{device.type}:{index}" for index in range(count)) or f"no device of the kind {device.type!r}"
        )
        raise ValueError(f"`{name}` asks for {device}, and this machine has {there}. Name a device that is there.")
    if ":" in str(device):
        return device
    return torch.device(device.type, torch.get_device_module(device.type).current_device())


def one_device(name: str, value: Any, how: str = _HOW) -> torch.device:
    """The device that the argument `name` asks for; raises `TypeError` or `ValueError`, ending with `how`, for none."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"`{name}` must name devices, got {value!r}. {how}")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"`{name}` names no device that torch knows, got {value!r}. {how}") from error
    if device.type == "meta":
        raise ValueError(f"`{name}` must name devices that compute, got {value!r}. {how}")
    return torch.device("cpu") if device.type == "cpu" else device


def _is_mesh(value: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.device_mesh import DeviceMesh

    return isinstance(value, DeviceMesh)


def _devices_of_mesh(name: str, mesh: DeviceMesh) -> tuple[torch.device, ...]:
    """A mesh's ranks count a host's devices through, as torchrun hands them out."""
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        cure = f'one of its axes, such as mesh["{names[-1]}"]' if names else "one of its axes"
        raise ValueError(
            f"`{name}` must be a mesh of one dimension, got one of {mesh.ndim} with the shape {tuple(mesh.shape)}. "
            f"Pass {cure}."
        )
    if mesh.device_type == "cpu":
        return (torch.device("cpu"),)
    ranks, count = mesh.mesh.tolist(), max(1, device_count(mesh.device_type))
    if len({rank // count for rank in ranks}) > 1:
        raise ValueError(
            f"`{name}` names ranks {ranks} of several hosts with {count} device(s) each. A model on several hosts "
            "needs tensor parallelism: see `hf_pearl.launch`."
        )
    return tuple(torch.device(mesh.device_type, rank % count) for rank in ranks)


def _shown(devices: tuple[torch.device, ...] | None) -> str:
    return str([str(device) for device in devices or ()])
