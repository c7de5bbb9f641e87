"""Which devices there are, how much memory they have, and how fast they read it."""

from __future__ import annotations

import functools
import re
import time
from typing import NamedTuple

import torch

from ..cache.sizing import free_cuda_memory, main_memory

_COPY_BYTES = {"cuda": 2**28, "cpu": 2**26}  # more than caches hold
_COPIES = 5
_GROUP = re.compile(r"(?:(\d{1,4})\s*x)?\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)(?:\s*@\s*(\d+(?:\.\d+)?)\s*([mgt])b/s)?")
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
        source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
        target = source.clone()
    except (torch.OutOfMemoryError, RuntimeError):
        return None
    _finish(device)
    started = time.perf_counter()
    for _ in range(_COPIES):
        target.copy_(source)
    _finish(device)
    return 2 * _COPIES * source.nbytes / (time.perf_counter() - started)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse_topology(text: str) -> tuple[Device, ...]:
    """The devices of a machine that is described: "8x80GiB", "2x24GiB, 1x80GiB@3.35TB/s", "cpu 64GiB".

    Raises
    ------
    ValueError
        It describes none.
    """
    is_cpu = text.strip().lower().startswith("cpu")
    groups = [_GROUP.fullmatch(part.strip()) for part in text.strip().lower().removeprefix("cpu").split(",")]
    counts = [int(group[1] or 1) for group in groups if group is not None]
    if None in groups or not sum(counts) or (is_cpu and counts != [1]):
        raise ValueError(
            f'`devices` must be described as in "8x80GiB", "2x24GiB,1x80GiB@3.35TB/s" (bytes read per second) or '
            f'"cpu 64GiB", got {text!r}.'
        )
    found: list[Device] = []
    for group, count in zip(groups, counts, strict=True):
        assert group is not None
        base = 1024 if "i" in group[3] else 1000
        memory = int(float(group[2]) * base ** _UNITS[group[3][0]])
        bandwidth = float(group[4]) * 1000.0 ** _UNITS[group[5]] if group[4] else None
        for _ in range(count):
            found.append(Device("cpu" if is_cpu else f"cuda:{len(found)}", memory, bandwidth))
    return tuple(found)
