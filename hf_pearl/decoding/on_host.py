"""What the host has to know of a step, in one copy: each waits for all that the device still has to do."""

from __future__ import annotations

from typing import Any

import torch


def on_host(numbers: torch.Tensor, token_ids: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Numbers, as float32 where they are not in main memory, and token ids, of one shape, as lists."""
    if numbers.device.type == "cpu":
        return numbers.tolist(), token_ids.tolist()
    return in_one_copy(numbers, token_ids)


def in_one_copy(numbers: torch.Tensor, token_ids: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """The same, wherever they lie. A user's processor may have made float64 or bfloat16 of the scores."""
    bits, ids = torch.stack([numbers.float().view(torch.int32).long(), token_ids]).cpu()
    return bits.int().view(torch.float32).tolist(), ids.tolist()
