"""The worker process of an engine, from call to call, and whether a call's draft runs in it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Hashable, Iterable

from transformers import LogitsProcessor, PreTrainedModel
from transformers.utils import logging

from ...config import PearlConfig
from ...decoding.draft_tree import longest_line
from ...fingerprint import fingerprint
from ..cores import cores_for_worker
from ..processes import POLL_SECONDS, ProcessDraft
from ..ranks.linked_draft import LinkedDraft
from ..ranks.models import link_of, rank_model_of
from ..thread_split import threads_of_draft
from .execution import Execution, best_execution
from .processor_specs import encode_processors
from .records import BeginCall, CallOptions, Clear
from .shipping import can_ship, pack
from .worker_process import WorkerProcess

logger = logging.get_logger(__name__)

MAX_FAILURES = 3
_INSTEAD = {"threads": "a thread serves", None: "decoding goes on without it"}


class DraftWorker:
    """A draft model in a child process, warm between calls. Its construction does not wait for it to be ready.

    Parameters
    ----------
    model : PreTrainedModel
        The draft; its weights are copied, or shared where they lie on a GPU. It is not kept.
    cache_blocks : int
        Blocks that the worker's cache may have; may be set anew between calls.
    num_threads : int
        Threads of the worker's arithmetic; of a draft over several ranks, all have what `launch` gave them.
    known_as : hashable or None
        The fingerprint of `model`, where it is known.

    Raises
    ------
    ValueError
        `model` cannot be loaded in another process.
    OSError
        No process could be started.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache_blocks: int,
        num_threads: int = 1,
        known_as: Hashable = None,
    ) -> None:
        self.cache_blocks = cache_blocks
        ranks = rank_model_of(model)  # It starts the others, on the same cores.
        self._num_threads = num_threads if ranks is None else ranks.num_threads
        self.num_cores = self._num_threads * (1 if ranks is None else ranks.size)
        self._cores = cores_for_worker(self.num_cores)  # the last ones of this process's, if there are more
        self._num_calls = 0
        self._start(model, known_as or fingerprint(model))

    def _start(self, model: PreTrainedModel, now: Hashable) -> None:
        self._fingerprint: Hashable = now
        self._process: WorkerProcess | LinkedDraft
        linked = link_of(model)
        if linked is not None:  # It runs in another rank of the job, and ends with that.
            self._process, self._finalizer = linked, weakref.finalize(self, lambda: None)
            return
        reason = can_ship(model)
        if reason is not None:
            raise ValueError(
                f'`execution="processes"` cannot run this {type(model).__name__} as draft: {reason}. Use '
                '`execution="threads"` or "auto".'
            )
        self._process = WorkerProcess(*pack(model), self._num_threads, self._cores)
        self._finalizer = weakref.finalize(self, self._process.end)

    @property
    def is_alive(self) -> bool:
        """Whether calls may be drafted here: it runs, or still starts, and has answered when it should."""
        return self._process.is_alive

    @property
    def is_ready(self) -> bool:
        """Whether it has started."""
        return self._process.is_ready

    @property
    def could_not_start(self) -> bool:
        """Whether it has failed by itself before it was ready: it would do so again."""
        return not self.is_ready and self._process.has_failed_by_itself

    @property
    def has_served(self) -> bool:
        """Whether it has drafted for a call, to its end."""
        status = self._process.status
        return status is not None and status.num_steps > 0 and status.is_finished

    def why_it_ended(self) -> str:
        """What is known of its end."""
        return self._process.why_it_ended()

    @property
    def process_id(self) -> int:
        """The operating system's number of the child process."""
        return self._process.process_id

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait for the end of its start, `timeout` seconds at most; whether it is ready."""
        deadline = time.perf_counter() + timeout
        while not self.is_ready and self.is_alive and time.perf_counter() < deadline:
            self._process.wait(min(POLL_SECONDS, deadline - time.perf_counter()))
        return self.is_ready and self.is_alive

    def call(
        self,
        vocab_size: int,
        processors: Iterable[LogitsProcessor],
        pad_token_id: int,
        free_running: bool,
        config: PearlConfig | None = None,
    ) -> ProcessDraft:
        """Begin a call, of which there is one at a time; the arguments are those of `Proposer` and `Drafter`."""
        self._num_calls += 1
        config = config or PearlConfig()
        options = CallOptions(
            vocab_size,
            pad_token_id,
            free_running,
            config.prefix_cache,
            config.cache_salt,
            config.eight_bit_cache,
            config.attention,
            longest_line(config.draft_length),
            config.max_draft_width,
            self.cache_blocks,
            config.verification == "rejection",
            config.captures,
            config.compile,
            encode_processors(processors),
        )
        return ProcessDraft(self._process, BeginCall(self._num_calls, options))

    def refresh(self, model: PreTrainedModel, known_as: Hashable = None) -> None:
        """Take over the weights of `model` as they are now, if they have changed; between calls.

        A model of the same structure keeps the process; its weights are copied into the old places.

        Raises
        ------
        ValueError
            `model` has become one that cannot be loaded in another process.
        """
        now = known_as or fingerprint(model)
        if now == self._fingerprint or isinstance(self._process, LinkedDraft):
            return
        reason = can_ship(model)
        shipment, tensors = pack(model) if reason is None else (None, [])
        if shipment == self._process.shipment and self.is_alive:
            self._process.replace_weights(tensors)
            self.clear()
            self._fingerprint = now
        else:
            self.close()
            self._start(model, now)

    def clear(self) -> None:
        """Forget every cached prefix, and that the weights are known; between calls."""
        self._process.put(Clear())
        self._fingerprint = None

    def close(self) -> None:
        """End the child process; harmless to repeat."""
        self._finalizer()


class DraftWorkers:
    """One engine's draft worker: started when a call first wants it, replaced when it failed, ended with the engine.

    A worker that failed by itself before it was ready is not tried again (over several ranks it is: another rank may
    have been killed), nor is one that failed `MAX_FAILURES` times without having served a call between; threads serve.
    """

    def __init__(self) -> None:
        self.worker: DraftWorker | None = None
        self._num_threads = 1
        self._split_for: Hashable = None
        self._num_failures = 0
        self._unshippable: tuple[Hashable, str | None] | None = None
        self._has_said = False

    def share_cores(
        self, config: PearlConfig, target: PreTrainedModel, draft: PreTrainedModel | None, known_as: Hashable
    ) -> None:
        """Find out how many threads a worker should have, before one starts; once per pair and dtypes.

        The arguments are those of `choose`.
        """
        if draft is None:
            return
        dtypes = target.dtype, draft.dtype
        execution = config.execution if config.execution != "auto" else self._best(config, draft, known_as)
        if execution == "processes" and self.worker is None and self._split_for != dtypes:
            self._num_threads, self._split_for = threads_of_draft(target, draft), dtypes

    def choose(
        self, config: PearlConfig, draft: PreTrainedModel, known_as: Hashable, num_blocks: int
    ) -> Execution | None:
        """How the draft lane of a call runs; with "processes", `worker` is there and up to date.

        None if it does not: of a draft over several ranks, which have failed, nothing is in this process.

        Parameters
        ----------
        known_as : hashable
            The fingerprint of `draft`.
        num_blocks : int
            Blocks of the worker's cache.

        Raises
        ------
        ValueError
            `execution="processes"` with a draft that no other process can load.
        """
        execution = config.execution if config.execution != "auto" else self._best(config, draft, known_as)
        is_elsewhere = rank_model_of(draft) is not None
        otherwise: Execution | None = None if is_elsewhere else "threads"
        if execution != "processes" and is_elsewhere:
            raise ValueError(
                f'`execution={execution!r}` cannot run a draft over several ranks, which needs "processes" or "auto".'
            )
        if execution != "processes":
            return execution
        self._replace_what_failed(is_elsewhere)
        if self._num_failures >= MAX_FAILURES:
            return otherwise
        try:
            if self.worker is None:
                self.worker = DraftWorker(draft, num_blocks, self._num_threads, known_as=known_as)
            self.worker.refresh(draft, known_as)
            self.worker.cache_blocks = num_blocks
        except OSError as error:
            self._num_failures = MAX_FAILURES
            logger.warning(f"No worker process for the draft model could be started, {_INSTEAD[otherwise]}: {error}")
            return otherwise
        except ValueError:
            self._end_worker()
            raise
        return "processes"

    def _replace_what_failed(self, is_elsewhere: bool) -> None:
        worker = self.worker
        if worker is None:
            return
        if worker.has_served:
            self._num_failures = 0
        if worker.is_alive:
            return
        self._num_failures += MAX_FAILURES if worker.could_not_start and not is_elsewhere else 1
        if self._num_failures >= MAX_FAILURES:
            what = "The draft runs no more" if is_elsewhere else "A thread serves instead of the draft model's process"
            logger.warning(f"{what}: {worker.why_it_ended()}")
        self._end_worker()

    def _best(self, config: PearlConfig, draft: PreTrainedModel, known_as: Hashable) -> Execution:
        wanted = best_execution(config, draft)
        if wanted != "processes" or rank_model_of(draft) is not None:
            return wanted
        if self._unshippable is None or self._unshippable[0] != known_as:
            self._unshippable = known_as, can_ship(draft)
        reason = self._unshippable[1]
        if reason is not None and not self._has_said:
            self._has_said = True
            logger.info(f"The draft model runs in a thread instead of a process: {reason}.")
        return "processes" if reason is None else "threads"

    def clear(self) -> None:
        """Forget the prefixes cached in the worker, and send it the weights again; between calls."""
        if self.worker is not None:
            self.worker.clear()

    def close(self) -> None:
        """End the worker; the next call may start another."""
        self._end_worker()
        self._num_failures, self._split_for = 0, None

    def _end_worker(self) -> None:
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.close()
