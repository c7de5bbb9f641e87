"""Which devices the ranks take that `launch` starts."""

from __future__ import annotations

import torch

from ..device_arguments import device_count
from ..parallel.ranks.world import in_world


def first_devices(device: torch.device, target_tp: int, draft_tp: int) -> tuple[torch.device, torch.device]:
    """The devices of both lanes' first ranks; on GPUs every further rank has the next one.

    Three ranks of the target and one of the draft begin on cuda:0 and cuda:3. Under a launcher each rank knows its own.

    Parameters
    ----------
    device : torch.device
        Where both models go, or the first of their GPUs.
    target_tp, draft_tp : int
        Ranks of each; 0 where there is no draft.

    Raises
    ------
    ValueError
        There are fewer GPUs than ranks.
    """
    if in_world() or device.type == "cpu" or max(target_tp, draft_tp) <= 1:
        return device, device
    first, count = device.index or 0, device_count(device.type)
    if first + target_tp + draft_tp > count:
        raise ValueError(
            f"`target_tp` and `draft_tp` are {target_tp} and {draft_tp}, and every rank needs a GPU of its own: there "
            f"are {max(0, count - first)} from {device.type}:{first} on. Take fewer ranks, or another `device`."
        )
    return torch.device(device.type, first), torch.device(device.type, first + target_tp)
