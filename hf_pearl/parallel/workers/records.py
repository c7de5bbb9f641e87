"""What engine and draft worker say to each other, in fixed layouts; every number is checked on both sides.

To the worker: arrays of 64-bit words, the first of which names the kind. From it: structures of 64-bit fields. Nothing
is ever unpickled, and what does not fit its layout exactly is refused.
"""

from __future__ import annotations

import json
import math
import operator
import struct
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...cache.backends import BACKENDS
from ...decoding.messages import MAX_TREE_TOKENS, Admission, Grant, Removal, Rest, TokenTree, Verdict
from ...errors import PearlWorkerError

MAX_TOKEN_ID = 2**31 - 1
MAX_COUNT = 2**40
MAX_PROMPT_TOKENS = 2**22
MAX_VERDICT_TOKENS = 2**16
MAX_OPTIONS_BYTES = 2**20

_ADMISSION, _VERDICT, _REMOVAL, _GRANT, _BEGIN_CALL, _END_CALL, _CLEAR, _QUIT, _REST = range(1, 10)
_WORD_MASK = 2**32 - 1
_TREE_HEAD = struct.Struct("<6q")
_STATUS = struct.Struct("<qqqqqqd")


class MalformedRecordError(PearlWorkerError):
    """A record that does not fit its layout."""


class CallOptions(NamedTuple):
    """How a call drafts. `processors` are specifications as `processor_specs.encode_processors` makes them.

    `keeps_distributions` says whether the engine wants to know what every sampled guess was drawn from.
    """

    vocab_size: int
    pad_token_id: int
    free_running: bool
    prefix_cache: bool
    cache_salt: str
    eight_bit_cache: bool
    attention: str
    max_line: int
    max_width: int
    num_blocks: int
    keeps_distributions: bool
    captures: bool
    compiles: bool
    processors: list[dict[str, Any]]


class BeginCall(NamedTuple):
    """A call begins. To the draft."""

    number: int
    options: CallOptions


class EndCall(NamedTuple):
    """A call has ended, in whatever state. To the draft."""

    number: int


class Clear(NamedTuple):
    """Forget every cached prefix: the weights have changed, or the user says so. To the draft, between calls."""


class Quit(NamedTuple):
    """End. To the draft."""


class Status(NamedTuple):
    """How far the worker is. `call` is the last it began (0: none), `is_finished` whether it has left it again.

    `num_timed` steps are in the timeline; the other counts are those of `DraftReport`. `step_seconds` is 0.0 while
    unknown.
    """

    call: int
    is_finished: bool
    num_steps: int
    num_timed: int
    num_drafted: int
    num_prefilled: int
    step_seconds: float


Message = Admission | Verdict | Removal | Grant | Rest | BeginCall | EndCall | Clear | Quit


