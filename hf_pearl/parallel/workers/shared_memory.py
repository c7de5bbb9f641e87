"""What engine and draft worker share: anonymous memory, and in it a ring of messages, sequenced records, a timeline.

The engine writes the ring, the worker everything else: each word has one writer and one reader, and nobody locks. A
reader may look at any moment, on any processor: a checksum over contents and sequence number tells what is whole.

| part     | words                          | content                                                  |
|----------|--------------------------------|----------------------------------------------------------|
| control  | 32                             | words consumed (at 0) and produced (at 16) so far;       |
|          |                                | signs of life (at 1 and 2), see `heartbeat`              |
| ring     | `RING_WORDS`                   | frames to the worker, see `RingWriter`                   |
| status   | `record_words(...)`            | a sequenced `Status`                                     |
| error    | `record_words(...)`            | a sequenced call number and text                         |
| timeline | 3 `TIMELINE_LENGTH`            | the last draft steps: start, end (seconds), guesses      |
| trees    | `NUM_SLOTS` `record_words(...)` | a sequenced tree of guesses per request                 |
"""

from __future__ import annotations

import mmap
import time
import zlib
from array import array
from collections import deque

from ...decoding.messages import MAX_TREE_TOKENS
from .records import MAX_OPTIONS_BYTES, MAX_PROMPT_TOKENS, MalformedRecordError

