"""Giving every transformers model, or one, the `pearl` argument; importing hf_pearl changes nothing."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationMixin

from .config import PearlConfig
from .forks import in_forked_children
from .generation import pearl_generate
from .models import generative_model
from .registry import release

_lock = threading.Lock()


def _in_forked_child() -> None:
    global _lock
    _lock = threading.Lock()


in_forked_children(_in_forked_child)


class GenerateWithPearl(functools.partial[Any]):
    """A model's own `generate`, which takes `pearl`, among its attributes.

    Not a bound method, which would be pickled by its name as an attribute of the model's class.
    """


def enable(model: Any = None) -> None:
    """Give `generate` the argument `pearl`: of one model, or, without an argument, of every transformers model.

    Parameters
    ----------
    model : PreTrainedModel, or one in a wrapper of PEFT's or `torch.compile`'s, optional
        The model; None: all, those that are loaded already among them.

    Raises
    ------
    TypeError
        `model` has no `generate`.
    """
    with _lock:
        if model is None:
            if not hasattr(GenerationMixin.generate, "hf_pearl_original"):
                GenerationMixin.generate = _with_pearl(GenerationMixin.generate)
            return
        inner = generative_model(model)
        if not _is_enabled(inner):
            inner.generate = GenerateWithPearl(_generate_of_one_model, inner)


def enable_pair(target: Any, draft: Any) -> None:
    """`enable(target)`, and let `draft` and `pearl=True` be what its `generate` does unless told otherwise."""
    with _lock:
        target.generate = GenerateWithPearl(_generate_of_pair, target, draft)


def disable(model: Any = None) -> None:
    """Undo `enable`, with the same argument; harmless where nothing was enabled."""
    with _lock:
        if model is None:
            original = getattr(GenerationMixin.generate, "hf_pearl_original", None)
            if original is not None:
                GenerationMixin.generate = original
            return
        inner = generative_model(model)
        if _is_enabled(inner):
            del inner.generate


@contextmanager
def enabled(model: Any) -> Iterator[None]:
    """A scope in which one model, on this rank alone, takes `pearl`, and after which it is as it was before."""
    inner = generative_model(model)
    before = vars(inner).get("generate")
    inner.generate = GenerateWithPearl(_generate_of_one_model, inner)
    try:
        yield
    finally:
        if before is None:
            vars(inner).pop("generate", None)
        else:
            inner.generate = before


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """`enabled`, and at the end nothing is held for the model any more: what is measured next begins cold."""
    with enabled(model):
        try:
            yield
        finally:
            release(model)


def _is_enabled(model: Any) -> bool:
    return isinstance(vars(model).get("generate"), GenerateWithPearl)


def _with_pearl(original: Any) -> Any:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, pearl: bool | PearlConfig | None = None, **kwargs: Any) -> Any:
        return pearl_generate(types.MethodType(original, self), self, pearl, args, kwargs)

    generate.hf_pearl_original = original  # type: ignore[attr-defined]
    return generate


def _generate_of_one_model(self: Any, *args: Any, pearl: bool | PearlConfig | None = None, **kwargs: Any) -> Any:
    """transformers' `generate`, with `pearl`."""
    of_class = type(self).generate
    original = getattr(of_class, "hf_pearl_original", of_class)  # Where every model is enabled too.
    return pearl_generate(types.MethodType(original, self), self, pearl, args, kwargs)


def _generate_of_pair(self: Any, draft: Any, *args: Any, pearl: bool | PearlConfig = True, **kwargs: Any) -> Any:
    """transformers' `generate`, with `pearl`, which is on, and a draft; without it there is no draft either."""
    if pearl:
        kwargs.setdefault("assistant_model", draft)
    return _generate_of_one_model(self, *args, pearl=pearl, **kwargs)
