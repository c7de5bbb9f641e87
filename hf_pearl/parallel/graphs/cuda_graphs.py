"""Forwards of a lane that are captured once per size and replayed: a launch instead of hundreds.

Plain decoding on a GPU takes the time in which Python launches kernels, a multiple of what reading the weights takes.
Small forwards, all but those of prompts, run in captured ones (`buckets.py`: of which sizes), whatever the
windows, trees and blocks of a step are; these lie in buffers that are filled for every step (`static_forward.py`).
Several draft steps may be captured together (`static_chain.py`). What cannot be captured runs as before; why is said
once, at INFO level.

A graph holds addresses. Of weights they change only with what `fingerprint` sees, of pools where the cache grows: both
count as a new layout of the cache, with which all graphs are released.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...cache import PagedPrefixCache, PagedSequence
from ...cache.paged_layer import Held
from ...cache.step_tables import Bounds, needs
from ...decoding.choosing import Chooser
from ..packed_windows import PackedWindows
from .buckets import bucket_of, largest_like
from .capture import Capture, capture_for, stream_priority
from .compiled import Body
from .obstacles import obstacle_to_capture
from .static_chain import ChainKind, ChainResult, Noise, StaticChain
from .static_forward import StaticForward

logger = logging.get_logger(__name__)

MAX_GRAPHS = 32  # of a lane; of more sizes than these, the one that was not used for longest is captured again
MAX_CHAINS = 16  # likewise; a chain is several forwards
CAPTURED_FROM = 2  # steps of one size: what comes but once is not worth a capture
MAX_COUNTED = 1024  # kinds of steps whose number is known
FIRST_TOKENS = 64  # of the first capture of all, so that the pool's memory has room for the smaller ones
CAPTURE_TIMEOUT = 20.0  # seconds, for another lane's capture; when they are over, nobody waits until it has ended

_capture_lock = threading.Lock()  # torch's capture is not thread-safe.


class GraphRunner:
    """The captured forwards of one model on one cache.

    Single-threaded; whoever runs the lane calls it.

    Parameters
    ----------
    capture : Capture
        CUDA graphs, or the stand-in; the memory of what it captures is shared by all of this runner's.
    max_graphs : int
        How many are kept at most.
    compiles : bool
        Whether the model is compiled for what is captured.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedPrefixCache,
        capture: Capture,
        max_graphs: int = MAX_GRAPHS,
        compiles: bool = False,
    ) -> None:
        self.cache, self.compiles = cache, compiles
        self.device = model.get_input_embeddings().weight.device
        self.body = Body(type(model).__name__, compiles, self.device)
        self.max_graphs = max_graphs
        self.num_replays = self.num_chains = self.num_warm_ups = 0
        self.forwards: dict[Bounds, StaticForward] = {}  # the least recently used first
        self.chains: dict[ChainKind, StaticChain] = {}  # likewise
        self._capture = capture
        self._layout = self._current_layout()
        self._obstacle = obstacle_to_capture(model)
        self._patience = CAPTURE_TIMEOUT
        self._num_steps: Counter[Bounds | ChainKind] = Counter()
        self._refused: set[Chooser] = set()
        self._held: set[Held] = set()
        self._logits: torch.Tensor | None = None
        self._say(model)

    def forward(
        self, model: PreTrainedModel, sequences: Sequence[PagedSequence], packed: PackedWindows
    ) -> torch.Tensor | None:
        """Logits `(N, V)` of a step, valid until the next one; None: it has to be computed otherwise."""
        self._see_layout(model)
        bucket = self.bucket(sequences, packed) if self.can_use() else None
        if bucket is None:
            return None
        if bucket not in self.forwards and not self._add(model, bucket, sequences, packed):
            return None
        static = self.forwards[bucket] = self.forwards.pop(bucket)
        static.fill(sequences, packed)
        self.num_replays += 1
        return static.replay()[: len(packed.kept)]

    def chain(
        self,
        model: PreTrainedModel,
        sequences: Sequence[PagedSequence],
        steps: Sequence[PackedWindows],
        chooser: Chooser,
        noise: Noise,
    ) -> ChainResult | None:
        """Several steps in one launch, see `StaticChain.fill`; None: they have to be made one by one."""
        self._see_layout(model)
        bucket = self.bucket(sequences, steps[-1]) if self.can_chain(chooser) else None
        if bucket is None:
            return None
        kind = ChainKind(bucket, len(steps), chooser)
        if kind not in self.chains and not self._add_chain(model, kind, sequences, steps, noise):
            return None
        static = self.chains[kind] = self.chains.pop(kind)
        static.fill(sequences, steps, noise)
        self.num_chains += 1
        return static.replay(len(steps[0].token_ids))

    def can_chain(self, chooser: Chooser) -> bool:
        """Whether steps that choose so can be captured."""
        return chooser not in self._refused and self.can_use()

    def can_use(self) -> bool:
        """Whether any forward can be captured: nothing stands against it, and kernels read the cache."""
        if self._obstacle is not None:
            return False
        if not self._held:  # The first forward of all makes the pools of every layer that keeps something.
            self._held = {layer.held for layer in self.cache.layers if layer.pools is not None and layer.held}
        return bool(self._held) and all(self.cache.backend.kernels(held) is not None for held in self._held)

    def bucket(self, sequences: Sequence[PagedSequence], packed: PackedWindows) -> Bounds | None:
        """The size that a step runs in; None: it is too large for all."""
        limits, bounds = needs(sequences, packed.num_new, packed.trees, self.cache.block_size)
        return bucket_of(bounds, limits, self.cache.block_size)

    def capture(
        self, model: PreTrainedModel, bucket: Bounds, sequences: Sequence[PagedSequence], packed: PackedWindows
    ) -> None:
        """Capture a size, on a step that it serves.

        Raises
        ------
        RuntimeError
            It cannot be captured.
        """
        while len(self.forwards) >= self.max_graphs:
            self.forwards.pop(next(iter(self.forwards))).release()
        static = StaticForward(model, self.body, self.cache, bucket, self.device)
        static.fill(sequences, packed)
        static.capture(self._capture, self._room)
        self.forwards[bucket] = static

    def release(self) -> None:
        """Give back all graphs and their memory; the next steps capture anew."""
        for static in self.forwards.values():
            static.release()
        for chain in self.chains.values():
            chain.release()
        self.forwards.clear()
        self.chains.clear()
        self._num_steps.clear()
        self._held.clear()
        self._capture.release()
        self._logits = None
        self._layout = self._current_layout()

    def _current_layout(self) -> tuple[int, int]:
        """What graphs are captured for: addresses, and the priority of the lane's stream."""
        return self.cache.layout, stream_priority(self.device)

    def _see_layout(self, model: PreTrainedModel) -> None:
        """Release what was captured for other addresses, or for a stream of other priority."""
        if self._layout != self._current_layout():
            self.release()
            self._obstacle = obstacle_to_capture(model)
            self._say(model)

    def _add(
        self, model: PreTrainedModel, bucket: Bounds, sequences: Sequence[PagedSequence], packed: PackedWindows
    ) -> bool:
        """Capture a size that has come often enough; whether it is there now."""

        def capture() -> None:
            largest = largest_like(bucket, FIRST_TOKENS)
            if not self.forwards and largest != bucket:
                self.capture(model, largest, sequences, packed)
            self.capture(model, bucket, sequences, packed)

        if self._comes_again(bucket):
            self._obstacle = self._attempt(capture)
            self._say(model)
        else:
            self.num_warm_ups += 1  # The kernels of a size are compiled in its first step.
        return bucket in self.forwards

    def _add_chain(
        self,
        model: PreTrainedModel,
        kind: ChainKind,
        sequences: Sequence[PagedSequence],
        steps: Sequence[PackedWindows],
        noise: Noise,
    ) -> bool:
        """The same of a chain. One that cannot be captured says nothing of forwards alone."""

        def capture() -> None:
            while len(self.chains) >= MAX_CHAINS:
                self.chains.pop(next(iter(self.chains))).release()
            static = StaticChain(model, self.body, self.cache, kind, self.device)
            static.fill(sequences, steps, noise)
            static.capture(self._capture)
            self.chains[kind] = static

        if self._comes_again(kind):
            reason = self._attempt(capture)
            if reason is not None:
                self._refused.add(kind.chooser)
                logger.info_once(f"Draft steps of {type(model).__name__} are launched one by one: {reason}.")
        return kind in self.chains

    def _comes_again(self, kind: Bounds | ChainKind) -> bool:
        if len(self._num_steps) >= MAX_COUNTED:  # Every temperature is a kind of its own.
            self._num_steps.clear()
            self._refused.clear()
        self._num_steps[kind] += 1
        return self._num_steps[kind] >= CAPTURED_FROM

    def _attempt(self, capture: Callable[[], None]) -> str | None:
        """Capture something; why that is not possible, if so: everything is released then.

        Nothing is captured, either, while another lane does so for too long: it is tried again with later steps.
        """
        is_free = _capture_lock.acquire(timeout=self._patience)
        self.num_warm_ups += is_free or self._patience > 0.0
        if not is_free:
            if self._patience:
                logger.info_once(f"Another lane's capture did not end within {self._patience:g} s: none until it has.")
            self._patience = 0.0
            return None
        self._patience = CAPTURE_TIMEOUT
        try:
            capture()
        except Exception as error:  # Out of memory, of a GPU's registers, whatever it is: the step can be made without.
            self.release()
            if self.body.is_compiled:  # Perhaps it can be captured as it is; it is tried again with later steps.
                self.body.give_up(error)
                return None
            return f"the attempt failed: {type(error).__name__}: {error}"
        finally:
            _capture_lock.release()
        return None

    def _room(self, logits: torch.Tensor) -> torch.Tensor:
        """Where logits `(T, V)` are copied to: one tensor for all, of which a smaller predecessor serves on."""
        room = self._logits
        if room is None or room.shape[0] < logits.shape[0]:
            room = self._logits = torch.zeros_like(logits)
        return room

    def _say(self, model: PreTrainedModel) -> None:
        if self._obstacle is not None:
            name = type(model).__name__
            logger.info_once(f"Forwards of {name} on {self.device} are not captured in CUDA graphs: {self._obstacle}.")


def make_runner(model: PreTrainedModel, cache: PagedPrefixCache, compiles: bool = False) -> GraphRunner | None:
    """A runner for a model on its cache; None where nothing can be captured."""
    capture = capture_for(cache.device)
    if capture is None and compiles:
        logger.warning_once(f"`compile` is without effect: on {cache.device} nothing is captured in CUDA graphs.")
    return None if capture is None else GraphRunner(model, cache, capture, compiles=compiles)
