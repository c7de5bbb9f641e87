"""Moving what slots hold, in all layers: what a verdict keeps of a tree moves up to where the verified text ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .backends import Backend
from .paged_layer import Held, PagedLayer


def move_slots(layers: Sequence[PagedLayer], backend: Backend, source: Sequence[int], target: Sequence[int]) -> None:
    """Copy what the slots `source` hold to `target`, see `Kernels.move`: at once where kernels read, else by layer."""
    alike: dict[Held, list[PagedLayer]] = {}
    for layer in layers:
        if layer.held is not None:  # Else no forward has come that far.
            alike.setdefault(layer.held, []).append(layer)
    for held, group in alike.items():
        kernels = backend.kernels(held)
        if kernels is not None:
            kernels.move([pool.data for layer in group for pool in layer.pools or ()], source, target)
            continue
        slots = torch.tensor([source, target], device="cpu").to(held.device).unbind()
        for layer in group:
            layer.copy(*slots)
