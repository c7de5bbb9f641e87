"""From draft logits to guesses, under the same processors and the same noise as the target's choices.

Shapes: `N` rows, `V` the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from .draft_tree import DraftTree
from .messages import Admission, Removal
from .noise import NoiseSource
from .processors import is_of_scores


class Guess(NamedTuple):
    """A draft token, and the probability that the draft's own distribution gives it."""

    request_id: int
    token_id: int
    probability: float


class Proposer:
    """Choose the draft's next token per request.

    Parameters
    ----------
    vocab_size : int
        The target's; the draft's logits are cut or padded to it, so that no token is proposed the target cannot know.
    processors : LogitsProcessorList
        Shape the guesses as the target's processors shape its choices; none may keep state.
    pad_token_id : int
        Stands for the padding in the rows that processors see.
    """

    def __init__(self, vocab_size: int, processors: LogitsProcessorList, pad_token_id: int = 0) -> None:
        self.vocab_size = vocab_size
        self.processors = processors
        self.pad_token_id = pad_token_id
        self._needs_ids = not all(is_of_scores(processor) for processor in processors)
        self._admissions: dict[int, Admission] = {}
        self._noise: dict[int, NoiseSource] = {}

    def admit(self, message: Admission) -> None:
        """Begin a request."""
        self._admissions[message.request_id] = message

    def remove(self, message: Removal) -> None:
        """End a request."""
        self._admissions.pop(message.request_id)
        self._noise.pop(message.request_id, None)

    def propose(self, logits: torch.Tensor, requests: Sequence[tuple[int, DraftTree]]) -> list[Guess]:
        """One guess per row of `logits` `(N, draft vocabulary)`."""
        scores = self._process(self._fit(logits), requests)  # (N, V)
        noisy = scores + self._noise_rows(requests, scores.device) if self._samples(requests) else scores
        chosen = noisy.argmax(dim=-1)
        log_probabilities = scores.gather(1, chosen[:, None])[:, 0] - scores.logsumexp(dim=-1)
        probabilities = log_probabilities.exp().nan_to_num(0.0)  # NaN where the processors exclude every token
        return [
            Guess(request_id, token_id, probability)
            for (request_id, _), token_id, probability in zip(
                requests, chosen.tolist(), probabilities.tolist(), strict=True
            )
        ]

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits[:, : self.vocab_size].float()
        missing = self.vocab_size - logits.shape[1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits

    def _process(self, scores: torch.Tensor, requests: Sequence[tuple[int, DraftTree]]) -> torch.Tensor:
        if not self._needs_ids:
            return self.processors(None, scores)
        rows = []
        for row, (request_id, tree) in enumerate(requests):
            padding = [self.pad_token_id] * self._admissions[request_id].num_padding
            ids = torch.tensor([padding + tree.tokens_from(0)], device=scores.device)
            rows.append(self.processors(ids, scores[row : row + 1]))
        return torch.cat(rows)

    def _samples(self, requests: Sequence[tuple[int, DraftTree]]) -> bool:
        return self._admissions[requests[0][0]].seed is not None

    def _noise_rows(self, requests: Sequence[tuple[int, DraftTree]], device: torch.device) -> torch.Tensor:
        rows = []
        for request_id, tree in requests:
            if request_id not in self._noise:
                seed = self._admissions[request_id].seed
                if seed is None:
                    raise ValueError(f"request {request_id} is greedy among sampled ones")
                self._noise[request_id] = NoiseSource(seed, self.vocab_size, device)
            rows.append(self._noise[request_id].rows(tree.length, 1))
        return torch.cat(rows)
