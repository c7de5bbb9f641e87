"""A lane: one model on the paged cache. It computes what it is given; it decides nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from transformers import PreTrainedModel

from ..cache import PagedPrefixCache, PagedSequence
from ..cache.attention import paged_attention, paged_step, register
from ..cache.step import PagedStep
from ..decoding.choosing import Chooser, Chosen
from ..decoding.messages import Window
from ..decoding.noise import NoiseRow
from ..errors import PearlOutOfBlocksError
from ..model_devices import computing_devices, input_device
from ..models import evaluating
from .graphs.cuda_graphs import GraphRunner, make_runner
from .inference import may_use_inference_mode
from .packed_windows import PackedWindows, chained, pack
from .streams import nvtx_range


def output_vocab_size(model: PreTrainedModel) -> int:
    """Entries of the model's logits; a quantised head has no plain weight to read them off."""
    head = model.get_output_embeddings()
    return head.out_features if hasattr(head, "out_features") else head.weight.shape[0]


class ModelLane:
    """Ragged forwards of one model over its own paged cache.

    Parameters
    ----------
    model : PreTrainedModel
        Any causal language model whose attention goes through transformers' `AttentionInterface`.
    cache : PagedPrefixCache
        This lane's cache.
    prefix_cache : bool
        Whether prefixes are found again by later requests.
    cache_salt : str
        Only prefixes that came under the same salt are found.
    graphs : GraphRunner or None
        Computes small forwards by replaying captured ones, where it can.
    name : str
        What profilers show.

    Attributes
    ----------
    device : torch.device
        Where the model reads its token ids, and where its logits are given back.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedPrefixCache,
        prefix_cache: bool = True,
        cache_salt: str = "",
        graphs: GraphRunner | None = None,
        name: str = "lane",
    ) -> None:
        register()
        self.model = model
        self.cache = cache
        self.prefix_cache, self.cache_salt = prefix_cache, cache_salt
        self.graphs, self.name = graphs, name
        self.device = input_device(model)
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self._sequences: dict[int, PagedSequence] = {}
        self._with_nan: set[int] = set()  # Masked attention spreads a NaN to tokens before it: nobody may find those.
        self._nan_on_device: torch.Tensor | None = None  # the same of all sequences of the call, where asking waits
        self._no_mask = torch.zeros(1, 1, 1, 1, device="cpu")
        self._may_use_inference_mode = may_use_inference_mode(model)
        # One that may has no hooks that could spread it.
        self._is_spread = not self._may_use_inference_mode and len(computing_devices(model)) > 1
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The scope of all forwards of a call: paged attention, no gradients, evaluation mode, all undone at the end.

        Inside, every sequence that was admitted is freed, whatever happens.
        """
        try:
            with evaluating(self.model), paged_attention(self.model), torch.no_grad():
                yield
        finally:
            for sequence in self._sequences.values():
                self.cache.free(sequence)
            self._sequences.clear()
            self._with_nan.clear()
            self._nan_on_device = None

    def admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> int:
        """Begin a sequence; return how many of `token_ids` the cache already holds (always short of the last).

        Raises
        ------
        PearlOutOfBlocksError
            The tokens alone would not fit into the cache if it were empty.
        """
        self.cache.pool.check_fits(len(token_ids), self.cache.block_size)
        known = token_ids if self.prefix_cache else ()
        self._sequences[request_id] = self.cache.allocate(known, self.cache_salt, max_length)
        return self._sequences[request_id].length

    def fork(self, request_id: int, new_id: int, length: int) -> None:
        """Begin a sequence with the first `length` tokens of another, in the same memory."""
        self._sequences[new_id] = self.cache.fork(self._sequences[request_id])
        self.rollback(new_id, length)

    @property
    def sequences(self) -> Mapping[int, PagedSequence]:
        """Every sequence by its request."""
        return self._sequences

    def length(self, request_id: int) -> int:
        """How many tokens of a sequence have keys and values."""
        return self._sequences[request_id].length

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute the new tokens of every window.

        Returns
        -------
        torch.Tensor
            `(sum of num_logits, vocab_size)`: the logits after the last `num_logits` tokens of each window, in order.

        Raises
        ------
        PearlOutOfBlocksError
            Not enough memory; every sequence is then as it was.
        """
        sequences = [self._sequences[window.request_id] for window in windows]
        self._append(sequences, windows)
        try:
            with nvtx_range(self.device, self.name, windows):
                return self._forward(sequences, windows)
        except PearlOutOfBlocksError:  # not even the pools could be made
            for sequence, window in zip(sequences, windows, strict=True):
                self.cache.rollback(sequence, sequence.length - len(window.token_ids))
            raise

    @property
    def num_warm_ups(self) -> int:
        """How many forwards captured something, or were the first of a size: their times say nothing."""
        return 0 if self.graphs is None else self.graphs.num_warm_ups

    @property
    def chains(self) -> bool:
        """Whether steps may ever be chained."""
        return self.graphs is not None

    def chain(
        self, windows: Sequence[Window], num_steps: int, chooser: Chooser, noise: Sequence[Sequence[NoiseRow]]
    ) -> Chosen | None:
        """Several steps in one launch, see `decoding.lanes.ChainingLane`."""
        if self.graphs is None or not self.graphs.can_chain(chooser):
            return None
        sequences = [self._sequences[window.request_id] for window in windows]
        lengths = [sequence.length for sequence in sequences]
        result = None
        try:
            self._append(sequences, windows)
            first = pack(sequences, windows, self.vocab_size)
            for _ in range(1, num_steps):
                self._append(sequences, windows)
            with nvtx_range(self.device, f"{num_steps} steps of {self.name}", windows), self._mode():
                steps = chained(sequences, first, num_steps)
                result = self.graphs.chain(self.model, sequences, steps, chooser, noise)
        except PearlOutOfBlocksError:
            pass  # There may be enough for a single step.
        if result is None:
            for sequence, length in zip(sequences, lengths, strict=True):
                self.cache.rollback(sequence, length)
            return None
        self._note_nan(result.sums, windows)
        return result.chosen

    def _forward(self, sequences: list[PagedSequence], windows: Sequence[Window]) -> torch.Tensor:
        packed = pack(sequences, windows, self.vocab_size)
        logits, is_clean = self._replayed(sequences, packed), False
        if logits is None:
            # A NaN that is read from behind a row shows in the logits only where every new token has some.
            may_read_beyond = len(packed.kept) == len(packed.token_ids)
            step = PagedStep(self.cache, sequences, packed.num_new, may_read_beyond, packed.trees)
            inputs = self._inputs(packed)
            logits = self._compute(step, inputs)
            if step.has_read_beyond:
                is_clean = not _has_nan(logits)
                if not is_clean:
                    step.read_by_row()
                    logits = self._compute(step, inputs)
        if not is_clean:
            self._note_nan(logits, windows)
        if logits.shape[0] == len(packed.kept):
            return logits
        num_without = len(packed.token_ids) - logits.shape[0]
        return logits[[place - num_without for place in packed.kept]]

    def _note_nan(self, logits: torch.Tensor, windows: Sequence[Window]) -> None:
        """Remember whether there was a NaN in logits or their sums.

        Elsewhere than on a CPU it is remembered on the device: to ask waits for the forward.
        """
        if self.device.type == "cpu":
            if _has_nan(logits):
                self._with_nan.update(window.request_id for window in windows)
            return
        has_nan = logits.sum().isnan()
        self._nan_on_device = has_nan if self._nan_on_device is None else self._nan_on_device | has_nan

    def _inputs(self, packed: PackedWindows) -> dict[str, torch.Tensor | int]:
        inputs: dict[str, torch.Tensor | int] = {
            "input_ids": torch.tensor([packed.token_ids], device="cpu").to(self.device),
            "position_ids": torch.tensor([packed.positions], device="cpu").to(self.device),
        }
        if self._takes_logits_to_keep and len(packed.kept) < len(packed.token_ids):
            inputs["logits_to_keep"] = self._logits_to_keep(packed.kept, len(packed.token_ids))
        return inputs

    def _replayed(self, sequences: list[PagedSequence], packed: PackedWindows) -> torch.Tensor | None:
        """The logits of a captured forward, copied from where its next replay writes them; None: there is none."""
        if self.graphs is None:
            return None
        with self._mode():
            logits = self.graphs.forward(self.model, sequences, packed)
        return None if logits is None else logits.clone()

    def _mode(self) -> AbstractContextManager[object]:
        return torch.inference_mode() if self._may_use_inference_mode else torch.no_grad()

    def _logits_to_keep(self, kept: list[int], num_tokens: int) -> torch.Tensor | int:
        """The places whose logits are wanted, or how many at the end hold them: numbers lie on no device."""
        if self._is_spread:
            return num_tokens - kept[0] if kept else 1
        return torch.tensor(kept, dtype=torch.long, device=self.device)

    def _compute(self, step: PagedStep, inputs: dict[str, torch.Tensor | int]) -> torch.Tensor:
        is_inside = torch.is_inference_mode_enabled()
        with paged_step(step), self._mode():
            # A mask of four dimensions is passed on as it is and never read: nobody takes the time to make one.
            logits = self.model(**inputs, attention_mask=self._no_mask, use_cache=False).logits[0]
            logits = logits.to(self.device)  # The last layer's may be another one.
        # A processor may write to them.
        return logits.clone() if logits.is_inference() and not is_inside else logits

    def _append(self, sequences: list[PagedSequence], windows: Sequence[Window]) -> None:
        done: list[tuple[PagedSequence, int]] = []
        try:
            for sequence, window in zip(sequences, windows, strict=True):
                before = sequence.length
                self.cache.append(sequence, len(window.token_ids))
                done.append((sequence, before))
        except PearlOutOfBlocksError as error:
            for sequence, before in done:
                self.cache.rollback(sequence, before)
            held = self._sequences.values()
            lengths = [max(sequence.expected_length, sequence.length) for sequence in held]
            num_blocks = sum(-(-length // self.cache.block_size) for length in lengths)
            raise PearlOutOfBlocksError(
                f"{error} The {len(held)} sequence(s) of this call may take {num_blocks} block(s) in all."
            ) from None

    def rollback(self, request_id: int, length: int) -> None:
        """Drop a sequence's tokens from position `length` on."""
        self.cache.rollback(self._sequences[request_id], length)

    def keep(self, request_id: int, num_first: int, places: Sequence[int]) -> None:
        """Drop a sequence's tokens but the first ones and those at `places`, ascending, which move up."""
        self.cache.keep(self._sequences[request_id], num_first, places)

    def release(self, request_id: int, verified: Sequence[int]) -> None:
        """End a sequence; its `verified` tokens may be found again by later requests."""
        sequence = self._sequences.pop(request_id)
        has_nan = request_id in self._with_nan or (self._nan_on_device is not None and bool(self._nan_on_device))
        if self.prefix_cache and not has_nan:
            self.cache.insert_prefix(sequence, verified)
        self.cache.free(sequence)


def lane_to_measure(model: PreTrainedModel, compiles: bool = False) -> ModelLane:
    """A lane as the engine makes it, with a cache of its own, in which nothing is found again."""
    cache = PagedPrefixCache(model.config, device=input_device(model))
    return ModelLane(model, cache, prefix_cache=False, graphs=make_runner(model, cache, compiles))


def _has_nan(logits: torch.Tensor) -> bool:
    return math.isnan(logits.sum().item())
