"""Triton's interpreter, made to run with NumPy 2.4 and later: it turns arrays of one number into loop bounds.

And memory in which nothing is by chance what it should be. Whoever imports this is skipped where there is no Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from triton import knobs
from triton.runtime import interpreter

IS_INTERPRETED = knobs.runtime.interpret

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: type, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, what torch has not initialised is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1, device="cpu").isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
