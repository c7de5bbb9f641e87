"""What a call asks of its tokens: processors, stopping rules, and what to hand back."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from transformers import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from .processors import is_of_row, is_of_scores


@dataclass(frozen=True)
class Rules:
    """Processors and stopping criteria of a call, as transformers built them.

    Attributes
    ----------
    pad_token_id : int or None
        What finished rows are filled with.
    max_length : int
        Length, padding included, at which every row ends: `length_limit` of the criteria.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    do_sample: bool
    max_length: int
    pad_token_id: int | None = None
    output_scores: bool = False
    output_logits: bool = False
    streamer: Any = None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a row."""
        ids = (criterion.eos_token_id for criterion in self.criteria if type(criterion) is EosTokenCriteria)
        return frozenset(token_id for tensor in ids for token_id in tensor.flatten().tolist())

    @property
    def pads_finished_rows(self) -> bool:
        """Whether transformers fills finished rows with padding: only where a criterion knows end-of-text tokens."""
        return any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)

    @property
    def is_of_scores(self) -> bool:
        """Whether all positions of a window may be processed and judged at once."""
        return all(is_of_scores(processor) for processor in self.processors) and self.ends_by_last_token

    @property
    def ends_by_last_token(self) -> bool:
        """Whether criteria read no more than a row's last token and its length."""
        return all(type(criterion) in (EosTokenCriteria, MaxLengthCriteria) for criterion in self.criteria)

    @property
    def is_of_row(self) -> bool:
        """Whether rows may run ahead of each other: nothing sees the batch as a whole or depends on time."""
        knows_rows = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)
        return (
            self.streamer is None
            and all(is_of_row(processor) for processor in self.processors)
            and all(type(criterion) in knows_rows for criterion in self.criteria)
            and (self.pads_finished_rows or all(type(c) is MaxLengthCriteria for c in self.criteria))
        )


def length_limit(criteria: StoppingCriteriaList) -> int:
    """Length, padding included, at which criteria end every row.

    It need not be the config's: in a merged list a user's `MaxLengthCriteria` stands in the place of transformers' own.

    Raises
    ------
    TypeError
        A limit is no whole number.
    """
    limits = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
    try:
        return min(map(operator.index, limits))
    except TypeError:  # NaN would never be reached.
        seen = ", ".join(map(repr, limits))
        raise TypeError(
            f"`max_length`, or what `max_new_tokens` makes of it or a `MaxLengthCriteria` says, is {seen}. Pass an int."
        ) from None
