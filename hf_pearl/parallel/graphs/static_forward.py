"""One captured forward: its inputs at fixed addresses, and what fills them for a step.

Shapes: `T` packed tokens with padding, `S` sequences, `N` logits that are wanted, `V` vocabulary.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from ...cache import PagedPrefixCache, PagedSequence
from ...cache.attention import paged_step
from ...cache.static_step import StaticStep
from ...cache.step_tables import Bounds, StepTables
from ..packed_windows import PackedWindows
from .buckets import limits_of
from .capture import Capture, Captured
from .compiled import Body


class StaticForward:
    """A model's forward for steps within `bucket`.

    A token of padding is what an earlier step left there, belongs to no sequence, and is stored nowhere; nobody reads
    its logits.
    """

    def __init__(
        self, model: PreTrainedModel, body: Body, cache: PagedPrefixCache, bucket: Bounds, device: torch.device
    ) -> None:
        self._model, self._body = weakref.ref(model), body
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.tables = StepTables(limits_of(bucket, cache.block_size), cache.block_size, device, bucket)
        self._step = StaticStep(cache, self.tables)
        is_cuda = device.type == "cuda"
        with torch.inference_mode(False):  # Such tensors are written to by every later step, in whatever mode.
            self._on_host = torch.zeros(3, bucket.num_tokens, dtype=torch.long, pin_memory=is_cuda, device="cpu")
            self.numbers = torch.zeros_like(self._on_host, device=device) if is_cuda else self._on_host
            self._no_mask = torch.zeros(1, 1, 1, 1, device="cpu")
            self.input_ids, self._position_ids = self.numbers[0:1], self.numbers[1:2]
            self._kept = self.numbers[2]
        self._host = self._on_host.numpy()
        self._copied = torch.cuda.Event() if is_cuda else None
        self._captured: Captured | None = None
        self.logits: torch.Tensor | None = None

    def fill(self, sequences: Sequence[PagedSequence], packed: PackedWindows, num_later: int = 0) -> None:
        """Queue the copy of a step's inputs, on the current stream; `num_later` as in `StepTables.fill`."""
        self.tables.fill(sequences, packed.num_new, packed.trees, num_later)
        if self._copied is not None:
            self._copied.synchronize()  # The last copy reads what is about to be overwritten.
        for row, numbers in zip(self._host, (packed.token_ids, packed.positions, packed.kept), strict=True):
            row[: len(numbers)] = numbers
        if self._copied is not None:
            self.numbers.copy_(self._on_host, non_blocking=True)
            self._copied.record(torch.cuda.current_stream(self.numbers.device))

    def capture(self, capture: Capture, room: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Capture the forward; the step that is filled in is computed, perhaps several times.

        Parameters
        ----------
        room : callable
            Gives the tensor, with at least as many rows as logits `(T, V)`, that these are copied to.

        Raises
        ------
        RuntimeError
            It cannot be captured.
        """
        logits = self.compute()
        with torch.inference_mode(False):
            self.logits = room(logits)[: logits.shape[0]]
        self._captured = capture.capture(self._run)

    def replay(self) -> torch.Tensor:
        """Compute the step that is filled in: logits `(T, V)`, the first `N` of which count, until the next replay."""
        assert self._captured is not None and self.logits is not None
        self._captured.replay()
        return self.logits

    def release(self) -> None:
        """Give back what was captured."""
        if self._captured is not None:
            self._captured.reset()
        self._captured = self.logits = None

    def _run(self) -> None:
        assert self.logits is not None
        self.logits.copy_(self.compute())

    def compute(self) -> torch.Tensor:
        """Logits `(T, V)` of the tokens at `kept`, by calling the model."""
        model = self._model()
        assert model is not None
        wanted = {"logits_to_keep": self._kept} if self._takes_logits_to_keep else {}
        with paged_step(self._step):
            logits: torch.Tensor = self._body(
                model,
                input_ids=self.input_ids,
                position_ids=self._position_ids,
                attention_mask=self._no_mask,
                use_cache=False,
                **wanted,
            ).logits[0]
        return logits if wanted else logits.index_select(0, self._kept)
