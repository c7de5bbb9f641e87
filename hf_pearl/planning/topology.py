"""Which devices there are, how much memory they have, and how fast they read it."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..cache.sizing import free_cuda_memory, main_memory
from ..device_arguments import one_device
from ..device_guard import synchronize

MAX_DEVICES = 128  # torch counts no further; every split of them is looked at.
MAX_BYTES = 2**60  # of a device's memory, or that it reads per second

_COPY_BYTES = {"cuda": 2**28, "cpu": 2**26}  # more than caches hold
_COPIES = 5
_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
_GROUP = re.compile(rf"(?:(\d{{1,4}})\s*x)?\s*{_NUMBER}\s*([kmgt]i?b)(?:\s*@\s*{_NUMBER}\s*([mgt])b/s)?")
_UNITS = {"k": 1, "m": 2, "g": 3, "t": 4}


class Device(NamedTuple):
    """A device that models can be put on.

    Attributes
    ----------
    name : str
        As torch calls it: "cuda:0", "cpu".
    memory : int
        Bytes that models and their caches may take.
    bandwidth : float or None
        Bytes of memory that it reads per second; None where that is not known.
    """

    name: str
    memory: int
    bandwidth: float | None = None

    @property
    def kind(self) -> str:
        """Its kind: "cuda", "cpu"."""
        return self.name.partition(":")[0]


def present_devices(measured: bool = False) -> tuple[Device, ...]:
    """The CUDA devices of this machine with the memory that is free, else its CPU with all that it may use.

    With `measured`, how fast they read memory is tried out, once in a process.
    """
    if not torch.cuda.is_available():
        return (Device("cpu", main_memory(), bandwidth_of(torch.device("cpu")) if measured else None),)
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return tuple(
        Device(str(each), free_cuda_memory(each), bandwidth_of(each) if measured else None) for each in devices
    )


def other_device(name: str, held: int) -> Device:
    """A device that is not among `present_devices`: the CPU beside GPUs, or an accelerator of another kind.

    Parameters
    ----------
    held : int
        Bytes there that count as free.
    """
    kind, _, index = name.partition(":")
    ask = None if kind == "cpu" else getattr(torch.get_device_module(kind), "mem_get_info", None)
    return Device(name, main_memory() if ask is None else ask(int(index or 0))[0] + held)


@functools.cache
def bandwidth_of(device: torch.device) -> float | None:
    """Bytes that a device reads and writes per second, by copies of a large array; None where there is no room."""
    try:
        return copy_bandwidth(device, _COPY_BYTES[device.type], _COPIES)
    except RuntimeError:  # torch.OutOfMemoryError is one, too
        return None


def copy_bandwidth(device: torch.device, num_bytes: int, num_copies: int) -> float:
    """Bytes that a device reads and writes per second while it copies a tensor, both counted; the mean of all copies.

    Raises
    ------
    RuntimeError
        There is no room for the tensor and its copy.
    """
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    copy = source.clone()  # It warms up, too.
    synchronize(device)
    started = time.perf_counter()
    for _ in range(num_copies):
        copy.copy_(source)
    synchronize(device)
    return 2 * num_copies * num_bytes / (time.perf_counter() - started)


def described_devices(devices: Any) -> tuple[Device, ...]:
    """A machine that is described in words (`parse_topology`) or by a sequence of `Device`, every field looked at.

    Raises
    ------
    TypeError, ValueError
        It is neither, has too many devices, one name twice, or a field that makes no sense.
    """
    found = devices if isinstance(devices, Sequence) else ()
    if isinstance(devices, str):
        found = parse_topology(devices)
    if not found or not all(isinstance(each, Device) for each in found):
        raise TypeError(
            f'`devices` must be a description such as "8x80GiB", or a sequence of `Device`, got {devices!r}.'
        )
    _check_count(len(found))
    for index, device in enumerate(found):
        _check_device(f"devices[{index}]", device)
    names = [device.name for device in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`devices` names {', '.join(twice)} more than once. Give every device a name of its own.")
    return tuple(found)


def _check_count(count: int) -> None:
    if count > MAX_DEVICES:
        raise ValueError(
            f"`devices` must be {MAX_DEVICES} at most, got {count}. Plan for those that one pair is to run on."
        )


def _check_device(where: str, device: Device) -> None:
    how = f'Give it as torch writes it: "cpu", or a number from 0 to {MAX_DEVICES - 1} as in "cuda:0".'
    found = one_device(f"{where}.name", device.name, how)
    if device.name != ("cpu" if found.type == "cpu" else f"{found.type}:{found.index}"):
        raise ValueError(f"`{where}.name` must name a single device in full, got {device.name!r}. {how}")
    memory, bandwidth = device.memory, device.bandwidth
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"`{where}.memory` must be a number of bytes, such as 80 * 2**30, got {memory!r}.")
    if not 0 < memory <= MAX_BYTES:
        raise ValueError(f"`{where}.memory` must be from 1 to {MAX_BYTES} bytes, got {memory}.")
    if bandwidth is None:
        return
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, (int, float)):
        raise TypeError(
            f"`{where}.bandwidth` must be bytes per second, such as 3.35e12, or None where it is not known, got "
            f"{bandwidth!r}."
        )
    if not 0 < bandwidth <= MAX_BYTES:
        raise ValueError(
            f"`{where}.bandwidth` must be above 0 and at most {MAX_BYTES} bytes per second, or None where it is not "
            f"known, got {bandwidth}."
        )


def parse_topology(text: str) -> tuple[Device, ...]:
    """The devices of a machine that is described: "8x80GiB", "2x24GiB, 1x80GiB@3.35TB/s", "cpu 64GiB".

    Raises
    ------
    ValueError
        It describes none, or one of too many devices.
    """
    is_cpu = text.strip().lower().startswith("cpu")
    groups = [_GROUP.fullmatch(part.strip()) for part in text.strip().lower().removeprefix("cpu").split(",")]
    counts = [int(group[1] or 1) for group in groups if group is not None]
    if None in groups or not sum(counts) or (is_cpu and counts != [1]):
        raise ValueError(
            f'`devices` must be described as in "8x80GiB", "2x24GiB,1x80GiB@3.35TB/s" (bytes read per second) or '
            f'"cpu 64GiB", got {text!r}.'
        )
    _check_count(sum(counts))
    found: list[Device] = []
    for group, count in zip(groups, counts, strict=True):
        assert group is not None
        base = 1024 if "i" in group[3] else 1000
        memory = int(float(group[2]) * base ** _UNITS[group[3][0]])
        bandwidth = float(group[4]) * 1000.0 ** _UNITS[group[5]] if group[4] else None
        for _ in range(count):
            found.append(Device("cpu" if is_cpu else f"cuda:{len(found)}", memory, bandwidth))
    return tuple(found)
