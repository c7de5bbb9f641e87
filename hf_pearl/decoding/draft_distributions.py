"""The distributions that the draft drew its guesses from, which rejection sampling needs beside the guesses."""

from __future__ import annotations

from typing import Protocol

import torch


class DraftDistributions(Protocol):
    """Where the draft puts the distribution of every guess it draws."""

    def put(self, request_id: int, position: int, token_id: int, q: torch.Tensor) -> None:
        """Keep `q` `(V,)`, float32, that the guess `token_id` at a request's position was drawn from.

        V is the target's vocabulary. What is kept of the position `depth` before it may go.
        """

    def drop(self, request_id: int) -> None:
        """Forget a request."""

    def get(self, request_id: int, position: int, token_id: int) -> torch.Tensor | None:
        """What the guess `token_id` at a request's position was drawn from; None where that is not known."""


class LocalDistributions:
    """Distributions in this process's memory.

    Parameters
    ----------
    depth : int
        How many positions of a request are kept: as many as a line may have guesses.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._kept: dict[int, dict[int, tuple[int, int, torch.Tensor]]] = {}

    def put(self, request_id: int, position: int, token_id: int, q: torch.Tensor) -> None:
        """Keep what a guess was drawn from."""
        self._kept.setdefault(request_id, {})[position % self._depth] = position, token_id, q

    def drop(self, request_id: int) -> None:
        """Forget a request."""
        self._kept.pop(request_id, None)

    def get(self, request_id: int, position: int, token_id: int) -> torch.Tensor | None:
        """What the guess `token_id` at a request's position was drawn from; None where that is not known."""
        kept = self._kept.get(request_id, {}).get(position % self._depth)
        return kept[2] if kept is not None and kept[:2] == (position, token_id) else None
