"""How a model travels to a worker: its weights as shared memory, its class and config as a pickle at start-up.

Weights in main memory are copied there once; those on a GPU are mapped where they are (`device_weights.py`).

The pickle goes from the process that makes it to the child that it starts, through a private descriptor, once; nothing
is unpickled afterwards.
"""

from __future__ import annotations

import importlib
import math
import mmap
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ...compat import with_eager_attention
from ...models import is_quantised
from ..ranks.models import load_first_part, rank_model_of
from ..ranks.wire import RankModel
from ..tensor_parallel import part_of
from . import device_weights
from .child_process import why_no_child
from .device_weights import SharedPlace, SharedStorage

_ALIGNMENT = 64


class Place(NamedTuple):
    """Where a copy of a tensor lies in the shared memory."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Binding(NamedTuple):
    """A tensor of a module: the module's path, the tensor's name and kind, and which place holds its values."""

    module: str
    name: str
    kind: str
    place: int


class Shipment(NamedTuple):
    """All about a model but its weights; equal as long as new weights fit into, or lie in, the old places.

    Of a model over several `ranks` only that: every rank reads its part from the files.
    """

    class_module: str
    class_name: str
    config: bytes
    module_classes: tuple[tuple[str, str], ...]
    bindings: tuple[Binding, ...]
    places: tuple[Place | SharedPlace, ...]
    ranks: RankModel | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of shared memory for copies; never 0, which could not be mapped."""
        ends = [place.offset + place.num_bytes for place in self.places if isinstance(place, Place)]
        return max([_ALIGNMENT, *ends])


def can_ship(model: PreTrainedModel) -> str | None:
    """Why a worker process could not load `model` or would not compute the same; None if it can."""
    if not (sys.platform.startswith("linux") and hasattr(os, "memfd_create") and hasattr(os, "eventfd")):
        return "worker processes need Linux (memfd, eventfd)"
    reason = why_no_child() or (None if part_of(model) is None else "it is one of several parts, led by this process")
    if reason is not None or rank_model_of(model) is not None:
        return reason
    for kind in (type(model), type(model.config)):
        if not _can_import(kind):
            return f"its class {kind.__module__}.{kind.__qualname__} cannot be imported in another process"
    if is_quantised(model):
        return "it is quantised"
    for name, module in model.named_modules():
        reason = _why_not_module(module)
        if reason is not None:
            return f"module {name or type(module).__name__!r} {reason}"
    for module, name, _, tensor in _tensors(model):
        reason = _why_not_tensor(tensor)
        if reason is not None:
            return f"tensor {module + '.' + name!r} {reason}"
    return None


