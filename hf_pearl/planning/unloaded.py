"""A model that is not loaded: its structure on the meta device, and its size from what the Hub says of its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..errors import first_line

# Of a parameter, by the names that safetensors has for dtypes.
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_POINTER = b"version https://git-lfs"


class Unloaded(NamedTuple):
    """A model without weights.

    Attributes
    ----------
    model : PreTrainedModel
        On the meta device, in the dtype that it is to be loaded in.
    weights : int or None
        Bytes of its weights as they lie in their files, where these are quantised; None: the structure's own.
    """

    model: PreTrainedModel
    weights: int | None


def check_dtype(dtype: Any) -> None:
    """Raise `TypeError` for what models cannot be loaded in: a dtype of 8 bits only stores what is scaled elsewhere."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise TypeError(
            "`dtype` must be a floating-point dtype of torch of 16 bits or more, such as torch.bfloat16, or None, got "
            f"{dtype!r}. A model that is saved quantised stays so: leave `dtype` out."
        )


def unloaded(argument: str, source: str | Path, dtype: torch.dtype | None) -> Unloaded:
    """The structure of a model in a folder or on the Hub; no weight is read or fetched.

    Parameters
    ----------
    argument : str
        What errors call it.
    dtype : torch.dtype or None
        That it is to be loaded in; None: its own.

    Raises
    ------
    ValueError
        There is no such model, it cannot be reached, it is no causal language model of transformers, or a file of it
        is not what its name says.
    """
    if os.path.isfile(source):  # transformers would take it for the configuration, and nobody knows the weights.
        raise ValueError(
            f"`{argument}` must be a folder or a name on the Hub, got the file {str(source)!r}. Name its folder."
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # Where the file is odd, whatever transformers stumbles over.
        raise ValueError(
            f"`{argument}` must be a model, a folder or a name on the Hub that can be reached, got {str(source)!r}: "
            f"{_why(error)}"
        ) from error
    counts = _counts_in(argument, Path(source)) if Path(source).is_dir() else _counts_on_hub(argument, str(source))
    try:
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype or _dtype(config, counts))
    except Exception as error:
        raise ValueError(
            f"`{argument}` must be a causal language model of transformers, got {str(source)!r}: {_why(error)}"
        ) from error
    is_quantised = getattr(config, "quantization_config", None) is not None
    stored = sum(count * _BYTES.get(name, 1) for name, count in counts.items())
    return Unloaded(model, stored if is_quantised and stored else None)


def _why(error: Exception) -> str:
    """What it says; with its name where it was not meant to be read, as a `KeyError`."""
    if isinstance(error, (OSError, ValueError)):
        return first_line(error)
    return f"its configuration ends in a {type(error).__name__}: {' '.join(str(error).split())}"


def _dtype(config: PreTrainedConfig, counts: dict[str, int]) -> torch.dtype:
    """The dtype that transformers loads a checkpoint in unless told otherwise."""
    if config.dtype is not None:
        return config.dtype
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    largest = max(counts, key=lambda name: counts[name], default="F32")
    return kinds.get(largest, torch.float32)


def _counts_in(argument: str, folder: Path) -> dict[str, int]:
    """Parameters by dtype in the headers of a folder's files."""
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"`{argument}`: {path} is no file of safetensors: {first_line(error)}. {_cure(path)}"
            ) from error
        with file:
            names: list[str] = file.keys()  # The file itself is not iterable everywhere.
            for name in names:
                tensor = file.get_slice(name)
                kind = tensor.get_dtype()
                counts[kind] = counts.get(kind, 0) + torch.Size(tensor.get_shape()).numel()
    return counts


def _cure(path: Path) -> str:
    if not path.is_file():
        return "Put the file there."
    with path.open("rb") as file:
        is_pointer = file.read(len(_POINTER)) == _POINTER
    return "It is a pointer of Git LFS: fetch the file by `git lfs pull`." if is_pointer else "Download it again."


def _counts_on_hub(argument: str, name: str) -> dict[str, int]:
    """Parameters by dtype, by the headers of a repository's files."""
    try:
        return {str(kind): count for kind, count in get_safetensors_metadata(name).parameter_count.items()}
    except NotASafetensorsRepoError:
        return {}  # Other files do not tell; the structure does.
    except OfflineModeIsEnabled as error:
        raise ValueError(
            f"`{argument}` {name!r} is on the Hub, and this process is offline (HF_HUB_OFFLINE), so that the sizes of "
            "its files cannot be asked for. Go online, or pass the folder that it lies in."
        ) from error
    except Exception as error:  # no network, no such repository, no access
        raise ValueError(
            f"`{argument}` {name!r}: the Hub does not say how large its files are: {first_line(error)}"
        ) from error
