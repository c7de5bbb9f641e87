"""How the distributions of the draft's guesses reach the engine from its process: records in an anonymous file.

The draft writes them with `pwrite`, the engine reads them with `pread`: the file is as large as a call has made it, and
neither side maps memory that the other could take away. Of every slot of the shared memory it holds the last `depth`
positions, each in its place, `slot * depth + position % depth`:

| bytes | content                                                         |
|-------|-----------------------------------------------------------------|
| 40    | call, request, position, token id, checksum: 64-bit words       |
| 4 V   | the distribution over the target's V tokens, 32-bit floats      |
"""

from __future__ import annotations

import os
import struct
import zlib

import torch

from .records import MalformedRecordError
from .shared_memory import NUM_SLOTS

_HEAD = struct.Struct("<5q")
_TOLERANCE = 1e-3  # of the sum of a distribution, in float32 over a large vocabulary


class SharedDistributions:
    """The distributions of one call, as the draft's process writes them and as the engine reads them.

    Parameters
    ----------
    descriptor : int
        An anonymous file, which stays the caller's.
    call : int
        Number of the call.
    vocab_size : int
        Of the target.
    depth : int
        How many positions of a request are kept: as many as a line may have guesses.
    """

    def __init__(self, descriptor: int, call: int, vocab_size: int, depth: int) -> None:
        self._descriptor, self._call, self._depth = descriptor, call, depth
        self._vocab_size = vocab_size
        self._num_bytes = _HEAD.size + 4 * vocab_size

    def put(self, request_id: int, position: int, token_id: int, q: torch.Tensor) -> None:
        """Write what a guess was drawn from."""
        content = q.float().cpu().contiguous().numpy().tobytes()
        head = (self._call, request_id, position, token_id)
        record = _HEAD.pack(*head, _checksum(head, content)) + content
        if os.pwrite(self._descriptor, record, self._place(request_id, position)) != len(record):
            raise OSError(f"{len(record)} bytes of a draft distribution could not be written to shared memory")

    def drop(self, request_id: int) -> None:
        """Nothing to do: another request takes the slot."""

    def clear(self) -> None:
        """Give all memory back."""
        os.ftruncate(self._descriptor, 0)

    def get(self, request_id: int, position: int, token_id: int) -> torch.Tensor | None:
        """What the guess `token_id` at a request's position was drawn from, checked; None where that is not there.

        Raises
        ------
        MalformedRecordError
            What is there is no distribution.
        """
        record = os.pread(self._descriptor, self._num_bytes, self._place(request_id, position))
        if len(record) < self._num_bytes:
            return None
        *head, checksum = _HEAD.unpack_from(record)
        content = record[_HEAD.size :]
        if head != [self._call, request_id, position, token_id] or checksum != _checksum(tuple(head), content):
            return None
        q = torch.frombuffer(bytearray(content), dtype=torch.float32)  # NaN compares as false
        total = float(q.sum())
        if not bool((q >= 0).all()) or not (abs(total - 1.0) < _TOLERANCE or total == 0.0):
            raise MalformedRecordError(f"a draft distribution over {self._vocab_size} tokens with the sum {total}")
        return q

    def _place(self, request_id: int, position: int) -> int:
        return (request_id % NUM_SLOTS * self._depth + position % self._depth) * self._num_bytes


def _checksum(head: tuple[int, ...], content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<4q", *head)))
