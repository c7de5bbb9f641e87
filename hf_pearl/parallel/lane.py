"""A lane: one model on the paged cache. It computes what it is given; it decides nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..cache import PagedPrefixCache, PagedSequence
from ..cache.attention import paged_attention, paged_step, register
from ..cache.sdpa import TreeMask
from ..cache.step import PagedStep
from ..decoding.messages import Window
from ..errors import PearlOutOfBlocksError
from ..model_devices import computing_devices, input_device
from ..models import all_modules
from .inference import may_use_inference_mode


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

    Attributes
    ----------
    device : torch.device
        Where the model reads its token ids, and where its logits are given back.
    """

    def __init__(
        self, model: PreTrainedModel, cache: PagedPrefixCache, prefix_cache: bool = True, cache_salt: str = ""
    ) -> None:
        register()
        self.model = model
        self.cache = cache
        self.prefix_cache = prefix_cache
        self.cache_salt = cache_salt
        self.device = input_device(model)
        self._is_spread = len(computing_devices(model)) > 1
        self.vocab_size = model.get_input_embeddings().num_embeddings
        self._sequences: dict[int, PagedSequence] = {}
        self._with_nan: set[int] = set()  # Masked attention spreads a NaN to tokens before it: nobody may find those.
        self._no_mask = torch.zeros(1, 1, 1, 1)
        self._may_use_inference_mode = may_use_inference_mode(model)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The scope of all forwards of a call: paged attention, no gradients, evaluation mode, all undone at the end.

        Inside, every sequence that was admitted is freed, whatever happens.
        """
        training = [module for module in all_modules(self.model) if module.training]
        try:
            if training:
                self.model.eval()
            with paged_attention(self.model), torch.no_grad():
                yield
        finally:
            for sequence in self._sequences.values():
                self.cache.free(sequence)
            self._sequences.clear()
            self._with_nan.clear()
            for module in training:  # One by one: a part of a model that is trained may be frozen.
                module.training = True

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
            return self._forward(sequences, windows)
        except PearlOutOfBlocksError:  # not even the pools could be made
            for sequence, window in zip(sequences, windows, strict=True):
                self.cache.rollback(sequence, sequence.length - len(window.token_ids))
            raise

    def _forward(self, sequences: list[PagedSequence], windows: Sequence[Window]) -> torch.Tensor:
        token_ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        for sequence, window in zip(sequences, windows, strict=True):
            token_ids.extend(window.token_ids)
            positions.extend(_positions(sequence, window))
            kept.extend(range(len(token_ids) - window.num_logits, len(token_ids)))
        known = self.vocab_size
        packed = torch.tensor([[token if token < known else 0 for token in token_ids]]).to(self.device)
        inputs: dict[str, torch.Tensor | int] = {
            "input_ids": packed,
            "position_ids": torch.tensor([positions]).to(self.device),
        }
        if self._takes_logits_to_keep and len(kept) < len(token_ids):
            inputs["logits_to_keep"] = self._logits_to_keep(kept, len(token_ids))
        # A NaN that is read from behind a row shows in the logits only where every new token has some.
        may_read_beyond = len(kept) == len(token_ids)
        num_new = [len(window.token_ids) for window in windows]
        trees = [None if window.branches is None else TreeMask(*window.branches) for window in windows]
        step = PagedStep(self.cache, sequences, num_new, may_read_beyond, trees)
        logits = self._compute(step, inputs)
        has_nan = math.isnan(logits.sum().item())
        if has_nan and step.has_read_beyond:
            step.read_by_row()
            logits = self._compute(step, inputs)
            has_nan = math.isnan(logits.sum().item())
        if has_nan:
            self._with_nan.update(window.request_id for window in windows)
        if logits.shape[0] == len(kept):
            return logits
        num_without = len(token_ids) - logits.shape[0]
        return logits[[place - num_without for place in kept]]

    def _logits_to_keep(self, kept: list[int], num_tokens: int) -> torch.Tensor | int:
        """The places whose logits are wanted, or how many at the end hold them: numbers lie on no device."""
        if self._is_spread:
            return num_tokens - kept[0] if kept else 1
        return torch.tensor(kept, dtype=torch.long, device=self.device)

    def _compute(self, step: PagedStep, inputs: dict[str, torch.Tensor | int]) -> torch.Tensor:
        is_inside = torch.is_inference_mode_enabled()
        mode = torch.inference_mode if self._may_use_inference_mode else torch.no_grad
        with paged_step(step), mode():
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
        if self.prefix_cache and request_id not in self._with_nan:
            self.cache.insert_prefix(sequence, verified)
        self.cache.free(sequence)


def _positions(sequence: PagedSequence, window: Window) -> Iterable[int]:
    if window.branches is None:
        return range(sequence.length - len(window.token_ids), sequence.length)
    num_common, paths = window.branches
    return (num_common + len(path) - 1 for path in paths)
