"""Which engine belongs to which pair; engines end with their models."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .config import PearlConfig
from .engine import PearlEngine
from .errors import first_line
from .forks import in_forked_children
from .models import generative_model
from .parallel.placement import check_pair_loaded, lies_on, move, put_back, wanted_moves

logger = logging.get_logger(__name__)


class _Engines:
    """The engines of one process: target -> draft -> engine; plain decoding stands under the target itself."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.drafted: weakref.WeakKeyDictionary[
            torch.nn.Module, weakref.WeakKeyDictionary[torch.nn.Module, PearlEngine]
        ] = weakref.WeakKeyDictionary()
        self.plain: weakref.WeakKeyDictionary[torch.nn.Module, PearlEngine] = weakref.WeakKeyDictionary()

    def forget(self, model: torch.nn.Module) -> None:
        """Drop every engine in which `model` is target or draft."""
        self.plain.pop(model, None)
        self.drafted.pop(model, None)
        for by_draft in self.drafted.values():
            by_draft.pop(model, None)


_here = _Engines()
_inherited: list[_Engines] = []


def _in_forked_child() -> None:
    """Begin without engines: a call of another thread, which is not here, may have held them and been half through.

    Those of the parent stay until their models are used or released here: what lies on a GPU cannot be freed now.
    """
    global _here
    _inherited.append(_here)
    _here = _Engines()


in_forked_children(_in_forked_child)


def engine_for(target: PreTrainedModel, draft: PreTrainedModel | None) -> PearlEngine:
    """The engine of a pair, made on first use."""
    with _here.lock:
        for parents in _inherited:
            parents.forget(target)
        if draft is None:
            engines, partner = _here.plain, target
        else:
            engines, partner = _here.drafted.setdefault(target, weakref.WeakKeyDictionary()), draft
        if partner not in engines:
            engines[partner] = PearlEngine()
        return engines[partner]


def engines_of(model: PreTrainedModel) -> list[PearlEngine]:
    """Every engine in which `model` is target or draft; raises `TypeError` for what is no model."""
    model = generative_model(model)
    with _here.lock:
        found = [_here.plain[model]] if model in _here.plain else []
        for target, by_draft in _here.drafted.items():
            found += [engine for draft, engine in by_draft.items() if model in (target, draft)]
        return found


def place(target: PreTrainedModel, draft: PreTrainedModel | None, config: PearlConfig) -> None:
    """Bring both models to where `config` wants them; what is moved waits for the calls that use it.

    Raises
    ------
    ValueError
        A device that is not there or has no room, or a model that has no weights, or must not be moved.
    """
    check_pair_loaded(target, draft)
    moves = wanted_moves(target, draft, config)
    if moves:
        engine_for(target, draft)  # So that another first call of this pair waits for the move of this one.
    for model, devices, why, is_asked in moves:
        with _between_calls(model, "A move to other devices") as engines:
            if lies_on(model, devices):
                continue
            logger.info(f"{type(model).__name__} moves to {', '.join(map(str, devices))}: {why}.")
            for engine in engines:
                engine.begin_anew()
            try:
                move(model, devices)
            except torch.OutOfMemoryError as error:
                if is_asked:
                    raise
                logger.warning(f"{type(model).__name__} stays where it is: {first_line(error)}")


@contextmanager
def _between_calls(model: PreTrainedModel, what: str) -> Iterator[list[PearlEngine]]:
    """The scope of what no call with `model` may be under way for; yields its engines."""
    engines = sorted(engines_of(model), key=id)  # In one order, so that nobody waits for a waiting one.
    with ExitStack() as calls:
        for engine in engines:
            calls.enter_context(engine.turns.between_calls(what))
        yield engines


def release(model: PreTrainedModel) -> None:
    """Give back all that hf_pearl holds for `model` as target or draft: caches, worker processes, devices.

    Models that were moved, it or its partners, go back to where they were unless another pair uses them, or a call of
    another thread that waits for its turn.

    Raises
    ------
    TypeError
        `model` is no transformers model that can generate.
    RuntimeError
        A callback of a running call asks for it; calls of other threads are waited for.
    """
    model = generative_model(model)
    with _between_calls(model, "`release`") as engines:
        for engine in engines:
            engine.close()
        with _here.lock:
            drafted = _here.drafted
            partners = [*drafted.get(model, ()), *(target for target, drafts in drafted.items() if model in drafts)]
            for process in (_here, *_inherited):
                process.forget(model)
        if not any(engine.turns.is_waited_for for engine in engines):
            for each in (model, *partners):
                if not engines_of(each):
                    put_back(each)


def clear_cache(model: PreTrainedModel) -> None:
    """Forget every prefix cached for `model`; needed only after a change of weights that no fingerprint can see.

    Such changes are writes around autograd's version counter: through `tensor.data`, numpy views or raw pointers.

    Raises
    ------
    TypeError
        `model` is no transformers model that can generate.
    RuntimeError
        A callback of a running call asks for it; calls of other threads are waited for.
    """
    for engine in engines_of(model):
        engine.clear()
