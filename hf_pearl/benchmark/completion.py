"""What is to be generated, and one timed call that generates it."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..decoding.stats import PearlStats
from ..device_guard import synchronize
from .methods import Setting

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """What is to be generated: prompts `(1, length)`, `batch_size` of them per call; greedy where `temperature` is 0.

    The target must know `pearl` (`hf_pearl.enable`).
    """

    target: PreTrainedModel
    draft: PreTrainedModel
    prompts: tuple[torch.Tensor, ...]
    max_new_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 1

    @property
    def batches(self) -> tuple[Batch, ...]:
        """The prompts of every call."""
        starts = range(0, len(self.prompts), self.batch_size)
        return tuple(self.prompts[start : start + self.batch_size] for start in starts)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ids = self.target.generation_config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or ())

    def as_dict(self) -> dict[str, Any]:
        """All of it but the models and the texts, for a JSON file."""
        return {
            "num_prompts": len(self.prompts),
            "batch_size": self.batch_size,
            "prompt_tokens": [prompt.shape[1] for prompt in self.prompts],
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "device": str(self.target.device),
        }

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The arguments of `generate` that all methods share; what is not said in any is the model's default."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        return {**left_padded(batch), "max_new_tokens": self.max_new_tokens, **sampling}


def left_padded(batch: Batch) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(batch, longest length)`; what stands in the padding is masked."""
    longest = max(prompt.shape[1] for prompt in batch)

    def padded(rows: Batch) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])

    return {"input_ids": padded(batch), "attention_mask": padded(tuple(torch.ones_like(prompt) for prompt in batch))}


class Completion(NamedTuple):
    """One call: each row's tokens after its prompt, to its own end, wall time, and what is known of target forwards."""

    rows: tuple[tuple[int, ...], ...]
    seconds: float
    num_target_forwards: int
    stats: PearlStats | None

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return sum(map(len, self.rows))


def complete(workload: Workload, setting: Setting, batch: Batch, streamer: Any = None) -> Completion:
    """One call of `generate`, timed, prompts included."""
    arguments = workload.arguments(batch) | dict(setting.arguments)
    if streamer is not None:
        arguments["streamer"] = streamer
    # Said also where it is the default: a target of `launch` has others, and a model's own config may have.
    pearl = setting.pearl is not None and replace(setting.pearl, seed=workload.seed)
    arguments |= {"assistant_model": workload.draft if setting.uses_draft else None, "pearl": pearl}
    arguments |= {"return_dict_in_generate": setting.pearl is not None}
    torch.manual_seed(workload.seed)
    with (
        _threads(setting.num_threads),
        _assistant(workload.draft, setting.assistant),
        _counted(workload.target, setting.pearl is None) as forwards,
    ):
        synchronize(batch[0].device)
        started = time.perf_counter()
        output = workload.target.generate(**arguments)
        synchronize(batch[0].device)
        seconds = time.perf_counter() - started
    stats = None if setting.pearl is None else output.pearl
    sequences = output if setting.pearl is None else output.sequences
    generated = sequences[:, arguments["input_ids"].shape[1] :].tolist()
    rows = tuple(_to_its_end(row, workload.end_ids) for row in generated)
    return Completion(rows, seconds, forwards[0] if stats is None else stats.target_forwards, stats)


def _to_its_end(row: list[int], end_ids: frozenset[int]) -> tuple[int, ...]:
    """A row without the padding behind its first end-of-text token."""
    ends = (place for place, token_id in enumerate(row, start=1) if token_id in end_ids)
    return tuple(row[: next(ends, len(row))])


@contextmanager
def _threads(num_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _assistant(draft: PreTrainedModel, fields: Mapping[str, Any]) -> Iterator[None]:
    """Give the draft's generation config `fields`; assisted generation may write to it, so that it is put back."""
    before = draft.generation_config
    draft.generation_config = copy.deepcopy(before)
    for name, value in fields.items():
        setattr(draft.generation_config, name, value)
    try:
        yield
    finally:
        draft.generation_config = before


@contextmanager
def _counted(model: PreTrainedModel, wanted: bool) -> Iterator[list[int]]:
    """Count a model's forwards, in a list of one number (a hook costs microseconds)."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(add) if wanted else None
    try:
        yield count
    finally:
        if handle is not None:
            handle.remove()
