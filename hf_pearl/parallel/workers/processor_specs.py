"""How logits processors travel to a draft worker: by the name of an allow-listed class and the values it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from ...decoding.processors import stateless_classes
from .records import MalformedRecordError

logger = logging.get_logger(__name__)

MAX_PROCESSOR_BYTES = 2**18
MAX_PROCESSORS_BYTES = 2**19
_SCALARS = (bool, int, float, str, type(None))
_DTYPES = {
    str(dtype): dtype
    for dtype in (torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def encode_processors(processors: Iterable[LogitsProcessor]) -> list[dict[str, Any]]:
    """Specifications in JSON's types of the processors that can travel.

    What is no stateless class of transformers, holds other values than numbers, texts, tensors and collections of
    them, or is too large, is left out: acceptance may fall, the output cannot.
    """
    specs, num_bytes = [], 0
    for processor in processors:
        name = type(processor).__name__
        try:
            if stateless_classes().get(name) is not type(processor):
                raise TypeError("is not known to keep nothing between calls")
            spec = {"class": name, "values": {key: _encode(value) for key, value in vars(processor).items()}}
            size = len(json.dumps(spec))
            if size > MAX_PROCESSOR_BYTES or num_bytes + size > MAX_PROCESSORS_BYTES:
                raise TypeError(f"takes {size} bytes")
        except TypeError as error:
            logger.info(f"The draft guesses without {name}, which {error}.")
            continue
        num_bytes += size
        specs.append(spec)
    return specs


def decode_processors(specs: Iterable[dict[str, Any]]) -> LogitsProcessorList:
    """The processors that `specs` describe.

    Raises
    ------
    MalformedRecordError
        A specification names another class than those allowed, or is none.
    """
    return LogitsProcessorList([_decode_processor(spec) for spec in specs])


def _decode_processor(spec: dict[str, Any]) -> LogitsProcessor:
    name, values = spec.get("class"), spec.get("values")
    kind = stateless_classes().get(name) if isinstance(name, str) else None
    if kind is None or set(spec) != {"class", "values"} or not isinstance(values, dict):
        raise MalformedRecordError(f"no specification of a logits processor: {str(spec)[:100]}")
    if any(not key.isidentifier() or key.startswith("__") or hasattr(kind, key) for key in values):
        raise MalformedRecordError(f"values of {name} with unexpected names: {', '.join(values)[:100]}")
    processor: LogitsProcessor = object.__new__(kind)
    vars(processor).update({key: _decode(value) for key, value in values.items()})
    return processor


def _encode(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if type(value) is torch.Tensor and str(value.dtype) in _DTYPES:
        if value.numel() * 8 > MAX_PROCESSOR_BYTES:
            raise TypeError(f"holds a tensor of {value.numel()} numbers")
        return {"tensor": value.flatten().tolist(), "shape": list(value.shape), "dtype": str(value.dtype)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(each) for each in value]}
    if type(value) is dict:
        return {"dict": [[_encode(key), _encode(each)] for key, each in value.items()]}
    raise TypeError(f"holds a {type(value).__name__}")


def _decode(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    match value:
        case {"tensor": list(numbers), "shape": list(shape), "dtype": str(dtype)} if dtype in _DTYPES:
            return _decode_tensor(numbers, shape, _DTYPES[dtype])
        case {"list": list(items)}:
            return [_decode(item) for item in items]
        case {"tuple": list(items)}:
            return tuple(_decode(item) for item in items)
        case {"dict": list(items)} if all(isinstance(item, list) and len(item) == 2 for item in items):
            pairs = [(_decode(key), _decode(each)) for key, each in items]
            if all(isinstance(key, (*_SCALARS, tuple)) for key, _ in pairs):
                return _as_dict(pairs)
    raise MalformedRecordError(f"no value of a logits processor: {str(value)[:100]}")


def _as_dict(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    try:
        return dict(pairs)
    except TypeError as error:
        raise MalformedRecordError(f"a key of a logits processor's values: {error}") from error


def _decode_tensor(numbers: list[Any], shape: list[Any], dtype: torch.dtype) -> torch.Tensor:
    if not all(type(size) is int and 0 <= size <= 2**31 for size in shape) or math.prod(shape) != len(numbers):
        raise MalformedRecordError(f"a tensor of shape {str(shape)[:100]} with {len(numbers)} numbers")
    if not all(type(number) in (bool, int, float) for number in numbers):
        raise MalformedRecordError("a tensor of other values than numbers")
    try:
        return torch.tensor(numbers, dtype=dtype, device="cpu").reshape(shape)
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise MalformedRecordError(f"a tensor that cannot be made: {error}") from error
