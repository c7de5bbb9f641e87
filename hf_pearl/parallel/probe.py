"""Does the paged cache compute what the model computes? Tried once, on models of families that are not tested."""

from __future__ import annotations

import weakref

import torch
from transformers import PreTrainedModel

from ..cache import PagedPrefixCache
from ..cache.support import TESTED_FAMILIES, has_windows, unsupported
from ..decoding.messages import Window
from ..model_devices import input_device
from .lane import ModelLane

NUM_TOKENS = 24
# Share of the largest logit that rounding may change.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_tried: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def check_computed(model: PreTrainedModel) -> None:
    """Raise `PearlUnsupportedModelError` unless short forwards through the paged cache give the model's own logits.

    Models of the families in docs/models.md are known to. Sliding windows are longer than what is tried here, so that
    other families with windows are refused.
    """
    config = model.config.get_text_config()
    if config.model_type in TESTED_FAMILIES or model in _tried:
        return
    kind = f"(model_type {config.model_type!r})"
    if has_windows(config):
        raise unsupported(model, f"whether its sliding windows would be kept is not known {kind}")
    try:
        difference = _difference(model)
    except Exception as error:
        raise unsupported(model, f"a trial failed {kind}: {error!r}") from error
    if not difference <= TOLERANCES.get(model.dtype, 1e-1):
        reason = f"its logits in a trial were off its own forward's by {difference:.1%} of the largest {kind}"
        raise unsupported(model, reason)
    _tried.add(model)


def _difference(model: PreTrainedModel) -> float:
    """The largest difference of a logit, as a share of the largest logit: prefill, then ragged windows."""
    lane = ModelLane(model, PagedPrefixCache(model.config, 16, device=input_device(model)))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, lane.vocab_size, (2, NUM_TOKENS), generator=generator, device="cpu")
    lengths, later = (NUM_TOKENS, NUM_TOKENS // 2), 5
    with lane.ready():
        expected = []
        for row, length in enumerate(lengths):
            lane.admit(row, (), 0)
            expected.append(model(input_ids=rows[row : row + 1, :length].to(lane.device), use_cache=False).logits[0])
        got = []
        for start, end in ((0, -later), (-later, None)):
            parts = [rows[row, :length][start:end].tolist() for row, length in enumerate(lengths)]
            logits = lane.forward([Window(row, tuple(part), len(part)) for row, part in enumerate(parts)])
            got.append(logits.split([len(part) for part in parts]))
    computed = [torch.cat(states) for states in zip(*got, strict=True)]
    largest = max(each.abs().max().item() for each in expected)
    return max((a - b).abs().max().item() for a, b in zip(computed, expected, strict=True)) / max(largest, 1e-6)
