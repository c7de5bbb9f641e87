"""From draft logits to guesses, under the same processors and the same noise as the target's choices.

Shapes: `N` rows, `V` the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.utils import logging

from .choosing import Chooser, Chosen, fit, likeliest, make_chooser
from .draft_distributions import DraftDistributions
from .messages import Admission, Removal
from .noise import DRAFT_STREAM, SHARED_STREAM, NoiseRow, NoiseSource
from .noisy_scores import Draw, noisy_scores
from .on_host import on_host
from .processors import is_of_scores

logger = logging.get_logger(__name__)


class Guess(NamedTuple):
    """A token that may come next.

    `confidence` is the probability that the draft's own distribution gives the likeliest guess, and for the others how
    near they come to it: the odds between the two, with the noise where sampling, as a probability (0.5: a tie).
    """

    token_id: int
    confidence: float


class Prefix(NamedTuple):
    """Where a guess is wanted: behind `length` tokens of a request, which `token_ids()` names (padding left out)."""

    request_id: int
    length: int
    token_ids: Callable[[], list[int]]


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
    distributions : DraftDistributions or None
        For rejection sampling: takes what every sampled guess was drawn from, with noise of the draft's own.
    """

    def __init__(
        self,
        vocab_size: int,
        processors: LogitsProcessorList,
        pad_token_id: int = 0,
        distributions: DraftDistributions | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.processors = processors
        self.pad_token_id = pad_token_id
        self.distributions = distributions
        self._stream = SHARED_STREAM if distributions is None else DRAFT_STREAM
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
        if self.distributions is not None:
            self.distributions.drop(message.request_id)

    def propose(self, logits: torch.Tensor, prefixes: Sequence[Prefix], num_guesses: int = 1) -> list[list[Guess]]:
        """The likeliest guesses per row of `logits` `(N, draft vocabulary)`; the first is the draft's own token."""
        scores = self._process(fit(logits, self.vocab_size), prefixes)  # (N, V)
        noisy = noisy_scores(scores, self._draws(prefixes, scores.device)) if self._samples(prefixes) else scores
        chosen = likeliest(scores, noisy, min(num_guesses, self.vocab_size))
        if self.distributions is not None and self._samples(prefixes):
            self._keep(scores, prefixes, chosen.token_ids[:, 0].tolist(), self.distributions)
        return [_guesses(*row) for row in zip(*on_host(chosen.confidence, chosen.token_ids), strict=True)]

    def chooser(self, prefixes: Sequence[Prefix], num_guesses: int) -> Chooser | None:
        """What chooses as `propose` does, without a look at the host; None where that is not possible: why is said."""
        samples = self._samples(prefixes)
        if samples and self.distributions is not None:
            logger.info_once("Draft steps are launched one by one: rejection sampling keeps what guesses come from.")
            return None
        chooser = make_chooser(self.vocab_size, num_guesses, samples, self.processors)
        if chooser is None:
            names = ", ".join(type(each).__name__ for each in self.processors)
            logger.info_once(f"Draft steps are launched one by one: not all of {names} read scores and numbers alone.")
        return chooser

    def noise_rows(self, prefixes: Sequence[Prefix], num_steps: int, device: torch.device) -> list[list[NoiseRow]]:
        """The noise of `num_steps` guesses behind each prefix, for a `Chooser`: step by step; none if not sampling."""
        if not self._samples(prefixes):
            return []
        draws = [(source, position) for source, position in self._draws(prefixes, device) if source is not None]
        return [[source.row(position + step) for source, position in draws] for step in range(num_steps)]

    @staticmethod
    def guesses(chosen: Chosen) -> list[list[list[Guess]]]:
        """What was chosen in several steps, `(n, N, G)`: guesses per step and row."""
        steps = zip(*on_host(chosen.confidence, chosen.token_ids), strict=True)
        return [[_guesses(*row) for row in zip(*step, strict=True)] for step in steps]

    @staticmethod
    def _keep(
        scores: torch.Tensor, prefixes: Sequence[Prefix], drawn: list[int], distributions: DraftDistributions
    ) -> None:
        q = scores.softmax(dim=-1).nan_to_num(0.0)  # NaN where the processors exclude every token
        for prefix, token_id, row in zip(prefixes, drawn, q, strict=True):
            distributions.put(prefix.request_id, prefix.length, token_id, row)

    def _process(self, scores: torch.Tensor, prefixes: Sequence[Prefix]) -> torch.Tensor:
        if not self._needs_ids:
            return self.processors(None, scores)
        rows = []
        for row, prefix in enumerate(prefixes):
            padding = [self.pad_token_id] * self._admissions[prefix.request_id].num_padding
            ids = torch.tensor([padding + prefix.token_ids()], device=scores.device)
            rows.append(self.processors(ids, scores[row : row + 1]))
        return torch.cat(rows)

    def _samples(self, prefixes: Sequence[Prefix]) -> bool:
        return self._admissions[prefixes[0].request_id].seed is not None

    def _draws(self, prefixes: Sequence[Prefix], device: torch.device) -> list[Draw]:
        draws = []
        for request_id, length, _ in prefixes:
            if request_id not in self._noise:
                seed = self._admissions[request_id].seed
                if seed is None:
                    raise ValueError(f"request {request_id} is greedy among sampled ones")
                self._noise[request_id] = NoiseSource(seed, self.vocab_size, device, self._stream)
            draws.append(Draw(self._noise[request_id], length))
        return draws


def _guesses(confidences: Sequence[float], token_ids: Sequence[int]) -> list[Guess]:
    return [Guess(*guess) for guess in zip(token_ids, confidences, strict=True)]
