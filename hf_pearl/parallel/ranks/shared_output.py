"""What `generate` returned on rank 0 of the world, or the error it raised there, on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ...errors import PearlWorkerError
from ...outputs import PearlGenerateOutput
from .world import broadcast_words

_DTYPES = (torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FAILURE, _SEQUENCES, _DICTIONARY = range(3)


def share_output(output: torch.Tensor | PearlGenerateOutput, group: dist.ProcessGroup) -> None:
    """Send an output from rank 0; the statistics stay there."""
    if isinstance(output, torch.Tensor):
        broadcast_words([_SEQUENCES], 0, group)
        _send(output, group)
        return
    scores, logits = output.scores, output.logits
    num_positions = len(scores or logits or ())
    broadcast_words([_DICTIONARY, num_positions, scores is not None, logits is not None], 0, group)
    for tensor in (output.sequences, *(scores or ()), *(logits or ())):
        _send(tensor, group)


def share_error(error: BaseException, group: dist.ProcessGroup) -> None:
    """Send from rank 0 why there is no output."""
    broadcast_words([_FAILURE, *f"{type(error).__name__}: {error}".encode(errors="replace")], 0, group)


def receive_output(group: dist.ProcessGroup) -> torch.Tensor | PearlGenerateOutput:
    """What rank 0 sends.

    Raises
    ------
    PearlWorkerError
        `generate` raised an error there.
    """
    kind, *fields = broadcast_words(None, 0, group)
    if kind == _FAILURE:
        raise PearlWorkerError(f"`generate` failed on rank 0: {bytes(fields).decode()}")
    sequences = _receive(group)
    if kind == _SEQUENCES:
        return sequences
    num_positions, *flags = fields
    scores, logits = (tuple(_receive(group) for _ in range(num_positions)) if flag else None for flag in flags)
    return PearlGenerateOutput(sequences=sequences, scores=scores, logits=logits)


def _send(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    broadcast_words([_DTYPES.index(tensor.dtype), *tensor.shape], 0, group)
    dist.broadcast(tensor.cpu().contiguous(), 0, group)


def _receive(group: dist.ProcessGroup) -> torch.Tensor:
    dtype, *shape = broadcast_words(None, 0, group)
    tensor = torch.empty(shape, dtype=_DTYPES[dtype])
    dist.broadcast(tensor, 0, group)
    return tensor
