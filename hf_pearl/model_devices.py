"""Where a model computes: on one device, or layer by layer on several where accelerate has dispatched it.

A weight's own device does not tell: what is offloaded lies on the meta device between forwards. accelerate's hook
(`AlignDevicesHook`) of a module, or of one that it is a part of, names the device that its forward runs on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .models import all_modules

_NOWHERE = torch.device("meta")
_HOST = torch.device("cpu")


def is_dispatched(model: torch.nn.Module) -> bool:
    """Whether a hook of accelerate moves something in this model's forwards."""
    return any(_hook_device(module) is not None for module in all_modules(model))


def input_device(model: Any) -> torch.device:
    """Where a language model reads its token ids; what is offloaded is loaded to there."""
    embeddings = model.get_input_embeddings()
    hooked = _hook_device(embeddings)
    if hooked is not None:
        return hooked
    device: torch.device = embeddings.weight.device
    # Offloaded with what it is a part of: the whole model knows where to.
    return device if device != _NOWHERE else _hook_device(model) or _HOST


def check_loaded(name: str, model: Any, cure: str = "") -> None:
    """Raise `ValueError` for a model without weights, as those of its embeddings tell.

    They may be on a device, or where a hook of accelerate gets them.
    """
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device != _NOWHERE or _hook_device(embeddings) is not None or _hook_device(model) is not None:
        return
    raise ValueError(
        f"{name} ({type(model).__name__}) has no weights: they lie on the meta device, and no hook of accelerate loads "
        f"them. Load it with `from_pretrained`{cure}."
    )


def layer_devices(model: Any) -> list[torch.device]:
    """Where keys and values of every layer come from, in the order of `layer_idx`; several may share a device."""
    found: dict[int, torch.device] = {}
    for module, hooked in _with_hook_devices(model, None):
        index = vars(module).get("layer_idx")
        if isinstance(index, int):
            # A layer comes before its attention, which has the last word.
            found[index] = _hook_device_within(module) or hooked or _tensor_device(module)
    return [found[index] for index in sorted(found)]


def computing_devices(model: Any) -> list[torch.device]:
    """Every device that hooks of accelerate have the model compute on, the one of its token ids first."""
    hooked = filter(None, map(_hook_device, all_modules(model)))
    return list(dict.fromkeys((input_device(model), *hooked)))


def devices_of(model: Any) -> list[torch.device]:
    """Every device that the model computes on or keeps weights on, the one of its token ids first."""
    devices = computing_devices(model)
    for module in all_modules(model):
        devices += [tensor.device for tensor in _tensors(module) if tensor.device != _NOWHERE]
    return list(dict.fromkeys(devices))


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether some weights are loaded for their forward only; until then they lie on the meta device."""
    return any(tensor.device == _NOWHERE for module in all_modules(model) for tensor in _tensors(module))


def share_hooks(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have a part in common that a hook of accelerate serves."""
    hooked = {id(module) for module in all_modules(a) if "_hf_hook" in vars(module)}
    return bool(hooked) and any(id(module) in hooked for module in all_modules(b))


def _hook_device(module: torch.nn.Module) -> torch.device | None:
    """Where the hook of a module has it compute; None without one."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return None
    hooks = getattr(hook, "hooks", None) or (hook,)  # a SequentialHook's, which run one after the other
    devices = [getattr(each, "execution_device", None) for each in hooks]
    named = [device for device in devices if device is not None]
    if not named:
        return None
    return torch.device("cuda", named[-1]) if isinstance(named[-1], int) else torch.device(named[-1])


def _with_hook_devices(
    module: torch.nn.Module, inherited: torch.device | None
) -> Iterator[tuple[torch.nn.Module, torch.device | None]]:
    """Every part of a module with the device that its hook, or its nearest parent's, names."""
    hooked = _hook_device(module) or inherited
    yield module, hooked
    for part in module._modules.values():
        if part is not None:
            yield from _with_hook_devices(part, hooked)


def _hook_device_within(module: torch.nn.Module) -> torch.device | None:
    return next(filter(None, map(_hook_device, all_modules(module))), None)


def _tensor_device(module: torch.nn.Module) -> torch.device:
    return next((tensor.device for part in all_modules(module) for tensor in _tensors(part)), _HOST)


def _tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module itself."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]
