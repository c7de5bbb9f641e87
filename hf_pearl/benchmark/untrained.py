"""A draft that knows nothing, at a real one's cost: whoever brings it must not pay for it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

SEED = 0


def untrained(draft: PreTrainedModel) -> PreTrainedModel:
    """A model built like `draft`, with random weights: those that its class begins with."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(draft.config, dtype=draft.dtype)
    return model.to(draft.device).eval()
