"""How the draft lane of a call may run, and what speaks against it."""

from __future__ import annotations

from typing import Literal

from transformers import PreTrainedModel

from ...config import PearlConfig
from ...model_devices import input_device, share_hooks
from ..cores import available_cores
from ..ranks.models import rank_model_of

Execution = Literal["inline", "threads", "processes"]


def best_execution(config: PearlConfig, draft: PreTrainedModel) -> Execution:
    """What is fastest for this draft if it can be had: measured, docs/benchmarks.md, "From lane to lane"."""
    if rank_model_of(draft) is not None:
        return "processes"
    if input_device(draft).type != "cpu":
        return "threads"
    if not config.overlap or len(available_cores()) == 1:
        return "inline"  # The lanes take turns anyway.
    return "processes"


def for_hooks(execution: Execution, config: PearlConfig, target: PreTrainedModel, draft: PreTrainedModel) -> Execution:
    """`execution`, or "inline" where both models pass through the same hooks of accelerate, which serve one thread."""
    if execution != "threads" or not share_hooks(target, draft):
        return execution
    if config.execution == "threads":
        raise ValueError(
            '`execution="threads"` cannot run a draft that shares modules with its target which accelerate has '
            'dispatched: their hooks load weights for one thread at a time. Use `execution="inline"` or "auto".'
        )
    return "inline"
