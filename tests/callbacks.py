"""What a user may hand to `generate`: processors, criteria and streamers that have a state and keep what they saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class Deliberate(Exception):
    """What a callback raises in a test."""


class CountingProcessor(LogitsProcessor):
    """Favours a token that depends on how often it was called, and on the row; keeps every prefix it was shown.

    One call too many, too few, out of order or on another prefix changes the output or `seen`.
    """

    def __init__(self, strength: float = 2.0) -> None:
        self.strength = strength
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        bias = torch.zeros_like(scores)
        for row in range(len(scores)):
            bias[row, (7 * len(self.seen) + 5 * row + int(input_ids[row, -1])) % scores.shape[1]] = self.strength
        return scores + bias


class SumCriterion(StoppingCriteria):
    """Ends a row where its last two tokens add up to a multiple of `modulus`; keeps every prefix it was shown."""

    def __init__(self, modulus: int) -> None:
        self.modulus = modulus
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        return input_ids[:, -2:].sum(dim=1) % self.modulus == 0


class CallCriterion(StoppingCriteria):
    """Ends the whole batch, with a bare bool, at its `num_calls`-th call."""

    def __init__(self, num_calls: int) -> None:
        self.num_calls = num_calls
        self.seen: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        self.seen.append(input_ids.tolist())
        return len(self.seen) >= self.num_calls


class AllowedTokens:
    """A `prefix_allowed_tokens_fn` with a state: what it allows depends on the row, the prefix and its calls so far."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.seen: list[tuple[int, list[int]]] = []

    def __call__(self, batch_id: int, input_ids: torch.Tensor) -> list[int]:
        self.seen.append((batch_id, input_ids.tolist()))
        odd = (len(self.seen) + batch_id + int(input_ids[-1])) % 2
        return list(range(odd, self.vocab_size, 2))


class RecordingStreamer(BaseStreamer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class Raising:
    """Calls `inner` until its `num_calls`-th call, which raises `error`."""

    def __init__(self, inner: Callable[..., Any], num_calls: int, error: type[BaseException] = Deliberate) -> None:
        self.inner, self.num_calls, self.error = inner, num_calls, error
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.num_calls:
            raise self.error(f"call {self.calls}")
        return self.inner(*args, **kwargs)
