"""A draft model that stands still, or is slow, while a file says so; importable, so that a worker can load it."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel

SLOW_SECONDS = 0.3


class HangingLlama(LlamaForCausalLM):
    """What the file at `config.trigger` says: "loop", "sleep", "hold" (the interpreter) or "slow" (in every layer)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        while (what := self._told()) in ("loop", "sleep", "hold"):
            if what == "sleep":
                time.sleep(0.05)
            elif what == "hold":
                ctypes.PyDLL(None).usleep(100_000_000)
        if what == "slow":
            for layer in self.model.layers:
                layer.register_forward_pre_hook(lambda *_: time.sleep(SLOW_SECONDS))
        return super().forward(*args, **kwargs)

    def _told(self) -> str:
        try:
            return Path(self.config.trigger).read_text()
        except FileNotFoundError:
            return ""


def make_hanging(draft: PreTrainedModel, trigger: Path) -> PreTrainedModel:
    """The same model, at the mercy of a file."""
    draft.__class__ = HangingLlama
    draft.config.trigger = str(trigger)
    return draft
