"""What `generate` returned on rank 0 of the world, or the error it raised there, on all ranks.

Rank 0 tells the target's other ranks, and the draft's first, which passes it on to the draft's others: a draft that is
given up keeps nobody else waiting.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
import torch.distributed as dist

from ...errors import PearlWorkerError
from ...outputs import PearlGenerateOutput
from .world import broadcast_tensor, broadcast_words

_DTYPES = (torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FAILURE, _SEQUENCES, _DICTIONARY = range(3)


class Audience(NamedTuple):
    """A group in which one rank, by its number in the world, tells the others."""

    group: dist.ProcessGroup
    speaker: int


def share_output(output: torch.Tensor | PearlGenerateOutput, to: Audience) -> None:
    """Tell an output; the statistics stay where they are."""
    if isinstance(output, torch.Tensor):
        broadcast_words([_SEQUENCES], to.speaker, to.group)
        _send(output, to)
        return
    scores, logits = output.scores, output.logits
    num_positions = len(scores or logits or ())
    broadcast_words([_DICTIONARY, num_positions, scores is not None, logits is not None], to.speaker, to.group)
    for tensor in (output.sequences, *(scores or ()), *(logits or ())):
        _send(tensor, to)


def share_error(error: BaseException, to: Audience) -> None:
    """Tell why there is no output."""
    words = [_FAILURE, *f"{type(error).__name__}: {error}".encode(errors="replace")]
    broadcast_words(words, to.speaker, to.group)


def receive_output(source: Audience, passed_on: Audience | None = None) -> torch.Tensor | PearlGenerateOutput:
    """What rank 0 tells, by way of `source`; all of it is told to `passed_on`, too.

    Raises
    ------
    PearlWorkerError
        `generate` raised an error there, or nothing can be heard any more.
    """
    try:
        return _Hearing(source, passed_on).output()
    except PearlWorkerError:
        raise
    except RuntimeError as error:
        raise PearlWorkerError(f"rank 0 does not tell its output, or has given this draft up: {error}") from error


class _Hearing:
    def __init__(self, source: Audience, passed_on: Audience | None) -> None:
        self._source, self._passed_on = source, passed_on

    def output(self) -> torch.Tensor | PearlGenerateOutput:
        kind, *fields = self._words()
        if kind == _FAILURE:
            raise PearlWorkerError(f"`generate` failed on rank 0: {bytes(fields).decode()}")
        sequences = self._tensor()
        if kind == _SEQUENCES:
            return sequences
        num_positions, *flags = fields
        scores, logits = (tuple(self._tensor() for _ in range(num_positions)) if flag else None for flag in flags)
        return PearlGenerateOutput(sequences=sequences, scores=scores, logits=logits)

    def _words(self) -> array[int]:
        words = broadcast_words(None, self._source.speaker, self._source.group)
        if self._passed_on is not None:
            broadcast_words(words, self._passed_on.speaker, self._passed_on.group)
        return words

    def _tensor(self) -> torch.Tensor:
        dtype, *shape = self._words()
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device="cpu")
        broadcast_tensor(tensor, self._source.speaker, self._source.group)
        if self._passed_on is not None:
            broadcast_tensor(tensor, self._passed_on.speaker, self._passed_on.group)
        return tensor


def _send(tensor: torch.Tensor, to: Audience) -> None:
    broadcast_words([_DTYPES.index(tensor.dtype), *tensor.shape], to.speaker, to.group)
    broadcast_tensor(tensor.cpu().contiguous(), to.speaker, to.group)
