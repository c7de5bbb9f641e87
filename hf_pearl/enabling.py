"""Giving every transformers model, or one, the `pearl` argument; importing hf_pearl changes nothing."""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

from transformers import GenerationMixin

from . import compat
from .config import PearlConfig
from .generation import pearl_generate, unwrap

_lock = threading.Lock()


def enable(model: Any = None) -> None:
    """Give `generate` the argument `pearl`: of one model, or, without an argument, of every transformers model.

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
        inner = unwrap(model)
        if not isinstance(inner, GenerationMixin):
            raise TypeError(f"`model` must be a transformers model that can generate, got {type(model).__name__}.")
        if not hasattr(inner.generate, "hf_pearl_original"):
            inner.generate = types.MethodType(_generate_of_one_model, inner)


def disable(model: Any = None) -> None:
    """Undo `enable`, with the same argument; harmless where nothing was enabled."""
    with _lock:
        if model is None:
            original = getattr(GenerationMixin.generate, "hf_pearl_original", None)
            if original is not None:
                GenerationMixin.generate = original
            return
        own = vars(unwrap(model)).get("generate")
        if getattr(own, "__func__", None) is _generate_of_one_model:
            del unwrap(model).generate


def _with_pearl(original: Any) -> Any:
    @functools.wraps(original)
    def generate(self: Any, *args: Any, pearl: bool | PearlConfig | None = None, **kwargs: Any) -> Any:
        return pearl_generate(types.MethodType(original, self), self, pearl, args, kwargs)

    generate.hf_pearl_original = original  # type: ignore[attr-defined]
    return generate


def _generate_of_one_model(self: Any, *args: Any, pearl: bool | PearlConfig | None = None, **kwargs: Any) -> Any:
    """transformers' `generate`, with `pearl`."""
    return pearl_generate(types.MethodType(type(self).generate, self), self, pearl, args, kwargs)


_generate_of_one_model.hf_pearl_original = compat.original_generate()  # type: ignore[attr-defined]
