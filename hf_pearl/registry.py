"""Which engine belongs to which pair; engines end with their models."""

from __future__ import annotations

import threading
import weakref

import torch
from transformers import PreTrainedModel

from .engine import PearlEngine
from .models import generative_model

_lock = threading.Lock()
# target -> draft -> engine; plain decoding stands under the target itself.
_engines: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakKeyDictionary[torch.nn.Module, PearlEngine]] = (
    weakref.WeakKeyDictionary()
)
_plain: weakref.WeakKeyDictionary[torch.nn.Module, PearlEngine] = weakref.WeakKeyDictionary()


def engine_for(target: PreTrainedModel, draft: PreTrainedModel | None) -> PearlEngine:
    """The engine of a pair, made on first use."""
    with _lock:
        if draft is None:
            return _plain.setdefault(target, PearlEngine())
        return _engines.setdefault(target, weakref.WeakKeyDictionary()).setdefault(draft, PearlEngine())


def engines_of(model: PreTrainedModel) -> list[PearlEngine]:
    """Every engine in which `model` is target or draft; raises `TypeError` for what is no model."""
    model = generative_model(model)
    with _lock:
        found = [_plain[model]] if model in _plain else []
        for target, by_draft in _engines.items():
            found += [engine for draft, engine in by_draft.items() if model in (target, draft)]
        return found


def release(model: PreTrainedModel) -> None:
    """Give back all that hf_pearl holds for `model` as target or draft: caches, worker processes."""
    for engine in engines_of(model):
        engine.close()
    model = generative_model(model)
    with _lock:
        _plain.pop(model, None)
        _engines.pop(model, None)
        for by_draft in _engines.values():
            by_draft.pop(model, None)


def clear_cache(model: PreTrainedModel) -> None:
    """Forget every prefix cached for `model`; needed only after a change of weights that no fingerprint can see.

    Such changes are writes around autograd's version counter: through `tensor.data`, numpy views or raw pointers.
    """
    for engine in engines_of(model):
        engine.clear()
