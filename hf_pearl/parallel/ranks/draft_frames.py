"""A draft lane's news as 64-bit words: what it writes to shared memory on one host, and sends to another."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from ..workers.records import MalformedRecordError
from ..workers.shared_memory import ERROR_BYTES, NUM_SLOTS, STATUS_BYTES, TIMELINE_LENGTH, TREE_BYTES, Channel


class Kind(IntEnum):
    """What a part replaces."""

    STATUS = 1
    ERROR = 2
    TREE = 3
    TIME = 4


_MOST_BYTES = {Kind.STATUS: STATUS_BYTES, Kind.ERROR: ERROR_BYTES, Kind.TREE: TREE_BYTES, Kind.TIME: 8}
_NUM_PLACES = {Kind.STATUS: 1, Kind.ERROR: 1, Kind.TREE: NUM_SLOTS, Kind.TIME: 3 * TIMELINE_LENGTH}


class Part(NamedTuple):
    """A new value of a channel's: of which kind, in which place, and its bytes."""

    kind: Kind
    place: int
    content: bytes

    def store(self, channel: Channel) -> None:
        """Write it where a worker on this host would have."""
        if self.kind is Kind.TIME:
            (channel.timeline[self.place],) = struct.unpack("<d", self.content)
        elif self.kind is Kind.TREE:
            channel.tree(self.place).write(self.content)
        else:
            (channel.status if self.kind is Kind.STATUS else channel.error).write(self.content)


class _Record(NamedTuple):
    parts: list[Part]
    kind: Kind
    place: int

    def write(self, content: bytes) -> None:
        self.parts.append(Part(self.kind, self.place, content))


class _Timeline(NamedTuple):
    parts: list[Part]

    def __setitem__(self, place: int, value: float) -> None:
        self.parts.append(Part(Kind.TIME, place, struct.pack("<d", value)))


class News:
    """Written to as a `Channel` is, by a draft lane; `take` tells what is new."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self.status, self.error = _Record(self._parts, Kind.STATUS, 0), _Record(self._parts, Kind.ERROR, 0)
        self.timeline = _Timeline(self._parts)

    def tree(self, slot: int) -> _Record:
        """The tree in a slot."""
        return _Record(self._parts, Kind.TREE, slot)

    def take(self) -> array[int]:
        """All that is new since the last time: per part kind, place, bytes, and these in words."""
        words = array("q")
        for kind, place, content in self._parts:
            words.extend((kind, place, len(content)))
            words.frombytes(content.ljust(-(-len(content) // 8) * 8, b"\0"))
        self._parts.clear()
        return words


def unpack(words: Sequence[int]) -> Iterator[Part]:
    """The parts of what `News.take` returned.

    Raises
    ------
    MalformedRecordError
        The words are nothing of the kind.
    """
    start = 0
    while start < len(words):
        if len(words) - start < 3 or words[start] not in _MOST_BYTES:
            raise MalformedRecordError("a part of a draft's news that is none")
        kind, place, num_bytes = Kind(words[start]), words[start + 1], words[start + 2]
        start, end = start + 3, start + 3 - (-num_bytes // 8)
        is_whole = num_bytes == 8 if kind is Kind.TIME else 0 <= num_bytes <= _MOST_BYTES[kind]
        if not (0 <= place < _NUM_PLACES[kind] and is_whole and end <= len(words)):
            raise MalformedRecordError(f"{num_bytes} bytes at place {place} of a draft's {kind.name}")
        yield Part(kind, place, array("q", words[start:end]).tobytes()[:num_bytes])
        start = end
