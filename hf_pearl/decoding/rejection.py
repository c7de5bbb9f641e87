"""Rejection sampling, the second way to decide which draft tokens stand (Leviathan et al. 2023, arXiv 2211.17192).

At a position with the target's distribution `p` and the draft's `q`, the draft drew a token `x` from `q`. It stands
with probability `min(1, p(x) / q(x))`; else the token is drawn from the residual, `max(p - q, 0)` over its sum. So

    P(y) = q(y) min(1, p(y) / q(y)) + P(x does not stand) max(p(y) - q(y), 0) / sum(max(p - q, 0)) = p(y)

as both sums are the total variation TV of `p` and `q`: the law is the target's. A guess stands with `1 - TV`; with
shared noise (`verification.py`) with `(1 - TV) / (1 + TV)` at least. But here the answer depends on draft and schedule.

Why this is exact in PEARL, too, where the draft goes on while its tokens are verified. What is random at position `i`
is `D_i` (the draft's token), `U_i` (its test) and `R_i` (what replaces it, or stands where there is no guess): streams
of the request's generator that are independent of each other and of those of all other positions. Two things matter.

1. *Given the tokens before `i`, the guess at `i` is a sample from `q`.* It is a function of these tokens and of `D_i`,
   whenever it is drawn, and drawn again behind the same tokens it is the same. One that was drawn behind other tokens,
   with the same `D_i`, was dropped because of a rejection before `i`, in which `D_i` had no part.
2. *Whether a guess at `i` is judged does not depend on `D_i`, `U_i`, `R_i`.* It depends on how far the draft has come:
   one line, a fixed number of steps per forward whatever the guesses are, and on lengths, memory and time.

Every guess that is known when the target's distribution at its position is, is judged, whether or not it was in the
target's forward. So the first guess behind the window, drafted meanwhile, is judged too (PEARL's pre-verify, arXiv
2408.11850); a token drawn from `p` there would be exact, but would seldom be the one that the draft has gone on from.
A guess that is not judged is dropped with a token before it, never for its own value. A tree, a line that ends where it
becomes unlikely, or a guess that is taken from the text would break (1) or (2), and are not used.

Shapes: `N` rows, `V` the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .noise import ACCEPT_STREAM, RESIDUAL_STREAM, NoiseSource
from .on_host import on_host
from .request import PendingChoice, Request


def stands(p: torch.Tensor, q: torch.Tensor, guesses: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Whether each guess stands: `u < p(x) / q(x)`.

    Parameters
    ----------
    p, q : torch.Tensor
        `(N, V)`, float32. A row of `q` that is all zero means that there is no guess: it never stands.
    guesses : torch.Tensor
        `(N,)`, int64: `x`, drawn from `q`.
    uniforms : torch.Tensor
        `(N,)`, float64 (float32 on MPS), in (0, 1): `u`, independent of `x`.

    Returns
    -------
    torch.Tensor
        `(N,)`, bool.
    """
    p_guess, q_guess = (_widened(each.gather(1, guesses[:, None])[:, 0]) for each in (p, q))
    return (q_guess > 0) & (uniforms * q_guess < p_guess)


def _widened(values: torch.Tensor) -> torch.Tensor:
    """Values in float64, which MPS has not."""
    return values if values.device.type == "mps" else values.double()


def correct(p: torch.Tensor, q: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The token in the place of a guess that does not stand: `argmax(log max(p - q, 0) + R)`.

    That is a sample from the residual (Gumbel-max; it needs no normalisation), and from `p` where `q` is all zero.

    Parameters
    ----------
    p, q : torch.Tensor
        `(N, V)`, float32.
    noise : torch.Tensor
        `(N, V)`, float32: `R`, Gumbel noise independent of the guess and of its test.

    Returns
    -------
    torch.Tensor
        `(N,)`, int64.
    """
    residual = (p - q).clamp(min=0.0)
    is_empty = residual.sum(dim=-1, keepdim=True) == 0.0  # `p` is `q` but for rounding: the chance of this is as small
    return (torch.where(is_empty, p, residual).log() + noise).argmax(dim=-1)


class RejectionSampler:
    """The choices of a call's requests by rejection sampling; what is random of each comes from its seed.

    Parameters
    ----------
    device : torch.device
        Where the target's logits are.

    Attributes
    ----------
    largest : list of float
        The largest score of every row of the last choice: where it is none, nothing was chosen.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._seeds = {request.request_id: request.seed for request in requests}
        self._device = device
        self.largest: list[float] = []
        self._tests: dict[int, NoiseSource] = {}
        self._residuals: dict[int, NoiseSource] = {}

    def choose(self, scores: torch.Tensor, counts: Sequence[tuple[Request, int]]) -> list[int]:
        """The token at each position that waits: the guess where it stands, else what replaces it.

        Parameters
        ----------
        scores : torch.Tensor
            `(N, V)`, processed; of every request in turn, its first waiting positions.
        counts : sequence of (Request, int)
            How many rows are whose. What lies behind a guess that does not stand has no meaning.
        """
        p = scores.softmax(dim=-1)
        choices = [request.pending[place] for request, count in counts for place in range(count)]
        q, tokens = self._drafted(choices, p)
        uniforms = torch.cat([self._uniforms(request, count) for request, count in counts])
        stand = stands(p, q, torch.tensor(tokens, device=p.device), uniforms)
        self.largest, stood = on_host(scores.amax(dim=-1), stand.long())
        rows, noise, row = [], [], 0
        for request, count in counts:
            place = next((place for place in range(count) if not stood[row + place]), None)
            if place is not None:
                rows.append(row + place)
                noise.append(self._source(self._residuals, request, p.shape[1], RESIDUAL_STREAM, place))
            row += count
        if rows:
            for row, token in zip(rows, correct(p[rows], q[rows], torch.cat(noise)).tolist(), strict=True):
                tokens[row] = token
        return tokens

    def _drafted(self, choices: Sequence[PendingChoice], p: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Of every position, `q` `(N, V)` and the guess; zeros where there is none."""
        q, guesses = torch.zeros_like(p), [0] * len(choices)
        for row, choice in enumerate(choices):
            if choice.guess is not None and choice.q is not None:
                q[row], guesses[row] = choice.q, choice.guess
        return q, guesses

    def _uniforms(self, request: Request, count: int) -> torch.Tensor:
        noise = self._source(self._tests, request, 1, ACCEPT_STREAM, 0, count)
        return (-(-_widened(noise[:, 0])).exp()).exp()  # the distribution function of Gumbel's law: uniform

    def _source(
        self, sources: dict[int, NoiseSource], request: Request, size: int, stream: int, place: int, count: int = 1
    ) -> torch.Tensor:
        """Noise `(count, size)` of a request's stream, from the `place`-th position behind its verified tokens on."""
        if request.request_id not in sources:
            seed = self._seeds[request.request_id]
            if seed is None:
                raise ValueError(f"request {request.request_id} has no seed to sample with")
            sources[request.request_id] = NoiseSource(seed, size, self._device, stream)
        return sources[request.request_id].rows(len(request.verified) + place, count)
