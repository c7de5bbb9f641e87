"""Several draft steps captured as one: each computes what was chosen in the one before, and chooses what may follow.

All but the chosen tokens is known beforehand: their positions, the branches they are on, where their keys and values
go, and the noise they are chosen with. So the tables of every step are filled before the launch, and on the device
nothing passes from one to the next but token ids.

Shapes: `n` steps, `T` packed tokens with padding, `N` of them without, `G` guesses per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ...cache import PagedPrefixCache, PagedSequence
from ...cache.step_tables import Bounds
from ...decoding.choosing import Chooser, Chosen
from ...decoding.noise import NoiseRow
from ..packed_windows import PackedWindows
from .capture import Capture, Captured
from .compiled import Body
from .static_forward import StaticForward

Noise = Sequence[Sequence[NoiseRow]]


class ChainKind(NamedTuple):
    """What chains are captured for: each serves all steps within `bucket`."""

    bucket: Bounds
    num_steps: int
    chooser: Chooser


class ChainResult(NamedTuple):
    """What the steps of a chain found, until the next forward.

    Attributes
    ----------
    chosen : Chosen
        `(n, N, G)`.
    sums : torch.Tensor
        Of the logits per step and token, `(n, N)`: NaN where one of them is.
    """

    chosen: Chosen
    sums: torch.Tensor


class StaticChain:
    """The forwards of a chain, what they choose, and the buffers in which that lies.

    What is chosen behind a token of padding is its successor, and like it belongs to no sequence.
    """

    def __init__(
        self, model: PreTrainedModel, body: Body, cache: PagedPrefixCache, kind: ChainKind, device: torch.device
    ) -> None:
        bucket, num_steps, self._chooser = kind
        self._vocab_size = model.get_input_embeddings().num_embeddings
        self.forwards = [StaticForward(model, body, cache, bucket, device) for _ in range(num_steps)]
        size, is_cuda = (num_steps, bucket.num_tokens), device.type == "cuda"
        with torch.inference_mode(False):  # Such tensors are written to by every later step, in whatever mode.
            self._noise_on_host = torch.zeros(*size, 4, dtype=torch.long, pin_memory=is_cuda, device="cpu")
            self._noise = torch.zeros_like(self._noise_on_host, device=device) if is_cuda else self._noise_on_host
            self._token_ids = torch.zeros(*size, self._chooser.num_guesses, dtype=torch.long, device=device)
            self._confidence = torch.zeros(self._token_ids.shape, device=device)
            self._sums = torch.zeros(size, device=device)
        self._noise_array = self._noise_on_host.numpy()
        self._copied = torch.cuda.Event() if is_cuda else None
        self._captured: Captured | None = None

    def fill(self, sequences: Sequence[PagedSequence], steps: Sequence[PackedWindows], noise: Noise) -> None:
        """Queue the copies of all steps' inputs, on the current stream.

        Parameters
        ----------
        sequences : sequence of PagedSequence
            With room for the tokens of all steps.
        steps : sequence of PackedWindows
            Logits are wanted after each of their tokens (`packed_windows.chained`).
        noise : sequence
            Rows of every step; empty where none is added.
        """
        for num_before, (forward, packed) in enumerate(zip(self.forwards, steps, strict=True)):
            forward.fill(sequences, packed, len(steps) - 1 - num_before)
        if noise:
            if self._copied is not None:
                self._copied.synchronize()  # The last copy reads what is about to be overwritten.
            self._noise_array[:, : len(steps[0].token_ids)] = noise
            if self._copied is not None:
                self._noise.copy_(self._noise_on_host, non_blocking=True)
                self._copied.record(torch.cuda.current_stream(self._noise.device))

    def capture(self, capture: Capture) -> None:
        """Capture the chain; what is filled in is computed, perhaps several times.

        Raises
        ------
        RuntimeError
            It cannot be captured.
        """
        self._run()  # It makes what forwards write to.
        self._captured = capture.capture(self._run)

    def replay(self, num_tokens: int) -> ChainResult:
        """Compute what is filled in, a step of which has `num_tokens` tokens."""
        assert self._captured is not None
        self._captured.replay()
        chosen = Chosen(self._token_ids[:, :num_tokens], self._confidence[:, :num_tokens])
        return ChainResult(chosen, self._sums[:, :num_tokens])

    def release(self) -> None:
        """Give back what was captured."""
        if self._captured is not None:
            self._captured.reset()
        self._captured = None

    def _run(self) -> None:
        for step, forward in enumerate(self.forwards):
            logits = forward.compute()
            self._sums[step].copy_(logits.sum(dim=-1))
            chosen = self._chooser.choose(logits, self._noise[step])
            self._token_ids[step].copy_(chosen.token_ids)
            self._confidence[step].copy_(chosen.confidence)
            if step + 1 < len(self.forwards):
                following = chosen.token_ids[:, 0]  # One that the model cannot know becomes 0, as in every window.
                self.forwards[step + 1].input_ids[0].copy_(following.masked_fill(following >= self._vocab_size, 0))
