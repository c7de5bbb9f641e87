"""The ranks of a lane but the first, as child processes of the first one's: start, end, restart."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from transformers.utils import logging

from ...errors import PearlWorkerError
from ...interrupts import KeptInterrupts
from ..heartbeat import Signs
from ..workers.child_process import Parent, start_module
from ..workers.descriptors import anonymous_memory, socket_pair
from .collectives import RankError
from .records import Operation, encode_operations
from .shared_collectives import POLL_SECONDS, SharedCollectives, Table
from .wire import READY, RankModel, RankStart, send_message

logger = logging.get_logger(__name__)

START_SECONDS = 600.0
PATIENCE_SECONDS = 0.5  # of an interrupt with a rank that does not come
END_SECONDS = 0.7  # for a rank that was let go; then it is killed
LOG_BYTES = 4000
_READ_BY_RANKS = ("config.json", ".safetensors", ".safetensors.index.json")


def _state_of_files(folder: str) -> list[tuple[str, int, int, int]]:
    """What tells whether a folder's weights and configuration are still those they were; empty where it is gone.

    Whatever else comes to lie beside them, logs or checkpoints of a training run, says nothing.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(each.name, each.stat()) for each in entries if each.name.endswith(_READ_BY_RANKS)]
    except OSError:
        return []
    return sorted((name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in found)


def num_files(size: int) -> int:
    """Open files that the first of `size` ranks keeps: the table's, and of every other rank a line and a log."""
    return size * (size - 1) + 1 + 2 * (size - 1) if size > 1 else 0


class _Child:
    """One rank's process, as its parent sees it."""

    def __init__(self, model: RankModel, rank: int, table: Table) -> None:
        self.rank, self.is_ready, self.signs = rank, False, Signs()
        self.line, other_end = socket_pair()
        self._log = anonymous_memory("hf_pearl_log", 0)
        seat = table.seat(rank)
        passed = [other_end.fileno(), *seat.descriptors]
        arguments = RankStart(model, rank, Parent.here(), other_end.fileno(), seat).arguments()
        try:
            self.process = start_module(
                "hf_pearl.parallel.ranks.process", arguments, passed, self._log, model.num_threads
            )
        except BaseException:
            self._close()
            raise
        finally:
            other_end.close()

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def look(self) -> bool:
        """Whether it is ready, after something has come on its line; raises `RankError` if that is its end."""
        with suppress(ConnectionError):
            self.is_ready = self.line.recv(len(READY)) == READY
        if not self.is_ready:
            raise RankError("it has ended before it was ready")
        return self.is_ready

    def why_it_ended(self) -> str:
        """Exit code and last words; empty while it runs."""
        code = self.process.poll()
        if code is None:
            return ""
        start = max(0, os.fstat(self._log).st_size - LOG_BYTES)
        text = os.pread(self._log, LOG_BYTES, start).decode(errors="replace").strip()
        return "; ".join(part for part in (f"rank {self.rank}: exit code {code}", text) if part)

    def end(self, is_asked: bool) -> None:
        self.line.close()
        if not is_asked:
            self.process.kill()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        self.line.close()
        os.close(self._log)


class ChildRanks:
    """All ranks of a lane but this process, which is the first.

    Starting does not wait; `wait_until_ready` does. Ranks that have ended, or were given up, are started anew by
    `ensure`, between calls.
    """

    def __init__(self, model: RankModel) -> None:
        self.model, self.lane, self.size, self.num_threads = model, model.lane, model.size, model.num_threads
        self.num_here = len([rank for rank in range(model.size) if model.device_of(rank) == model.device_of(0)])
        self._kept = KeptInterrupts()
        self._interrupted: float | None = None
        self._owner = os.getpid()
        self._children: list[_Child] = []
        self._collectives: SharedCollectives | None = None
        self._is_closed = False
        self._num_sent = 0
        self._files = _state_of_files(model.name)
        self._start()

    def _start(self) -> None:
        table = Table(self.model.size)
        try:
            for rank in range(1, self.model.size):
                self._children.append(_Child(self.model, rank, table))
            lines = {child.rank: child.line.fileno() for child in self._children}
            self._table = table
            self._collectives = SharedCollectives(self.lane, 0, table.seat(0), lines, self._look_after)
        except BaseException:
            self._stop()
            table.close()
            raise

    @property
    def process_ids(self) -> list[int]:
        """The operating system's numbers of the child processes, in the order of ranks."""
        return [child.process.pid for child in self._children]

    @property
    def collectives(self) -> SharedCollectives:
        """What is computed with them."""
        assert self._collectives is not None
        return self._collectives

    def wait_until_ready(self) -> None:
        """Wait until all have loaded their part.

        Raises
        ------
        PearlWorkerError
            One could not; none is left then.
        """
        poller, waiting = select.poll(), {child.line.fileno(): child for child in self._children if not child.is_ready}
        for descriptor in waiting:
            poller.register(descriptor, select.POLLIN)
        deadline = time.perf_counter() + START_SECONDS
        try:
            while waiting:
                for descriptor, _ in poller.poll(1000 * POLL_SECONDS):
                    if waiting[descriptor].look():
                        poller.unregister(descriptor)
                        del waiting[descriptor]
                for child in waiting.values():
                    if missing := child.signs.missing_at_start(child.process.pid):
                        raise RankError(f"rank {child.rank}: {missing}")
                if time.perf_counter() > deadline:
                    raise RankError(f"rank {min(c.rank for c in waiting.values())} was not ready in {START_SECONDS} s")
        except RankError as error:
            raise PearlWorkerError(f"{self.lane} lane, start of its ranks: {self.failed(error)}") from error
        except BaseException:
            self._stop()
            raise

    def ensure(self) -> bool:
        """Have them all there; whether they had to be started anew, and know nothing."""
        if self._is_closed or self._owner != os.getpid():
            raise PearlWorkerError(
                f"the ranks of the {self.lane} lane have been closed, or belong to another process: `launch` it again."
            )
        ended = [child.why_it_ended() for child in self._children if child.has_ended]
        if self._children and self._collectives is not None and not ended:
            return False
        self._stop()
        if _state_of_files(self.model.name) != self._files:  # This rank holds what they were.
            raise PearlWorkerError(
                f"the ranks of the {self.lane} lane have ended ({'; '.join(ended) or 'given up'}), and the files of "
                f"{self.model.name!r} have changed since they were loaded: `launch` it again."
            )
        if ended:
            logger.warning(f"The ranks of the {self.lane} lane are started anew: {'; '.join(ended)}")
        self._start()
        self.wait_until_ready()
        return True

    @contextmanager
    def together(self) -> Iterator[None]:
        """A scope that an interrupt does not end, unless a rank then keeps this one waiting."""
        before, self._interrupted = self._kept, None
        with KeptInterrupts() as self._kept:
            try:
                yield
            finally:
                self._kept = before

    def _look_after(self, rank: int) -> None:
        """Raise `RankError` if a rank that is waited for stands still, or an interrupt has been waiting, too."""
        self._check_patience()
        collectives = self.collectives
        num_waits = collectives.num_done + self._num_sent
        missing = self._children[rank - 1].signs.missing(collectives.control(rank), num_waits)
        if missing:
            raise RankError(f"rank {rank} of the {self.lane} lane, before collective {collectives.num_done}: {missing}")

    def _check_patience(self) -> None:
        now = time.perf_counter()
        if not self._kept.has_come:
            self._interrupted = None
        elif self._interrupted is None:
            self._interrupted = now
        elif now > self._interrupted + PATIENCE_SECONDS:
            raise RankError(f"an interrupt came while a rank of the {self.lane} lane was waited for")

    def send(self, operations: Sequence[Operation]) -> None:
        """Tell them; raises `RankError` where one cannot be told."""
        words = encode_operations(operations)
        self._num_sent += 1
        for child in self._children:
            try:
                send_message(child.line, words, partial(self._look_after, child.rank))
            except OSError as error:
                raise RankError(f"rank {child.rank} of the {self.lane} lane does not listen: {error!r}") from error

    def failed(self, error: BaseException) -> PearlWorkerError:
        """Give them up; say what is known of the reason."""
        if isinstance(error, RankError) and not self._kept.has_come:
            self._wait_for_ends()
        reasons = [str(error), *(child.why_it_ended() for child in self._children)]
        self._stop()
        return PearlWorkerError("; ".join(reason for reason in reasons if reason))

    def _wait_for_ends(self) -> None:
        """Give a rank that lets go of its line the moment that it needs for an exit code."""
        deadline = time.perf_counter() + END_SECONDS
        while not any(child.has_ended for child in self._children) and time.perf_counter() < deadline:
            time.sleep(0.01)

    def _stop(self, is_asked: bool = False) -> None:
        with KeptInterrupts():
            children, self._children = self._children, []
            for child in children:
                child.line.close()
            for child in children:
                child.end(is_asked)
            collectives, self._collectives = self._collectives, None
            if collectives is not None:
                collectives.close()
                self._table.close()

    def close(self) -> None:
        """End them all; harmless to repeat."""
        self._is_closed = True
        if self._owner == os.getpid():
            self._stop(is_asked=True)
