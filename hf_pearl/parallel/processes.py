"""The draft lane in a process of its own: on CPUs, where two threads share Python's interpreter lock, the fast way."""

from __future__ import annotations

import struct
import time

import torch

from ..decoding.messages import Admission, DraftReport, DraftStep, Grant, Removal, Rest, TokenTree, Verdict
from ..errors import PearlWorkerError
from .ranks.linked_draft import LinkedDraft
from .workers.records import MAX_COUNT, BeginCall, EndCall, MalformedRecordError, Message, Status, decode_tree
from .workers.shared_distributions import SharedDistributions
from .workers.shared_memory import NUM_SLOTS, TIMELINE_LENGTH
from .workers.worker_process import WorkerProcess

FINISH_SECONDS = 2.0  # for the report of a call, which a worker in the middle of a step sends late
POLL_SECONDS = 0.1
_NO_STATUS = Status(0, False, 0, 0, 0, 0, 0.0)


class ProcessDraft:
    """The engine's end of one call that is drafted in a worker process.

    Parameters
    ----------
    process : WorkerProcess
        Runs one call at a time; it may still be starting.
    begin : BeginCall
        Number and options of the call.

    Raises
    ------
    NotImplementedError
        `verification="rejection"` with a draft in another rank of `torchrun`.
    """

    concurrent = True

    def __init__(self, process: WorkerProcess | LinkedDraft, begin: BeginCall) -> None:
        if begin.options.keeps_distributions and isinstance(process, LinkedDraft):
            raise NotImplementedError(
                '`verification="rejection"` needs the draft in this process or in one that it starts, and the draft is '
                'in another rank. Run the script without torchrun, or leave `verification` at "coupled".'
            )
        self._process = process
        self._call, self.max_line = begin.number, begin.options.max_line
        self._vocab_size = begin.options.vocab_size
        self._wire_ids: dict[int, int] = {}  # request id -> slot + NUM_SLOTS * generation, never used twice in a call
        self._free_slots = list(reversed(range(NUM_SLOTS)))
        self._generation = 0
        self._trees: dict[int, tuple[bytes, TokenTree | None]] = {}
        self._timeline: list[DraftStep] = []
        self._num_seen = 0
        self._looked = time.perf_counter()
        self._error: PearlWorkerError | None = None
        self._has_left = False
        self._is_over = False
        self._last = _NO_STATUS
        self._first_message = process.put(begin)

    @property
    def is_ready(self) -> bool:
        """Whether the worker has started."""
        return self._process.is_ready

    @property
    def is_starting(self) -> bool:
        """Whether the worker has not started yet, and has not failed."""
        return not self._process.is_ready and self._process.is_alive

    @property
    def num_steps(self) -> int:
        """Draft steps of this call so far."""
        return self._status.num_steps

    @property
    def step_seconds(self) -> float:
        """Running mean of a draft step's time; 0.0 while unknown, and where no draft is to be expected any more."""
        return 0.0 if self._error is not None else self._status.step_seconds

    @property
    def error(self) -> BaseException | None:
        """What ended the draft of this call before its time."""
        self._has_failed()
        return self._error

    @property
    def _status(self) -> Status:
        status = None if self._is_over else self._process.status
        return status if status is not None and status.call == self._call else _NO_STATUS

    def send(self, message: Admission | Verdict | Removal) -> None:
        """Deliver a message, in order; requests beyond the number of slots are not drafted."""
        if isinstance(message, Admission) and self._free_slots:
            self._generation += 1
            self._wire_ids[message.request_id] = self._free_slots.pop() + NUM_SLOTS * self._generation
        wire_id = self._wire_ids.get(message.request_id)
        if wire_id is None:
            return
        self._put(message._replace(request_id=wire_id))
        if isinstance(message, Removal):
            self._free_slots.append(self._wire_ids.pop(message.request_id) % NUM_SLOTS)
            self._trees.pop(message.request_id, None)

    def grant(self, num_steps: int) -> None:
        """Allow `num_steps` more draft steps."""
        self._put(Grant(num_steps))

    def rest(self, is_resting: bool) -> None:
        """Draft no more, or go on."""
        self._put(Rest(is_resting))

    def _put(self, message: Message) -> None:
        if self._error is None and not self._is_over:
            self._process.put(message)

    def tree(self, request_id: int) -> TokenTree | None:
        """What was published last for a request."""
        wire_id, channel = self._wire_ids.get(request_id), self._process.channel
        if wire_id is None or self._is_over or channel is None:
            return None
        self._process.flush()
        self._collect()
        if time.perf_counter() > self._looked + POLL_SECONDS:
            self._has_failed()
        content = channel.tree(wire_id % NUM_SLOTS).read()
        if content is None:
            return None
        known = self._trees.get(request_id)
        if known is None or known[0] is not content:
            known = self._trees[request_id] = content, self._decode(content, request_id, wire_id)
        return known[1]

    def distribution(self, request_id: int, position: int, token_id: int) -> torch.Tensor | None:
        """What a guess was drawn from, in a call that keeps distributions."""
        wire_id, descriptor = self._wire_ids.get(request_id), self._process.distributions
        if wire_id is None or descriptor is None:
            return None
        shared = SharedDistributions(descriptor, self._call, self._vocab_size, self.max_line)
        try:
            return shared.get(wire_id, position, token_id)
        except MalformedRecordError as error:
            self._fail(str(error))
            return None

    def _decode(self, content: bytes, request_id: int, wire_id: int) -> TokenTree | None:
        try:
            call, tree = decode_tree(content, self._vocab_size)
        except MalformedRecordError as error:
            self._fail(str(error))
            return None
        return tree._replace(request_id=request_id) if (call, tree.request_id) == (self._call, wire_id) else None

    def wait(self, num_steps: int, timeout: float) -> bool:
        """True when `num_steps` steps of this call are done, False after `timeout` seconds or without a worker."""
        deadline = time.perf_counter() + timeout
        while True:
            self._process.flush()
            self._collect()
            if self.num_steps >= num_steps:
                return True
            remaining = deadline - time.perf_counter()
            if remaining <= 0 or self._has_failed():
                return False
            self._process.wait(min(POLL_SECONDS, remaining))

    def _has_failed(self) -> bool:
        if self._is_over or self._error is not None:
            return True
        self._looked = time.perf_counter()
        if not self._process.is_alive:
            self._fail(self._process.why_it_ended())
        elif self._status.is_finished and self._process.channel is not None:
            content = self._process.channel.error.read() or b""
            if len(content) >= 8 and struct.unpack_from("<q", content)[0] == self._call:
                self._fail(content[8:].decode(errors="replace"))
        return self._error is not None

    def _fail(self, text: str) -> None:
        self._error = PearlWorkerError(f"draft lane, step {self.num_steps} of call {self._call}: {text}")

    def _collect(self) -> None:
        """Take over the times of new draft steps before the worker writes over them."""
        channel, status = self._process.channel, self._status
        if channel is None or status.num_timed <= self._num_seen:
            return
        for index in range(max(self._num_seen, status.num_timed - TIMELINE_LENGTH), status.num_timed):
            place = 3 * (index % TIMELINE_LENGTH)
            started, ended, num_guesses = channel.timeline[place : place + 3]
            last = self._timeline[-1].ended if self._timeline else 0.0
            if last <= started <= ended and 1.0 <= num_guesses <= MAX_COUNT:
                self._timeline.append(DraftStep(started, ended, int(num_guesses)))
        self._num_seen = status.num_timed

    def finish(self) -> DraftReport:
        """End the call; say what the draft did, as far as it says so in time."""
        if not self._is_over and self._process.is_ready:
            self._leave()
            deadline = time.perf_counter() + FINISH_SECONDS
            while not (self._status.is_finished or self._has_failed()):
                if time.perf_counter() > deadline and not self._process.is_silent:
                    break
                self._process.flush()
                self._process.wait(POLL_SECONDS)
        self._has_failed()
        self._collect()
        if not self._is_over:
            self._last = self._status
        self.abort()
        counts = (self._last.num_timed, self._last.num_drafted, self._last.num_prefilled)
        return DraftReport(*counts, tuple(self._timeline))

    def abort(self) -> None:
        """End the call in whatever state it is; harmless to repeat."""
        if self._is_over:
            return
        if not self._has_left and not self._process.withdraw(self._first_message):
            self._leave()
        self._is_over = True

    def _leave(self) -> None:
        self._has_left = True
        self._process.put(EndCall(self._call))
