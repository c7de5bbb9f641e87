"""What the decoding asks of a model on its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from .choosing import Chooser, Chosen
from .messages import Window
from .noise import NoiseRow


class Lane(Protocol):
    """A model on its cache; `parallel.lane.ModelLane` is the real one."""

    @property
    def num_warm_ups(self) -> int:
        """How many forwards took their time for what later ones like them need not do: their times say nothing."""

    def admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> int:
        """Begin a sequence of `max_length` tokens in the end; return how many of them are already in the cache."""

    def fork(self, request_id: int, new_id: int, length: int) -> None:
        """Begin a sequence with the first `length` tokens of another."""

    def length(self, request_id: int) -> int:
        """How many tokens of a sequence are in the cache."""

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute new tokens; return the logits `(sum of num_logits, vocab_size)`."""

    def rollback(self, request_id: int, length: int) -> None:
        """Drop a sequence's tokens from position `length` on."""

    def keep(self, request_id: int, num_first: int, places: Sequence[int]) -> None:
        """Drop a sequence's tokens but the first ones and those at `places`, ascending, which move up."""

    def release(self, request_id: int, verified: Sequence[int]) -> None:
        """End a sequence whose `verified` tokens may be found again."""


@runtime_checkable
class ChainingLane(Lane, Protocol):
    """A lane that may make several draft steps in one launch, each over what was chosen in the one before.

    Attributes
    ----------
    device : torch.device
        Where its logits are.
    """

    device: torch.device

    @property
    def chains(self) -> bool:
        """Whether it ever does."""

    def chain(
        self, windows: Sequence[Window], num_steps: int, chooser: Chooser, noise: Sequence[Sequence[NoiseRow]]
    ) -> Chosen | None:
        """Compute windows, and `num_steps - 1` times the tokens chosen behind each of theirs, each on its own branch.

        Parameters
        ----------
        windows : sequence of Window
            Logits are wanted after each of their tokens.
        noise : sequence
            Of every step the noise of its rows; empty where `chooser` does not sample.

        Returns
        -------
        Chosen or None
            `(num_steps, N, G)`, to be read before the next forward. None: it cannot be done now, and all is as it was.
        """
