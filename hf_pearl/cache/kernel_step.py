"""One forward whose layers read and write the paged cache by kernels that follow tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .kernel_interface import Kernels, Pools
from .step_tables import StepTables

if TYPE_CHECKING:
    from .paged_layer import PagedLayer
    from .step import Attention


class KernelStep:
    """Attention of a step whose tables are filled.

    Nothing here depends on the step but what lies in the tables: a forward that is captured with it may be replayed
    when they were filled for another step. `output`, if given, is what every layer writes to, one after the other.
    """

    def __init__(self, kernels: Kernels, tables: StepTables, output: torch.Tensor | None = None) -> None:
        self._kernels = kernels
        self._tables = tables
        self._output = output

    def attend(
        self, layer: PagedLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """Store the new keys and values `(1, K, T, D)`, attend with `query` `(1, H, T, D)`, return `(1, T, H, D)`."""
        assert layer.pools is not None
        pools = Pools(*(pool.data for pool in layer.pools))
        self._kernels.store(key, value, pools, self._tables)
        return self._kernels.paged_attention(query, pools, self._tables, attention, self._output)