def pack(model: PreTrainedModel) -> tuple[Shipment, list[torch.Tensor]]:
    """What to send of a model, and its tensors in the order of the shipment's places.

    A tensor that several modules hold (tied weights) has one place, and is tied again on the other side.
    """
    ranks = rank_model_of(model)
    if ranks is not None:
        return Shipment("", ranks.name, b"", (), (), (), ranks), []
    places: list[Place | SharedPlace] = []
    tensors: list[torch.Tensor] = []
    bindings: list[Binding] = []
    place_of: dict[tuple[Any, ...], int] = {}
    addresses: dict[int, int] = {}  # of shared storages -> their numbers
    offset = 0
    for module, name, kind, tensor in _tensors(model):
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), kind == "parameter")
        if key not in place_of:
            place_of[key] = len(places)
            if device_weights.can_share(tensor):
                places.append(_shared_place(tensor, addresses))
            else:
                place = Place(offset, tuple(tensor.shape), tensor.dtype)
                places.append(place)
                offset += -(-place.num_bytes // _ALIGNMENT) * _ALIGNMENT
            tensors.append(tensor)
        bindings.append(Binding(module, name, kind, place_of[key]))
    shipment = Shipment(
        type(model).__module__,
        type(model).__qualname__,
        pickle.dumps(with_eager_attention(model.config)),  # The worker's lane switches to paged attention by itself.
        _module_classes(model),
        tuple(bindings),
        tuple(places),
    )
    return shipment, tensors


def _shared_place(tensor: torch.Tensor, addresses: dict[int, int]) -> SharedPlace:
    address = tensor.untyped_storage().data_ptr()
    storage = addresses.setdefault(address, len(addresses))
    offset, shape, strides = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
    return SharedPlace(storage, address, offset, shape, strides, tensor.dtype, str(tensor.device))


def share_weights(shipment: Shipment, tensors: Sequence[torch.Tensor]) -> list[SharedStorage]:
    """What the worker maps instead of copies, in the order of the shipment's storages.

    Raises
    ------
    OSError
        Memory cannot be shared.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    for place, tensor in zip(shipment.places, tensors, strict=True):
        if isinstance(place, SharedPlace):
            storages.setdefault(place.storage, tensor.untyped_storage())
    shared: list[SharedStorage] = []
    try:
        for storage in storages.values():
            shared.append(device_weights.share(storage))
    except BaseException:
        device_weights.release(shared)
        raise
    return shared


def copy_weights(
    shipment: Shipment, tensors: list[torch.Tensor], descriptor: int, is_cancelled: Callable[[], bool]
) -> None:
    """Copy those of `tensors` that are not shared to their places behind `descriptor`, unless cancelled half-way.

    Raises
    ------
    OSError
        There is not enough memory.
    """
    os.posix_fallocate(descriptor, 0, shipment.num_bytes)  # An error now instead of a bus error later.
    with mmap.mmap(descriptor, shipment.num_bytes) as memory, torch.no_grad():
        for place, tensor in zip(shipment.places, tensors, strict=True):
            if is_cancelled():
                return
            if isinstance(place, Place):
                _view(memory, place).copy_(tensor)


def build(shipment: Shipment, descriptor: int, shared: Sequence[SharedStorage] = ()) -> PreTrainedModel:
    """The model of a shipment, on the weights in the memory behind `descriptor` and those that are `shared`.

    Raises
    ------
    ValueError
        The class builds other modules than those the shipped model had.
    PearlWorkerError
        A rank could not load its part.
    """
    if shipment.ranks is not None:
        return load_first_part(shipment.ranks)
    memory = mmap.mmap(descriptor, shipment.num_bytes)
    kind = _lookup(importlib.import_module(shipment.class_module), shipment.class_name)
    config: PretrainedConfig = pickle.loads(shipment.config)
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    if _module_classes(model) != shipment.module_classes:
        differing = dict(set(shipment.module_classes) ^ set(_module_classes(model)))
        raise ValueError(
            f"{shipment.class_name}(config) builds other modules than the model has: {', '.join(sorted(differing)[:5])}"
        )
    opened = [each.open() for each in shared]
    tensors = [_view(memory, each) if isinstance(each, Place) else each.view(opened) for each in shipment.places]
    parameters: dict[int, torch.nn.Parameter] = {}
    for binding in shipment.bindings:
        module, tensor = model.get_submodule(binding.module), tensors[binding.place]
        if binding.kind == "parameter":
            parameter = parameters.setdefault(binding.place, torch.nn.Parameter(tensor, requires_grad=False))
            module._parameters[binding.name] = parameter
        elif binding.kind == "buffer":
            module._buffers[binding.name] = tensor
        else:
            setattr(module, binding.name, tensor)
    missing = [f"{module}.{name}" for module, name, _, tensor in _tensors(model) if tensor.is_meta]
    if missing:
        raise ValueError(f"tensors of {shipment.class_name}(config) that the model has not: {', '.join(missing[:5])}")
    return model.eval()


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, str, str, torch.Tensor]]:
    """Every tensor that a module of `model` holds, as (module's path, name, kind, tensor); tied ones repeatedly."""
    for path, module in model.named_modules():
        kinds = {"parameter": module._parameters, "buffer": module._buffers, "attribute": vars(module)}
        for kind, named in kinds.items():
            for name, tensor in named.items():
                if isinstance(tensor, torch.Tensor):
                    yield path, name, kind, tensor


def _module_classes(model: torch.nn.Module) -> tuple[tuple[str, str], ...]:
    return tuple((name, type(module).__qualname__) for name, module in model.named_modules())


def _view(memory: mmap.mmap, place: Place) -> torch.Tensor:
    count = math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=place.dtype, device="cpu")
    return torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset).view(place.shape)


def _lookup(module: Any, qualified_name: str) -> Any:
    for part in qualified_name.split("."):
        module = getattr(module, part)
    return module


def _can_import(kind: type) -> bool:
    """Whether a fresh interpreter with this one's `sys.path` finds a class under its name."""
    top = kind.__module__.partition(".")[0]
    if top in ("__main__", "transformers_modules") or "<locals>" in kind.__qualname__:
        return False
    try:
        is_there = _lookup(sys.modules[kind.__module__], kind.__qualname__) is kind
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        return is_there and any(finder.find_spec(top, None) is not None for finder in finders)
    except (AttributeError, KeyError, ImportError, ValueError):
        return False


def _why_not_module(module: torch.nn.Module) -> str | None:
    if type(module).__module__.partition(".")[0] == "peft":
        return "carries an adapter of PEFT"
    if hasattr(module, "_hf_hook"):
        return "has a hook of accelerate (several devices, or offloaded)"
    if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
        return "is compiled"
    if type(module).__module__.startswith("torch._dynamo"):
        return "is compiled"
    if "forward" in vars(module):
        return "has a replaced `forward`"
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # transformers' own, which record outputs for those who ask, change nothing.
    if any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
        return "has forward hooks"
    if hasattr(module, "parametrizations"):
        return "has parametrisations"
    return None


def _why_not_tensor(tensor: torch.Tensor) -> str | None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.is_meta:
        return "is offloaded or not loaded (meta device)"
    if tensor.device.type != "cpu" and not device_weights.can_share(tensor):
        return f"lies on {tensor.device}, whose memory another process cannot map: CPUs and CUDA devices can"
    if tensor.layout is not torch.strided:
        return "is sparse"
    return None