def encode_message(message: Message) -> array[int]:
    """The words of a message.

    Raises
    ------
    MalformedRecordError
        A number is out of range.
    """
    token_ids: Sequence[int] = ()
    match message:
        case Admission(request_id, token_ids, max_length, num_padding, seed):
            low, high = (0, 0) if seed is None else (seed & _WORD_MASK, seed >> 32)
            head = [_ADMISSION, request_id, max_length, num_padding, seed is not None, low, high, len(token_ids)]
        case Verdict(request_id, number, token_ids):
            head = [_VERDICT, request_id, number, len(token_ids)]
        case Removal(number):
            head = [_REMOVAL, number]
        case Grant(number):
            head = [_GRANT, number]
        case Rest(is_resting):
            head = [_REST, is_resting]
        case BeginCall(number, options):
            content = json.dumps(options._asdict()).encode()
            token_ids = array("q", content.ljust(-(-len(content) // 8) * 8))
            head = [_BEGIN_CALL, number, len(content)]
        case EndCall(number):
            head = [_END_CALL, number]
        case _:
            head = [_CLEAR if isinstance(message, Clear) else _QUIT]
    try:
        words = array("q", head)
        words.extend(token_ids)
    except (OverflowError, TypeError) as error:
        raise MalformedRecordError(f"a number does not fit 64 bits: {error}") from error
    decode_message(words)
    return words


def decode_message(words: Sequence[int]) -> Message:
    """The message that `words` hold, checked.

    Raises
    ------
    MalformedRecordError
        They hold none.
    """
    if not words:
        raise MalformedRecordError("an empty record")
    kind, sizes = words[0], {_REMOVAL: 2, _GRANT: 2, _END_CALL: 2, _CLEAR: 1, _QUIT: 1}
    if kind in sizes:
        _check("words of a record", len(words), sizes[kind], sizes[kind])
        number = _check("number", words[1], 0, MAX_COUNT) if sizes[kind] == 2 else 0
        simple: dict[int, Message] = {
            _REMOVAL: Removal(number),
            _GRANT: Grant(number),
            _END_CALL: EndCall(number),
            _CLEAR: Clear(),
            _QUIT: Quit(),
        }
        return simple[kind]
    if kind == _REST:
        _check("words of a record", len(words), 2, 2)
        return Rest(bool(_check("flag", words[1], 0, 1)))
    if kind == _ADMISSION:
        return _decode_admission(words)
    if kind == _VERDICT:
        _check("words of a verdict", len(words), 4, 4 + MAX_VERDICT_TOKENS)
        request_id = _check("request id", words[1], 0, MAX_COUNT)
        number = _check("verdict number", words[2], 1, MAX_COUNT)
        return Verdict(request_id, number, _tokens(words, 4, words[3]))
    if kind == _BEGIN_CALL:
        return _decode_begin_call(words)
    raise MalformedRecordError(f"a record of unknown kind {kind}")


def _decode_admission(words: Sequence[int]) -> Admission:
    _check("words of an admission", len(words), 9, 8 + MAX_PROMPT_TOKENS)
    has_seed = _check("seed flag", words[4], 0, 1)
    low, high = (_check("seed word", word, 0, _WORD_MASK) for word in words[5:7])
    return Admission(
        request_id=_check("request id", words[1], 0, MAX_COUNT),
        token_ids=_tokens(words, 8, words[7]),
        max_length=_check("length", words[2], 0, MAX_COUNT),
        num_padding=_check("padding", words[3], 0, MAX_PROMPT_TOKENS),
        seed=low | high << 32 if has_seed else None,
    )


def _decode_begin_call(words: Sequence[int]) -> BeginCall:
    _check("words of a call", len(words), 4, 3 + MAX_OPTIONS_BYTES // 8)
    number, num_bytes = _check("call", words[1], 1, MAX_COUNT), words[2]
    _check("bytes of a call", num_bytes, 8 * (len(words) - 4) + 1, 8 * (len(words) - 3))
    content = array("q", words[3:]).tobytes()[:num_bytes]
    try:
        options = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MalformedRecordError(f"the options of a call are no JSON: {error}") from error
    if not isinstance(options, dict) or set(options) != set(CallOptions._fields):
        raise MalformedRecordError("the options of a call have other names than expected")
    ranges = {
        "vocab_size": (1, MAX_TOKEN_ID),
        "pad_token_id": (0, MAX_TOKEN_ID),
        "max_line": (1, MAX_TREE_TOKENS),
        "max_width": (1, MAX_TREE_TOKENS),
        "num_blocks": (1, MAX_COUNT),
        "free_running": (False, True),
        "prefix_cache": (False, True),
        "eight_bit_cache": (False, True),
        "keeps_distributions": (False, True),
        "captures": (False, True),
        "compiles": (False, True),
    }
    for name, (low, high) in ranges.items():
        if type(options[name]) is not type(low):
            raise MalformedRecordError(f"`{name}` of a call is {options[name]!r}")
        _check(name, options[name], low, high)
    if not isinstance(options["cache_salt"], str):
        raise MalformedRecordError(f"`cache_salt` of a call is {options['cache_salt']!r}")
    if options["attention"] not in BACKENDS:
        raise MalformedRecordError(f"`attention` of a call is {options['attention']!r}")
    if not isinstance(options["processors"], list) or not all(isinstance(p, dict) for p in options["processors"]):
        raise MalformedRecordError("`processors` of a call is no list of objects")
    return BeginCall(number, CallOptions(**options))


def encode_tree(call: int, tree: TokenTree) -> bytes:
    """A tree of the call numbered `call`."""
    count = len(tree.token_ids)
    head = _TREE_HEAD.pack(call, tree.request_id, tree.verdict, tree.num_steps, tree.root, count)
    return head + struct.pack(f"<{2 * count}q{count}d", *tree.token_ids, *tree.parents, *tree.chances)


def decode_tree(content: bytes, vocab_size: int) -> tuple[int, TokenTree]:
    """The call that a tree belongs to, and the tree, checked.

    Raises
    ------
    MalformedRecordError
        `content` holds no tree over `vocab_size` tokens.
    """
    _check("bytes of a tree", len(content), _TREE_HEAD.size, _TREE_HEAD.size + 24 * MAX_TREE_TOKENS)
    *numbers, count = _TREE_HEAD.unpack_from(content)
    for number in numbers:
        _check("number", number, 0, MAX_COUNT)
    _check("bytes of a tree", len(content), _TREE_HEAD.size + 24 * count, _TREE_HEAD.size + 24 * count)
    values = struct.unpack_from(f"<{2 * count}q{count}d", content, _TREE_HEAD.size)
    tokens, parents, chances = values[:count], values[count : 2 * count], values[2 * count :]
    if count and (min(tokens) < 0 or max(tokens) >= vocab_size):
        raise MalformedRecordError(f"a guess outside the vocabulary of {vocab_size}")
    if count and (min(parents) < -1 or min(map(operator.sub, range(count), parents)) < 1):
        raise MalformedRecordError("a guess before the one it follows")
    if count and not (min(chances) >= 0.0 and max(chances) <= 1.0 and not math.isnan(sum(chances))):
        raise MalformedRecordError("a chance outside [0, 1]")
    call, request_id, verdict, num_steps, root = numbers
    return call, TokenTree(request_id, verdict, num_steps, root, tokens, parents, chances)


def encode_status(status: Status) -> bytes:
    """How far the worker is."""
    return _STATUS.pack(*status)


def decode_status(content: bytes) -> Status:
    """How far the worker is, checked.

    Raises
    ------
    MalformedRecordError
        `content` does not say so.
    """
    _check("bytes of a status", len(content), _STATUS.size, _STATUS.size)
    status = Status(*_STATUS.unpack(content))
    for count in status[:-1]:
        _check("count", count, 0, MAX_COUNT)
    _check("flag", status.is_finished, 0, 1)
    if not (math.isfinite(status.step_seconds) and status.step_seconds >= 0.0):
        raise MalformedRecordError(f"a draft step of {status.step_seconds} s")
    return status._replace(is_finished=bool(status.is_finished))


def _tokens(words: Sequence[int], start: int, count: int) -> tuple[int, ...]:
    _check("tokens", count, len(words) - start, len(words) - start)
    tokens = tuple(words[start:])
    if tokens:
        _check("token id", min(tokens), 0, MAX_TOKEN_ID)
        _check("token id", max(tokens), 0, MAX_TOKEN_ID)
    return tokens


def _check(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise MalformedRecordError(f"{name}: {value} is not between {low} and {high}")
    return value
