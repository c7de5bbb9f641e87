"""The arguments of `launch`, looked at before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..cache.support import check_supported
from ..device_arguments import one_device, present
from ..errors import PearlUnsupportedModelError, first_line
from ..pair import default_device
from ..parallel.tensor_parallel import find_folder
from ..parallel.tensor_parallel.plan import make_plan
from ..planning.unloaded import check_dtype, unloaded


def check_sources(target: Any, draft: Any) -> None:
    """Raise `TypeError` or `ValueError` for what is neither a folder nor a name; there need not be a draft."""
    for argument, source in (("target", target), ("draft", draft)):
        is_left_out = source is None and argument == "draft"
        if not isinstance(source, (str, Path)) and not is_left_out:
            raise _no_source(argument, source)
        if source == "":  # As a path it would be the working directory.
            raise ValueError(f"`{argument}` must be a folder or a name on the Hub, got ''.")


def _no_source(argument: str, source: Any) -> TypeError:
    is_model = isinstance(source, PreTrainedModel)
    got = f"a {type(source).__name__}" if is_model else repr(source)
    cure = "Every rank loads its part itself: pass what the model was loaded from, or `save_pretrained` it to a folder."
    return TypeError(f"`{argument}` must be a folder or a name on the Hub, got {got}. {cure * is_model}".rstrip())


def checked_device(device: Any) -> torch.device:
    """The device that is asked for, or the best one there is.

    Raises
    ------
    TypeError, ValueError
        It is none, or none that is there and computes.
    """
    if device is None:
        return default_device()
    how = 'Give "cpu", "cuda", or nothing for the GPU if there is one.'
    found = one_device("device", device, how)
    present("device", (found,))
    return found


def checked_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """The dtype that is asked for, or the usual one of a device; raises `TypeError` for what is none."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    check_dtype(dtype)
    return dtype


def checked_folder(argument: str, source: str | Path) -> Path:
    """Where a model's files are; whatever is missing of one on the Hub is downloaded.

    Raises
    ------
    FileNotFoundError
        The folder holds no weights in safetensors.
    ValueError
        There is no such folder, and no such name on the Hub that can be reached.
    """
    try:
        return find_folder(source).resolve()
    except (OSError, ValueError) as error:
        if Path(source).is_dir():
            raise FileNotFoundError(f"`{argument}`: {error}") from error
        raise ValueError(
            f"`{argument}` must be a folder, or a name on the Hub that can be reached, got {str(source)!r}: "
            f"{first_line(error)}"
        ) from error


def checked_model(argument: str, folder: Path, dtype: torch.dtype, size: int) -> PreTrainedModel:
    """The structure of a folder's model, which can be loaded on `size` ranks; only the heads of its files are read.

    Parameters
    ----------
    argument : str
        "target" or "draft": what errors call it.

    Raises
    ------
    ValueError
        It holds no causal language model of transformers, or files that are not what their names say.
    PearlUnsupportedModelError
        The model cannot be cut, or PEARL cannot run it.
    """
    model = unloaded(argument, folder, dtype).model
    check_supported(model)
    if size > 1:
        try:
            make_plan(model, 0, size)
        except PearlUnsupportedModelError as error:
            raise PearlUnsupportedModelError(f"`{argument}_tp` is {size}, and {error}") from error
    return model
