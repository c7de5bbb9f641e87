"""What a measurement was made on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..parallel.cores import available_cores


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, the cores that this process may use, and the accelerator where there is one."""
    described: dict[str, Any] = {
        "processor": _processor(),
        "num_cores": len(available_cores()),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        described["accelerator"] = torch.cuda.get_device_name(device)
    return described


def describe_versions() -> dict[str, str]:
    """Of Python and of the packages that do the work."""
    versions = {"python": platform.python_version()}
    for name in ("hf-pearl", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # Imported from a source tree that is not installed.
            versions[name] = "not installed"
    return versions


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
