"""Which engine belongs to which pair; engines end with their models."""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import PearlConfig
from .engine import PearlEngine
from .models import generative_model
from .parallel.placement import move, put_back, wanted_moves

logger = logging.get_logger(__name__)

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


def place(target: PreTrainedModel, draft: PreTrainedModel | None, config: PearlConfig) -> None:
    """Bring both models to where `config` wants them; what is moved waits for the calls that use it.

    Raises
    ------
    ValueError
        A device that is not there or has no room, or a model that must not be moved.
    """
    for model, devices, why in wanted_moves(target, draft, config):
        logger.info(f"{type(model).__name__} moves to {', '.join(map(str, devices))}: {why}.")
        with ExitStack() as calls:
            for engine in sorted(engines_of(model), key=id):  # In one order, so that nobody waits for a waiting one.
                calls.enter_context(engine.lock)
                engine.begin_anew()
            move(model, devices)


def release(model: PreTrainedModel) -> None:
    """Give back all that hf_pearl holds for `model` as target or draft: caches, worker processes, devices.

    Models that were moved, it or its partners, go back to where they were unless another pair uses them.
    """
    for engine in engines_of(model):
        engine.close()
    model = generative_model(model)
    with _lock:
        partners = [*_engines.get(model, ()), *(target for target, drafts in _engines.items() if model in drafts)]
        _plain.pop(model, None)
        _engines.pop(model, None)
        for by_draft in _engines.values():
            by_draft.pop(model, None)
    for each in (model, *partners):
        if not engines_of(each):
            put_back(each)


def clear_cache(model: PreTrainedModel) -> None:
    """Forget every prefix cached for `model`; needed only after a change of weights that no fingerprint can see.

    Such changes are writes around autograd's version counter: through `tensor.data`, numpy views or raw pointers.
    """
    for engine in engines_of(model):
        engine.clear()
