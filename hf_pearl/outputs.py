"""What `generate(..., pearl=True, return_dict_in_generate=True)` returns."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.generation import GenerateDecoderOnlyOutput

from .decoding.stats import PearlStats


@dataclass
class PearlGenerateOutput(GenerateDecoderOnlyOutput):
    """transformers' own output with one more field.

    Attributes
    ----------
    pearl : PearlStats
        Counts and times of the call.
    """

    pearl: PearlStats | None = None