NUM_SLOTS = 1024
RING_WORDS = 2**16
TIMELINE_LENGTH = 4096
STATUS_BYTES = 64
ERROR_BYTES = 4096
TREE_BYTES = 48 + 24 * MAX_TREE_TOKENS
MAX_FRAME_WORDS = 4096
MAX_MESSAGE_WORDS = max(MAX_PROMPT_TOKENS, MAX_OPTIONS_BYTES // 8) + 16

_FRAME_HEAD = 3  # sequence number, 2 * payload words + (1 in a message's last frame), checksum
_RECORD_HEAD = 3  # sequence number, odd while being written; bytes; checksum
_READ_TRIES = 4
_FRAME_PATIENCE = 1.0  # seconds until a frame that does not check out is given up


def record_words(num_bytes: int) -> int:
    """Words that a sequenced record of up to `num_bytes` takes."""
    return _RECORD_HEAD + -(-num_bytes // 8)


class RingWriter:
    """Puts messages into a ring, in frames, as far as there is room; what has to wait stays here, in order.

    So a message may be longer than the ring, and sending never blocks. Example: a message of 5,000 words becomes a
    frame of 4,096 and one of 904 words, the second of which is marked as the last.
    """

    def __init__(self, control: memoryview, ring: memoryview) -> None:
        self._control, self._ring = control, ring
        self._pending: deque[array[int]] = deque()
        self._offset = 0  # words of the first pending message that are in the ring already
        self._num_messages = 0
        self._num_frames = 0
        self._produced = control[16]

    def put(self, words: array[int]) -> int:
        """Queue a message; return its number, counted from 1."""
        self._pending.append(words)
        self._num_messages += 1
        return self._num_messages

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits for room."""
        return not self._pending

    def withdraw(self, first: int) -> bool:
        """Forget the messages from number `first` on of which nothing is in the ring yet; whether that was all."""
        while len(self._pending) > bool(self._offset) and self._num_messages >= first:
            self._pending.pop()
            self._num_messages -= 1
        return self._num_messages < first

    def flush(self) -> bool:
        """Move what fits into the ring; return whether anything moved."""
        before = self._num_frames
        while self._pending:
            message = self._pending[0]
            payload = message[self._offset : self._offset + MAX_FRAME_WORDS]
            room = len(self._ring) - (self._produced - self._control[0])
            if _FRAME_HEAD + len(payload) > room:
                break
            self._offset += len(payload)
            is_last = self._offset == len(message)
            self._write(payload, is_last)
            if is_last:
                self._pending.popleft()
                self._offset = 0
        return self._num_frames > before

    def _write(self, payload: array[int], is_last: bool) -> None:
        self._num_frames += 1
        frame = array("q", (self._num_frames, 2 * len(payload) + is_last, 0))
        frame.extend(payload)
        frame[2] = zlib.crc32(frame)
        start = self._produced % len(self._ring)
        first = min(len(frame), len(self._ring) - start)
        self._ring[start : start + first] = frame[:first]
        self._ring[: len(frame) - first] = frame[first:]
        self._produced += len(frame)
        self._control[16] = self._produced


class RingReader:
    """Takes messages out of a ring."""

    def __init__(self, control: memoryview, ring: memoryview) -> None:
        self._control, self._ring = control, ring
        self._num_frames = 0
        self._consumed = control[0]
        self._message = array("q")

    def get(self) -> array[int] | None:
        """The next whole message; None if there is none yet.

        Raises
        ------
        MalformedRecordError
            What is there is no frame; nothing behind it can be read.
        """
        while self._control[16] != self._consumed:
            frame = self._frame()
            self._consumed += len(frame)
            self._control[0] = self._consumed
            self._num_frames += 1
            self._message.extend(frame[_FRAME_HEAD:])
            if len(self._message) > MAX_MESSAGE_WORDS:
                raise MalformedRecordError(f"a message of more than {MAX_MESSAGE_WORDS} words")
            if frame[1] & 1:
                message, self._message = self._message, array("q")
                return message
        return None

    def _frame(self) -> array[int]:
        """The frame at hand. The count of words may be seen before the words: look again before giving up."""
        deadline = time.perf_counter() + _FRAME_PATIENCE
        while (frame := self._whole_frame()) is None:
            if time.perf_counter() > deadline:
                raise MalformedRecordError(f"frame {self._num_frames + 1} of the ring is damaged")
            time.sleep(0.0001)
        return frame

    def _whole_frame(self) -> array[int] | None:
        available = self._control[16] - self._consumed
        if not _FRAME_HEAD <= available <= len(self._ring):
            return None
        size = _FRAME_HEAD + (self._copy(_FRAME_HEAD)[1] >> 1)
        if not _FRAME_HEAD <= size <= min(available, _FRAME_HEAD + MAX_FRAME_WORDS):
            return None
        frame = self._copy(size)
        checksum, frame[2] = frame[2], 0
        is_whole = frame[0] == self._num_frames + 1 and checksum == zlib.crc32(frame)
        return frame if is_whole else None

    def _copy(self, num_words: int) -> array[int]:
        start = self._consumed % len(self._ring)
        words = array("q", self._ring[start : start + num_words].tobytes())
        words.frombytes(self._ring[: num_words - len(words)].tobytes())
        return words


class SequencedRecord:
    """The last value of something, which one side replaces and the other reads whenever it likes."""

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._content = words[_RECORD_HEAD:].cast("B")
        self._sequence = words[0]
        self._last: tuple[int, bytes] | None = None

    def release(self) -> None:
        """Let go of the memory."""
        self._content.release()
        self._words.release()

    def write(self, content: bytes) -> None:
        """Replace the value."""
        if len(content) > len(self._content):
            raise ValueError(f"a record of {len(content)} bytes where there is room for {len(self._content)}")
        self._words[0] = self._sequence + 1
        self._words[1] = len(content)
        self._content[: len(content)] = content
        self._sequence += 2
        self._words[2] = zlib.crc32(content, self._sequence & 0xFFFFFFFF)
        self._words[0] = self._sequence

    def read(self) -> bytes | None:
        """The last value that could be read whole (the same object until there is another); None before the first."""
        for _ in range(_READ_TRIES):
            sequence, size, checksum = self._words[0], self._words[1], self._words[2]
            if self._last is not None and sequence == self._last[0]:
                break
            if sequence > 0 and sequence % 2 == 0 and 0 <= size <= len(self._content):
                content = bytes(self._content[:size])
                if checksum == zlib.crc32(content, sequence & 0xFFFFFFFF):
                    self._last = (sequence, content)
                    break
        return None if self._last is None else self._last[1]


class Channel:
    """The shared memory of an engine and its draft worker, cut into its parts.

    Parameters
    ----------
    descriptor : int
        An anonymous file of `Channel.NUM_BYTES`; may be closed afterwards.
    """

    _PARTS = (
        ("control", 32),
        ("ring", RING_WORDS),
        ("status", record_words(STATUS_BYTES)),
        ("error", record_words(ERROR_BYTES)),
        ("timeline", 3 * TIMELINE_LENGTH),
        ("trees", NUM_SLOTS * record_words(TREE_BYTES)),
    )
    NUM_BYTES = 8 * sum(size for _, size in _PARTS)

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, self.NUM_BYTES)
        self._words = memoryview(self._map).cast("q")
        parts, start = {}, 0
        for name, size in self._PARTS:
            parts[name] = self._words[start : start + size]
            start += size
        self.control, self.ring = parts["control"], parts["ring"]
        self.timeline = parts["timeline"].cast("B").cast("d")
        self.status, self.error = SequencedRecord(parts["status"]), SequencedRecord(parts["error"])
        parts["timeline"].release()
        self._tree_words = parts["trees"]
        self._trees: dict[int, SequencedRecord] = {}

    def tree(self, slot: int) -> SequencedRecord:
        """The tree in a slot."""
        if slot not in self._trees:
            size = record_words(TREE_BYTES)
            self._trees[slot] = SequencedRecord(self._tree_words[slot * size : (slot + 1) * size])
        return self._trees[slot]

    def close(self) -> None:
        """Give the memory back; no part may be used afterwards."""
        for record in (self.status, self.error, *self._trees.values()):
            record.release()
        for view in (self.timeline, self.control, self.ring, self._tree_words, self._words):
            view.release()
        self._map.close()
