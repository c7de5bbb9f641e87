"""The draft lane in a thread of this process, on a CUDA stream of its own where its device has streams."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch

from ..decoding.drafting import Drafter
from ..decoding.messages import Admission, DraftReport, Grant, Removal, Rest, TokenTree, Verdict
from ..errors import PearlWorkerError
from . import heartbeat
from .draft_loop import EndOfCall, run_draft_loop
from .graphs.compiled import num_compilations
from .ranks.lane import Lane
from .streams import LaneStream

POLL_SECONDS = 0.1


class _QueueInbox:
    """Messages through a queue; `None` ends the call."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Admission | Verdict | Removal | Grant | Rest | None] = queue.SimpleQueue()
        self.num_looks = 0
        self.is_left_behind = False  # Nobody wants what the queue still asks for.

    def get(self, block: bool) -> Admission | Verdict | Removal | Grant | Rest | None:
        while True:
            self.check()
            self.num_looks += 1
            try:
                message = self.queue.get(block, heartbeat.LOOK_SECONDS)
            except queue.Empty:
                if block:
                    continue
                return None
            if message is None:
                raise EndOfCall
            return message

    def check(self) -> None:
        """Raise `EndOfCall` where the call has gone on without this lane."""
        if self.is_left_behind:
            raise EndOfCall


class ThreadDraft:
    """One thread per call, which ends with it.

    Parameters
    ----------
    is_hurried : callable
        Whether the user wants out: a draft step that goes on is then not waited for, and is an error.
    """

    concurrent = True
    is_ready = True
    is_starting = False

    def __init__(self, drafter: Drafter, lane: Lane, free_running: bool, is_hurried: Callable[[], bool] = bool) -> None:
        self._drafter = drafter
        self._lane = lane
        self._is_hurried = is_hurried
        self._progress = heartbeat.Watch()
        self._inbox = _QueueInbox()
        self._trees: dict[int, TokenTree] = {}
        self._step_done = threading.Condition()
        self._num_steps = 0
        self._error: BaseException | None = None
        self._has_ended = False
        self._stream = LaneStream(lane.device, is_urgent=True)
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, args=(free_running,), name="hf_pearl draft lane", daemon=True
        )
        self._thread.start()

    def _run(self, free_running: bool) -> None:
        try:
            with self._lane.ready(), self._stream.running():
                run_draft_loop(self._drafter, self._inbox, self._publish, free_running)
        except BaseException as error:  # Whatever it is, the call goes on without a draft and says so.
            self._error = error
        with self._step_done:
            self._has_ended = True  # The thread itself is still alive while it says so.
            self._step_done.notify_all()

    def _publish(self, trees: list[TokenTree]) -> None:
        self._inbox.check()
        with self._step_done:
            for tree in trees:
                self._trees[tree.request_id] = tree
            self._num_steps = self._drafter.num_steps
            self._step_done.notify_all()

    @property
    def num_steps(self) -> int:
        """Draft steps of this call so far."""
        return self._num_steps

    @property
    def step_seconds(self) -> float:
        """Running mean of a draft step's time; 0.0 while unknown."""
        return self._drafter.step_seconds

    @property
    def max_line(self) -> int:
        """Guesses at which a line waits for a verdict."""
        return self._drafter.max_line

    @property
    def error(self) -> BaseException | None:
        """What ended the lane before its time. The thread may still run then, on what is its own from now on."""
        return self._error

    def send(self, message: Admission | Verdict | Removal) -> None:
        """Deliver a message, in order."""
        self._inbox.queue.put(message)

    def grant(self, num_steps: int) -> None:
        """Allow `num_steps` more draft steps."""
        self._inbox.queue.put(Grant(num_steps))

    def rest(self, is_resting: bool) -> None:
        """Draft no more, or go on."""
        self._inbox.queue.put(Rest(is_resting))

    def tree(self, request_id: int) -> TokenTree | None:
        """What was published last for a request."""
        return self._trees.get(request_id)

    def distribution(self, request_id: int, position: int, token_id: int) -> torch.Tensor | None:
        """What a guess was drawn from, in a call that keeps distributions; while the draft rests."""
        kept = self._drafter.proposer.distributions
        return kept.get(request_id, position, token_id) if kept is not None else None

    def wait(self, num_steps: int, timeout: float) -> bool:
        """True when `num_steps` steps of this call are done, False after `timeout` seconds or without a lane."""
        deadline = time.perf_counter() + timeout
        with self._step_done:
            while self._num_steps < num_steps and not (self._has_ended or self._stands_still()):
                remaining = deadline - time.perf_counter()
                if remaining <= 0:
                    break
                self._step_done.wait(min(POLL_SECONDS, remaining))
            return self._num_steps >= num_steps

    def _stands_still(self) -> bool:
        if self._error is None:
            done = self._inbox.num_looks + num_compilations() + self._lane.cache.statistics.computed_layers
            if self._progress.stands_still(done, heartbeat.STUCK_SECONDS):
                self._error = PearlWorkerError(
                    f"draft lane, step {self._num_steps}: its thread {heartbeat.stands_still()}"
                )
        return self._error is not None

    def finish(self) -> DraftReport:
        """End the call; say what the draft did."""
        self._join()
        return self._drafter.report()

    def abort(self) -> None:
        """End the call in whatever state it is; harmless to repeat.

        The thread's object goes here, where interrupts are kept: Python tells a weak reference of its own of that, and
        an interrupt that is raised in there is lost.
        """
        self._join()
        self._thread = None

    def _join(self) -> None:
        if self._thread is None:
            return
        self._inbox.queue.put(None)
        self._thread.join(POLL_SECONDS)
        while self._thread.is_alive() and not (self._stands_still() or self._is_hurried()):
            self._thread.join(POLL_SECONDS)
        if not self._thread.is_alive():
            self._stream.join()
            return
        self._inbox.is_left_behind = True  # It ends with the step that it is in, should that ever end.
        if self._error is None:
            self._error = PearlWorkerError(f"draft lane, step {self._num_steps}: it was left behind by an interrupt")
