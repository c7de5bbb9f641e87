"""Which logits processors of transformers may run how: on which rows, with which ids, on which lane."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

# Functions of the scores alone: any rows, at once, without ids.
_OF_SCORES = (
    "TemperatureLogitsWarper",
    "TopPLogitsWarper",
    "TopKLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)
# Functions of one row's ids and scores: any row on its own, in any order.
_OF_ROW = (
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor",
)


def _classes(names: tuple[str, ...]) -> frozenset[type]:
    return frozenset(getattr(logits_process, name) for name in names if hasattr(logits_process, name))


_OF_SCORES_CLASSES = _classes(_OF_SCORES)
_OF_ROW_CLASSES = _classes(_OF_ROW)


def stateless_classes() -> dict[str, type]:
    """By name, the processors of transformers that keep nothing from one call to the next."""
    return {kind.__name__: kind for kind in _OF_SCORES_CLASSES | _OF_ROW_CLASSES}


def is_of_scores(processor: LogitsProcessor) -> bool:
    """Whether a processor reads the scores alone (a subclass may do anything, so it does not count)."""
    return type(processor) in _OF_SCORES_CLASSES


def is_of_row(processor: LogitsProcessor) -> bool:
    """Whether a processor treats every row on its own and keeps nothing from one call to the next."""
    if type(processor) in _OF_SCORES_CLASSES:
        return True
    # A repetition penalty that ignores the prompts holds one prompt length per row of the batch.
    return type(processor) in _OF_ROW_CLASSES and getattr(processor, "prompt_ignore_length", None) is None


def draft_processors(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors that also shape the draft's guesses: those that keep nothing between calls.

    A user's own processor is left out: it may count its calls, and a guess is not an emitted token. Acceptance may
    fall, the output cannot.
    """
    return LogitsProcessorList([processor for processor in processors if is_of_row(processor)])


def copies_on(device: torch.device, processors: LogitsProcessorList) -> LogitsProcessorList:
    """Copies for the draft, their tensors on its device.

    Some make their tensors at their first call (`SequenceBiasLogitsProcessor`). Two threads that share one would then
    each see it half made.
    """
    copies = [copy.copy(processor) for processor in processors]
    for each in copies:
        vars(each).update({name: _on(device, value) for name, value in vars(each).items()})
    return LogitsProcessorList(copies)


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if type(value) is dict:
        return {key: _on(device, each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on(device, each) for each in value)
    return value
