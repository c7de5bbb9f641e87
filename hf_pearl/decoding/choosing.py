"""How the draft chooses its guesses, as far as that is a function of scores and noise.

Nothing here reads a value on the host, so that it may be part of what is captured in a CUDA graph.

Shapes: `N` rows, `V` the target's vocabulary, `G` guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import LogitsProcessorList

from .noisy_scores import add_noise
from .processors import is_of_scores

Parameters = tuple[tuple[str, int | float | None], ...]


class Chosen(NamedTuple):
    """The likeliest guesses per row, and how sure the draft is of each (`proposal.Guess`).

    Attributes
    ----------
    token_ids : torch.Tensor
        `(N, G)`, int64, the draft's own token first; or `(n, N, G)` of `n` steps.
    confidence : torch.Tensor
        The same shape, float32.
    """

    token_ids: torch.Tensor
    confidence: torch.Tensor


@dataclass(frozen=True)
class Chooser:
    """From logits to guesses under processors of the scores alone. Two are equal if they choose alike.

    Attributes
    ----------
    vocab_size : int
        The target's.
    num_guesses : int
        Per row; no more than there are tokens.
    samples : bool
        Whether noise is added.
    processors : LogitsProcessorList
        All of them functions of scores and of plain numbers.
    parameters : tuple
        These numbers, by class.
    """

    vocab_size: int
    num_guesses: int
    samples: bool
    processors: LogitsProcessorList = field(compare=False)
    parameters: tuple[tuple[type, Parameters], ...]

    def choose(self, logits: torch.Tensor, noise_rows: torch.Tensor) -> Chosen:
        """Choose by logits `(N, draft vocabulary)`, with the noise that `noise_rows` `(N, 4)` says if sampling."""
        scores = self.processors(None, fit(logits, self.vocab_size))
        return likeliest(scores, add_noise(scores, noise_rows) if self.samples else scores, self.num_guesses)


def make_chooser(vocab_size: int, num_guesses: int, samples: bool, processors: LogitsProcessorList) -> Chooser | None:
    """What chooses as `Proposer` does; None where a processor reads more than scores and plain numbers."""
    parameters = [(type(each), _parameters(vars(each))) for each in processors if is_of_scores(each)]
    known = tuple((kind, numbers) for kind, numbers in parameters if numbers is not None)
    if len(known) < len(processors):
        return None
    return Chooser(vocab_size, min(num_guesses, vocab_size), samples, processors, known)


def _parameters(attributes: dict[str, Any]) -> Parameters | None:
    """Plain numbers, by name; None where there is anything else, such as a tensor, whose content may change."""
    if any(not isinstance(value, int | float | None) for value in attributes.values()):
        return None
    return tuple(sorted(attributes.items()))


def fit(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits, float32, cut or padded to the target's vocabulary: `(N, V)`."""
    logits = logits[:, :vocab_size].float()
    missing = vocab_size - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def likeliest(scores: torch.Tensor, noisy: torch.Tensor, num_guesses: int) -> Chosen:
    """The largest of `noisy` `(N, V)`, which are `scores`, with noise where sampling."""
    token_ids = noisy.argmax(dim=-1, keepdim=True) if num_guesses == 1 else noisy.topk(num_guesses, dim=-1).indices
    first = token_ids[:, :1]
    confidence = (scores.gather(1, first) - scores.logsumexp(dim=-1, keepdim=True)).exp()
    if num_guesses > 1:
        gaps = noisy.gather(1, token_ids[:, 1:]) - noisy.gather(1, first)
        confidence = torch.cat([confidence, gaps.sigmoid()], dim=1)
    return Chosen(token_ids, confidence.nan_to_num(0.0))  # NaN where the processors exclude every token
