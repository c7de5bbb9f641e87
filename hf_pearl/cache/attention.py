"""Attention over the paged cache: one attention function and its mask function for unmodified model code.

Shapes: `T` packed tokens of all sequences of a step, `S` sequences, `Q` query tokens of the longest sequence, `L` keys
of the longest sequence, `H` query heads, `K` key-value heads, `D` head dimension.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..compat import (
    AttentionInterface,
    AttentionMaskInterface,
    attention_configs,
    attention_implementation,
    eager_attention,
    set_attention_implementation,
)
from ..forks import in_forked_children
from .step import Attention, Step

ATTENTION_NAME = "hf_pearl_paged"


class _Current(threading.local):
    step: Step | None = None


class _Switched(NamedTuple):
    config: Any
    original: str  # the implementation it had
    users: list[int]  # their threads


_current = _Current()
_switch_lock = threading.Lock()
_switched: dict[int, _Switched] = {}  # by the config's `id`


@contextmanager
def paged_step(step: Step) -> Iterator[None]:
    """Make `step` the one that attention layers called from this thread write to and read from.

    A thread-local rather than a forward keyword, because some models (StableLM, Nemotron) do not pass keywords on to
    their attention layers.
    """
    if _current.step is not None:
        raise RuntimeError("a paged forward was started inside another one in the same thread")
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


@contextmanager
def paged_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch `model` to paged attention, and back to what it used when the last user leaves.

    Other threads that call the model meanwhile are served by the attention it had: the paged functions act only
    where `paged_step` is set.
    """
    configs, here = attention_configs(model), threading.get_ident()
    switched = []
    try:
        with _switch_lock:
            for config in configs:
                found = _switched.setdefault(id(config), _Switched(config, attention_implementation(config), []))
                switched.append(found)
                found.users.append(here)
                set_attention_implementation(config, ATTENTION_NAME)
        yield
    finally:
        with _switch_lock:
            for found in switched:
                found.users.remove(here)
                _switch_back_if_unused(found)


def _switch_back_if_unused(switched: _Switched) -> None:
    if not switched.users:
        set_attention_implementation(switched.config, switched.original)
        del _switched[id(switched.config)]


def _in_forked_child() -> None:
    """Let go of what other threads, which are not here, have switched."""
    global _switch_lock
    _switch_lock, here = threading.Lock(), threading.get_ident()
    for each in list(_switched.values()):
        each.users[:] = [user for user in each.users if user == here]
        _switch_back_if_unused(each)


in_forked_children(_in_forked_child)


def _paged_attention_forward(
    module: Any,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, K, T, D)
    value: torch.Tensor,  # (1, K, T, D)
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that transformers calls; returns `(1, T, H, D)` and no weights."""
    step = _current.step
    if step is None:
        return _original_attention(module)(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    attention = Attention(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return step.attend(module.layer_idx, query, key, value, attention), None


def _original_implementation(config: Any) -> str:
    found = _switched.get(id(config))
    return "sdpa" if found is None else found.original


def _original_attention(module: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    name = _original_implementation(module.config)
    return eager_attention(module) if name == "eager" else AttentionInterface()[name]


def _paged_mask(**kwargs: Any) -> torch.Tensor | None:
    """No mask inside a paged step, which knows every sequence's length; elsewhere that of the original attention."""
    if _current.step is not None:
        return None
    original = AttentionMaskInterface().get(_original_implementation(kwargs.get("config")))
    return None if original is None else original(**kwargs)


def register() -> None:
    """Make the attention and mask functions known to transformers, under one name; harmless to repeat."""
    AttentionInterface.register(ATTENTION_NAME, _registered)
    AttentionMaskInterface.register(ATTENTION_NAME, _paged_mask)


_registered: Callable[..., Any] = _paged_attention_forward


def keep_out_of_compilation() -> None:
    """Have `torch.compile` call the attention function as it is, from now on: which step it serves is not in its input.

    That loads a large part of torch, so that it is done for those alone who compile.
    """
    global _registered
    if _registered is _paged_attention_forward:
        _registered = torch.compiler.disable(_paged_attention_forward)
    register()
