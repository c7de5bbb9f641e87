"""A forward on fixed buffers: what `PagedStep` is for a forward that is captured once and replayed for later steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .kernel_step import KernelStep
from .step_tables import StepTables

if TYPE_CHECKING:
    from .paged_prefix_cache import PagedPrefixCache
    from .step import Attention


class StaticStep:
    """Attention by kernels that follow tables; who fills these decides which step it is.

    Rows of padding get what earlier layers and steps left in the one output of each shape, and store nothing.
    """

    def __init__(self, cache: PagedPrefixCache, tables: StepTables) -> None:
        self._cache = cache
        self._tables = tables
        self._outputs: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Store the new keys and values `(1, K, T, D)`, attend with `query` `(1, H, T, D)`, return `(1, T, H, D)`."""
        layer = self._cache.layers[layer_index]
        self._cache.statistics.computed_layers += 1
        if layer.held is None:
            raise RuntimeError(f"layer {layer_index} has no pools before a captured forward")
        kernels = self._cache.backend.kernels(layer.held)
        if kernels is None:
            raise RuntimeError(f"layer {layer_index} is not read by kernels")
        output = self._output(query, value)
        return KernelStep(kernels, self._tables, output).attend(layer, query, key, value, attention)

    def _output(self, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """What layers of one shape write to, one after the other; zeros, as long as nobody has written there."""
        shape = (1, query.shape[2], query.shape[1], value.shape[3])
        if (shape, query.dtype) not in self._outputs:
            with torch.inference_mode(False):
                self._outputs[shape, query.dtype] = torch.zeros(shape, dtype=query.dtype, device=query.device)
        return self._outputs[shape, query.dtype]
