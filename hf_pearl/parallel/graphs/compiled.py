"""`torch.compile` inside what is captured: the many small kernels of a layer become few.

A graph spares Python and launches, not kernels. Of some fifty in a layer (norms, rotary embedding, residuals, casts)
most read and write a row that a neighbour has just written; compiled together they read and write it once.

Attention is left out: which step it serves is known to Python alone. There torch breaks off, so that the pieces of a
layer around it are compiled, once for all layers of a model: how long that takes does not grow with their number.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...cache.attention import keep_out_of_compilation

logger = logging.get_logger(__name__)

BACKEND: Any = "inductor"
MAX_VARIANTS = 64  # of a piece: of one token, of several, with a sliding window, without; times the models of a class


class Body:
    """Calls a model, compiled where that is wanted and works.

    Compiled, its logits differ from the model's own by rounding.

    Parameters
    ----------
    name : str
        Of the model's class.
    device : torch.device
        Where it computes.

    Attributes
    ----------
    is_compiled : bool
        False for good after an attempt that has failed; why is said once, at INFO level.
    """

    def __init__(self, name: str, is_compiled: bool, device: torch.device) -> None:
        self._name, self.is_compiled = name, is_compiled
        self._is_cuda = device.type == "cuda"

    def __call__(self, model: PreTrainedModel, **inputs: Any) -> Any:
        """What `model(**inputs)` returns."""
        if self.is_compiled:
            try:
                _count_compilations()
                with torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS), _same_threads(self._is_cuda):
                    return _compiled(type(model).forward)(model, **inputs)
            except Exception as error:  # A compiler may fail with anything, for want of gcc for example.
                self.give_up(error)
        return model(**inputs)

    def give_up(self, error: BaseException) -> None:
        """Compile no more."""
        self.is_compiled = False
        reason = getattr(error, "inner_exception", error)  # torch puts pages around it.
        text = str(reason).partition("\n")[0]
        logger.info_once(f"{self._name} is not compiled: {type(reason).__name__}: {text}")


def num_compilations() -> int:
    """Compilations of pieces that have begun or ended in this process: whoever compiles does not stand still."""
    return _signs.number


class _Signs:
    number = 0

    def count(self, *_: Any) -> None:
        """One more."""
        self.number += 1


_signs = _Signs()


def _count_compilations() -> None:
    """Count them from now on, also after `torch._dynamo.reset()`."""
    handler = torch._dynamo.callback.callback_handler
    if _signs.count not in handler.start_callbacks:
        handler.register_start_callback(_signs.count)
        handler.register_end_callback(_signs.count)


@functools.cache
def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A class's forward, compiled: one of a model would keep that model."""
    keep_out_of_compilation()
    options: dict[str, Any] = {}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # Else they count against the user's, too.
        options["isolate_recompiles"] = True
    if BACKEND == "inductor":  # Other options than anybody else's: torch takes pieces of an equal compiler for its own.
        options["options"] = {"triton.cudagraphs": False}
    return torch.compile(forward, backend=BACKEND, **options)


@contextmanager
def _same_threads(is_cuda: bool) -> Iterator[None]:
    """What is compiled serves one number of threads, which lanes change; on a GPU it does not matter which."""
    before = torch.get_num_threads()
    if is_cuda:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
