"""Triton's interpreter, made to run with NumPy 2.4 and later: it turns arrays of one number into loop bounds."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: type, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
