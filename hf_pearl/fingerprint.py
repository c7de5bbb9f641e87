"""Seeing that a model's weights have changed, without reading them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from .models import all_modules


class Fingerprint(NamedTuple):
    """What `fingerprint` covers, in parts that are compared one by one."""

    tensors: tuple[tuple[Any, ...], ...]
    offloaded: Hashable
    adapters: Hashable
    hooks: Hashable
    autocast: Hashable


# parameter -> optimizer steps that it took part in: fused optimizers write around autograd's version counter.
_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fingerprint(model: torch.nn.Module, last: Fingerprint | None = None) -> Fingerprint:
    """A value that differs after a training step, an adapter switch or `load_state_dict`.

    It covers every parameter and buffer by identity, storage, address, version counter and optimizer steps (also of
    what accelerate has offloaded to memory), and the active adapters, forward hooks and autocast. What it cannot see:
    other writes that go around autograd's version counter (`tensor.data`, numpy views, raw pointers), files that
    weights are offloaded to, and code or configuration that is put in place of another; `hf_pearl.clear_cache(model)`
    is for these.

    Parameters
    ----------
    last : Fingerprint, optional
        An earlier one. Where no tensor has changed since then, that part of it is given back: finding that and
        comparing the two takes 40% less time than describing all anew.
    """
    _watch_optimizers()
    modules = all_modules(model)  # One walk: this is done before every call.
    kinds = (tensors for module in modules for tensors in (module._parameters, module._buffers))
    tensors = [tensor for kind in kinds for tensor in kind.values() if tensor is not None]
    known = () if last is None else last.tensors
    is_known = len(known) == len(tensors) and all(map(_is_in, tensors, known))
    return Fingerprint(
        known if is_known else tuple(map(_state, tensors)),
        _offloaded(modules),
        _active_adapters(modules),
        _hooks(modules),
        _autocast(modules),
    )


def _autocast(modules: Sequence[torch.nn.Module]) -> Hashable:
    """What autocast makes of the model's arithmetic here; None where it is off."""
    tensors = (tensor for each in modules for kinds in (each._parameters, each._buffers) for tensor in kinds.values())
    # What is offloaded lies on the meta device, which computes nothing; some buffer is where the forward is.
    kind = next((tensor.device.type for tensor in tensors if tensor is not None and not tensor.is_meta), "cpu")
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@functools.cache
def _watch_optimizers() -> None:
    """Count optimizer steps from now on; what was before the first fingerprint changes nothing."""
    register_optimizer_step_pre_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _steps[parameter] = _steps.get(parameter, 0) + 1


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Weak references rather than ids and addresses alone, which a new tensor may inherit from one that is gone."""
    if tensor.is_meta:
        return True, tensor.shape, tensor.dtype  # offloaded: another one after every forward; its values are elsewhere
    try:
        storage = StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a wrapper around other tensors
        storage = None
    # A tensor made in inference mode counts no versions: it is taken for changed every time.
    version = object() if tensor.is_inference() else tensor._version
    # What comes first tells the two kinds apart: torch's references can be compared with references only.
    return False, WeakIdRef(tensor), storage, tensor.data_ptr(), version, _num_steps(tensor), tensor.dtype


def _num_steps(tensor: torch.Tensor) -> int:
    return _steps.get(tensor, 0) if _steps.data else 0


def _is_in(tensor: torch.Tensor, state: tuple[Any, ...]) -> bool:
    """Whether a tensor is still in a state."""
    if tensor.is_meta or tensor.is_inference() or state[0]:
        return _state(tensor) == state
    _, reference, storage, address, version, num_steps, dtype = state
    return (
        weakref.ref.__call__(reference) is tensor
        and tensor.data_ptr() == address
        and tensor._version == version
        and tensor.dtype == dtype
        and _num_steps(tensor) == num_steps
        # Another storage at the same address, of a tensor that is the same, has come after the end of this one.
        and storage is not None
        and not storage.expired()
    )


def _offloaded(modules: Sequence[torch.nn.Module]) -> tuple[Hashable, ...]:
    """Where accelerate's hooks load weights from before a forward, and what of it lies in memory."""
    states: list[Hashable] = []
    known: set[int] = set()
    for module in modules:
        hook = vars(module).get("_hf_hook")
        source = getattr(hook, "weights_map", None)
        source = getattr(source, "dataset", source)  # of all modules together, seen through a prefix
        if source is not None and id(source) not in known:
            known.add(id(source))
            in_memory = source if isinstance(source, dict) else getattr(source, "state_dict", {})
            states.append((WeakIdRef(hook), tuple(map(_state, in_memory.values()))))
    return tuple(states)


def _hooks(modules: Sequence[torch.nn.Module]) -> tuple[Hashable, ...]:
    """Forward hooks, by numbers that torch never uses twice; they may change what a layer computes."""
    hooks = (
        (tuple(module._forward_hooks), tuple(module._forward_pre_hooks))
        for module in modules
        if module._forward_hooks or module._forward_pre_hooks
    )
    return tuple(hooks)


def _active_adapters(modules: Sequence[torch.nn.Module]) -> tuple[Hashable, ...]:
    """Adapter state of every PEFT layer, `(active adapters, disabled, merged)`; empty without PEFT."""
    states: list[Hashable] = []
    # A module looks for what it does not have in all its parts, which takes long.
    kinds = {kind: hasattr(kind, "active_adapters") for kind in set(map(type, modules))}
    for module in modules:
        has_any = kinds[type(module)] or "active_adapters" in vars(module)
        active: Any = getattr(module, "active_adapters", None) if has_any else None
        if isinstance(active, list | tuple):
            state = (tuple(active), getattr(module, "disable_adapters", False), bool(getattr(module, "merged", False)))
            scaling = getattr(module, "scaling", None)
            states.append((*state, tuple(sorted(scaling.items())) if isinstance(scaling, dict) else None))
    return tuple(states)
