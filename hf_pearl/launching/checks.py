"""The arguments of `launch`, looked at before anything is started."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import PearlUnsupportedModelError
from ..parallel.tensor_parallel.plan import make_plan
from ..planning.unloaded import unloaded


def check_model(argument: str, folder: Path, dtype: torch.dtype, size: int) -> None:
    """Raise for a folder whose model cannot be loaded on `size` ranks; only the heads of its files are read.

    Parameters
    ----------
    argument : str
        "target" or "draft": what errors call it.

    Raises
    ------
    ValueError
        It holds no causal language model of transformers.
    PearlUnsupportedModelError
        The model cannot be cut.
    """
    model = unloaded(argument, folder, dtype).model
    if size > 1:
        try:
            make_plan(model, 0, size)
        except PearlUnsupportedModelError as error:
            raise PearlUnsupportedModelError(f"`{argument}_tp` is {size}, and {error}") from error
