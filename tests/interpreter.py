"""Triton's interpreter, made to run with NumPy 2.4 and later: it turns arrays of one number into loop bounds.

Whoever imports this is skipped where there is no Triton.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from triton import knobs
from triton.runtime import interpreter

IS_INTERPRETED = knobs.runtime.interpret

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: type, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
