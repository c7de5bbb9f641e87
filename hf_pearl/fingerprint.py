"""Seeing that a model's weights have changed, without reading them."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdRef


def fingerprint(model: torch.nn.Module) -> Hashable:
    """A value that differs after a training step, an adapter switch or `load_state_dict`.

    It covers every parameter and buffer by identity, storage, address and version counter, and the active adapters.
    What it cannot see: writes that go around autograd's version counter (`tensor.data`, numpy views, raw pointers);
    `hf_pearl.clear_cache(model)` is for these.
    """
    tensors = tuple(_state(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    return tensors, _active_adapters(model)


def _state(tensor: torch.Tensor) -> Hashable:
    """Weak references rather than ids and addresses alone, which a new tensor may inherit from one that is gone."""
    try:
        storage = StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # a wrapper around other tensors
        storage = None
    # A tensor made in inference mode counts no versions: it is taken for changed every time.
    version = object() if tensor.is_inference() else tensor._version
    return WeakIdRef(tensor), storage, tensor.data_ptr(), version, tensor.dtype


def _active_adapters(model: torch.nn.Module) -> tuple[Hashable, ...]:
    """Adapter state of every PEFT layer, `(active adapters, disabled, merged)`; empty without PEFT."""
    states = []
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, list | tuple):
            state = (tuple(active), getattr(module, "disable_adapters", False), bool(getattr(module, "merged", False)))
            scaling = getattr(module, "scaling", None)
            states.append((*state, tuple(sorted(scaling.items())) if isinstance(scaling, dict) else None))
    return tuple(states)
