"""What kernels that follow tables take and return: said here once, for all that implement it.

Shapes: `T` packed tokens, `H` query heads, `K` key-value heads, `D` head dimension (that of values may differ), `N`
slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from .step_tables import StepTables

if TYPE_CHECKING:
    from .step import Attention


class Pools(NamedTuple):
    """Keys and values of a layer, `(1, K, N, D)` each, the numbers of a head side by side."""

    keys: torch.Tensor
    values: torch.Tensor


class Kernels(Protocol):
    """A module or an object with these functions.

    Where calls are to be captured in a CUDA graph, none reads a tensor of the device on the host.
    """

    def store(self, key: torch.Tensor, value: torch.Tensor, pools: Pools, tables: StepTables) -> None:
        """Copy new keys and values `(1, K, T, D)` to their tokens' slots.

        Raises
        ------
        ValueError
            Tensors of unequal dtypes, on other devices, of unsupported dtype or head dimension, or more than the tables
            are bounded by.
        """

    def move(self, pools: Sequence[torch.Tensor], source: Sequence[int], target: Sequence[int]) -> None:
        """Copy what slots hold, in pools of one dtype and device, `(1, K, N, D)` each; all is read as it was before.

        Parameters
        ----------
        source, target : sequence of int
            Slots, ascending by the place of their tokens; none is written to by a token behind those it held.
        """

    def paged_attention(
        self,
        query: torch.Tensor,
        pools: Pools,
        tables: StepTables,
        attention: Attention,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the queries `(1, H, T, D)` of a step over what its sequences hold, to `(1, T, H, D)`.

        Parameters
        ----------
        output : torch.Tensor, optional
            Written to instead of a new tensor; rows behind the step's tokens stay as they are.

        Raises
        ------
        ValueError
            As `store`; also if the number of query heads is no multiple of that of key-value heads.
        """
