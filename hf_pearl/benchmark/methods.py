"""The five ways of decoding that are compared, their settings, and one timed call of any of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..config import PearlConfig
from ..decoding.stats import PearlStats

METHODS = ("generate", "assisted", "engine", "speculative", "pearl")
OURS = METHODS[2:]
ASSISTED_LENGTHS = (3, 5, 8)
SPECULATIVE_LENGTHS = (2, 3, 4, 6)


@dataclass(frozen=True)
class Workload:
    """What is to be generated, one prompt `(1, length)` after the other; greedy where `temperature` is 0.

    The target must know `pearl` (`hf_pearl.enable`).
    """

    target: PreTrainedModel
    draft: PreTrainedModel
    prompts: tuple[torch.Tensor, ...]
    max_new_tokens: int = 100
    temperature: float = 0.0
    seed: int = 0

    def arguments(self, prompt: torch.Tensor) -> dict[str, Any]:
        """The arguments of `generate` that all methods share."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        mask = torch.ones_like(prompt)
        return {"input_ids": prompt, "attention_mask": mask, "max_new_tokens": self.max_new_tokens, **sampling}


@dataclass(frozen=True)
class Setting:
    """One way to run a method.

    Attributes
    ----------
    pearl : PearlConfig or None
        None: transformers' own `generate`.
    assistant : mapping
        Fields of the draft's generation config (assisted generation).
    num_threads : int
        Intra-op threads of this process.
    """

    method: str
    pearl: PearlConfig | None = None
    assistant: Mapping[str, Any] = field(default_factory=dict)
    num_threads: int = field(default_factory=torch.get_num_threads)

    @property
    def uses_draft(self) -> bool:
        """Whether the draft takes part."""
        return self.method not in ("generate", "engine")

    def describe(self) -> dict[str, Any]:
        """What differs between the settings of one method."""
        described: dict[str, Any] = {"num_threads": self.num_threads, **self.assistant}
        if self.pearl is not None and self.uses_draft:
            described["draft_length"] = self.pearl.draft_length
        return described


class Completion(NamedTuple):
    """One call's tokens after the prompt, its wall time, and what is known of its target forwards."""

    token_ids: tuple[int, ...]
    seconds: float
    num_target_forwards: int
    stats: PearlStats | None


def settings(method: str) -> list[Setting]:
    """The settings of a method that are worth a trial, its default first.

    Nothing is kept between the calls of our engine: transformers computes every prompt anew, too.
    """
    if method == "assisted":
        constant = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
        fixed = [{"num_assistant_tokens": length, **constant} for length in ASSISTED_LENGTHS]
        return [Setting(method), *(Setting(method, assistant=fields) for fields in fixed)]
    if method == "speculative":
        # Lanes that take turns need no second thread: handing over would only cost time.
        config = PearlConfig(overlap=False, execution="inline", prefix_cache=False)
        return [Setting(method, config)] + [
            Setting(method, replace(config, draft_length=length)) for length in SPECULATIVE_LENGTHS
        ]
    return [Setting(method, None if method == "generate" else PearlConfig(prefix_cache=False))]


def thread_counts(device: torch.device) -> list[int]:
    """Numbers of intra-op threads worth a trial: powers of two up to torch's own choice (cores, OMP_NUM_THREADS)."""
    most = torch.get_num_threads()
    return sorted({most, *(2**i for i in range(most.bit_length()))}) if device.type == "cpu" else [most]


def complete(workload: Workload, setting: Setting, prompt: torch.Tensor, streamer: Any = None) -> Completion:
    """One call of `generate`, timed, prompt included."""
    arguments = workload.arguments(prompt) | ({} if streamer is None else {"streamer": streamer})
    if setting.uses_draft:
        arguments["assistant_model"] = workload.draft
    if setting.pearl is not None:
        arguments |= {"pearl": replace(setting.pearl, seed=workload.seed), "return_dict_in_generate": True}
    torch.manual_seed(workload.seed)
    with (
        _threads(setting.num_threads),
        _assistant(workload.draft, setting.assistant),
        _counted(workload.target, setting.pearl is None) as forwards,
    ):
        _synchronize(prompt.device)
        started = time.perf_counter()
        output = workload.target.generate(**arguments)
        _synchronize(prompt.device)
        seconds = time.perf_counter() - started
    stats = None if setting.pearl is None else output.pearl
    sequence = output if setting.pearl is None else output.sequences
    token_ids = tuple(sequence[0, prompt.shape[1] :].tolist())
    return Completion(token_ids, seconds, forwards[0] if stats is None else stats.target_forwards, stats)


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
