"""What the first rank of a lane tells the others, as 64-bit words; nothing is unpickled, and junk is refused.

A message is a sequence of operations, each `(kind, number of further words, words)`. Example: `Rollback(3, 17)` is
`(4, 2, 3, 17)`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ...cache.backends import BACKENDS
from ...decoding.messages import Branches, Window
from ..workers.records import MalformedRecordError

MAX_WORDS = 2**26  # of a message: 512 MiB


class Begin(NamedTuple):
    """A call begins.

    `version` names what the cache holds: where it is new, the others begin with an empty cache of `num_blocks` blocks,
    which may grow to `max_blocks`. `backend` is a place among the cache's `BACKENDS`. With `compares` every forward
    ends with a comparison of all block tables.
    """

    version: int
    num_blocks: int
    max_blocks: int
    block_size: int
    backend: int
    eight_bit: bool
    prefix_cache: bool
    compares: bool
    salt: str


class Admit(NamedTuple):
    """`ModelLane.admit`, and how many tokens were known: the others must find as many."""

    request_id: int
    max_length: int
    num_known: int
    token_ids: tuple[int, ...]


class Fork(NamedTuple):
    """`ModelLane.fork`."""

    request_id: int
    new_id: int
    length: int


class Rollback(NamedTuple):
    """`ModelLane.rollback`."""

    request_id: int
    length: int


class Keep(NamedTuple):
    """`ModelLane.keep`."""

    request_id: int
    num_first: int
    places: tuple[int, ...]


class Release(NamedTuple):
    """`ModelLane.release`."""

    request_id: int
    verified: tuple[int, ...]


class Forward(NamedTuple):
    """`ModelLane.forward`."""

    windows: tuple[Window, ...]


class End(NamedTuple):
    """The call has ended: every sequence is freed."""


class Leave(NamedTuple):
    """Nothing more is to come."""


Operation = Begin | Admit | Fork | Rollback | Keep | Release | Forward | End | Leave
_KINDS: tuple[type[Operation], ...] = (Begin, Admit, Fork, Rollback, Keep, Release, Forward, End, Leave)


def encode_operations(operations: Sequence[Operation]) -> array[int]:
    """The words of a message."""
    words = array("q")
    for operation in operations:
        fields = array("q", _fields(operation))
        words.extend((_KINDS.index(type(operation)), len(fields)))
        words.extend(fields)
    return words


def _fields(operation: Operation) -> Iterator[int]:
    if isinstance(operation, Forward):
        for window in operation.windows:
            yield from _window_fields(window)
        return
    for value in operation:  # What has no fixed length stands last.
        if isinstance(value, str):
            yield from value.encode("utf-8", "surrogatepass")
        elif isinstance(value, tuple):
            yield from value
        else:
            yield int(value)


def _window_fields(window: Window) -> Iterator[int]:
    yield from (window.request_id, window.num_logits, len(window.token_ids), *window.token_ids)
    yield int(window.branches is not None)
    if window.branches is not None:
        yield window.branches.num_common
        for path in window.branches.paths:
            yield from (len(path), *path)


def decode_operations(words: Sequence[int]) -> list[Operation]:
    """The operations of a message.

    Raises
    ------
    MalformedRecordError
        The words are no such message.
    """
    operations: list[Operation] = []
    reader = _Reader(words)
    while reader.num_left:
        kind, fields = reader.one(), _Reader(reader.several())
        if not 0 <= kind < len(_KINDS):
            raise MalformedRecordError(f"an operation of the kind {kind}, there are {len(_KINDS)}")
        operations.append(_DECODERS[_KINDS[kind]](fields))
        if fields.num_left:
            raise MalformedRecordError(f"{fields.num_left} words too many behind a {_KINDS[kind].__name__}")
    return operations


class _Reader:
    """Takes words off the front of a message, which must have as many."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words, self._place = words, 0

    @property
    def num_left(self) -> int:
        return len(self._words) - self._place

    def take(self, count: int) -> tuple[int, ...]:
        if not 0 <= count <= self.num_left:
            raise MalformedRecordError(f"{count} words were announced, {self.num_left} are left")
        self._place += count
        return tuple(self._words[self._place - count : self._place])

    def one(self) -> int:
        return self.take(1)[0]

    def several(self) -> tuple[int, ...]:
        return self.take(self.one())

    def rest(self) -> tuple[int, ...]:
        return self.take(self.num_left)

    def below(self, limit: int) -> int:
        word = self.one()
        if not 0 <= word < limit:
            raise MalformedRecordError(f"{word} where a number below {limit} belongs")
        return word

    def flag(self) -> bool:
        return bool(self.below(2))

    def text(self) -> str:
        try:
            return bytes(self.rest()).decode("utf-8", "surrogatepass")
        except ValueError as error:
            raise MalformedRecordError(f"words that are no text: {error}") from error

    def windows(self) -> tuple[Window, ...]:
        windows = []
        while self.num_left:
            request_id, num_logits, token_ids = self.one(), self.one(), self.several()
            if not 0 <= num_logits <= len(token_ids):
                raise MalformedRecordError(f"{num_logits} logits of a window of {len(token_ids)} tokens")
            branches = None
            if self.flag():
                branches = Branches(self.one(), tuple(self.several() for _ in token_ids))
            windows.append(Window(request_id, token_ids, num_logits, branches))
        return tuple(windows)


_DECODERS: dict[type[Operation], Callable[[_Reader], Operation]] = {
    Begin: lambda r: Begin(
        r.one(), r.one(), r.one(), r.one(), r.below(len(BACKENDS)), r.flag(), r.flag(), r.flag(), r.text()
    ),
    Admit: lambda r: Admit(r.one(), r.one(), r.one(), r.rest()),
    Fork: lambda r: Fork(r.one(), r.one(), r.one()),
    Rollback: lambda r: Rollback(r.one(), r.one()),
    Keep: lambda r: Keep(r.one(), r.one(), r.rest()),
    Release: lambda r: Release(r.one(), r.rest()),
    Forward: lambda r: Forward(r.windows()),
    End: lambda r: End(),
    Leave: lambda r: Leave(),
}
