"""Which draft tokens stand, one position after the other: token equality with the target's own choices.

The target's choice is `argmax(scores + G)` with the position's fixed Gumbel noise `G` (no noise when greedy), which is
a sample from the target's distribution (Gumbel-max); a draft token stands iff it equals that choice (drafter-invariant
speculative decoding, Daliri, Musco and Suresh 2024, arXiv 2408.07978). The output is therefore a function of target,
processors, prompt and seed alone. With `sampler`, another rule chooses the tokens of sampled requests.

Shapes: `N` positions, `V` vocabulary, `R` rows of a slab, `t` tokens of a row, padding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .noisy_scores import Draw, noisy_max
from .on_host import on_host
from .rejection import RejectionSampler
from .request import Request
from .rules import Rules


class Verifier:
    """Turn the target's logits into verified tokens.

    Where processors and criteria read the scores alone, all positions are judged at once. Elsewhere positions are
    judged in order, each processor called exactly once per emitted token on the prefix transformers would show it.
    Processors, criteria and streamers that see the whole batch are called on slabs of equal length, when every
    row has reached it (`advances_together`); rows that are ahead wait with their logits.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        rules: Rules,
        device: torch.device,
        sampler: RejectionSampler | None = None,
    ) -> None:
        self.requests = requests
        self.rules = rules
        self._sampler = sampler
        self._eos_token_ids = rules.eos_token_ids
        self.advances_together = not rules.is_of_row
        self._at_once = rules.is_of_scores and rules.is_of_row
        if not self._at_once:
            groups = [[request] for request in requests] if rules.is_of_row else [list(requests)]
            self._slabs = [Slab(group, rules, device, sampler) for group in groups]

    @property
    def finished(self) -> bool:
        """Whether every row has ended."""
        return all(request.finished for request in self.requests)

    def judge(self) -> dict[int, tuple[int, ...]]:
        """Judge what waits; return the new verified tokens of every request that has some."""
        before = {request.request_id: len(request.verified) for request in self.requests}
        if self._at_once:
            self._judge_at_once()
        else:
            for slab in self._slabs:
                slab.judge()
        return {
            request.request_id: tuple(request.verified[before[request.request_id] :])
            for request in self.requests
            if len(request.verified) > before[request.request_id]
        }

    def _judge_at_once(self) -> None:
        waiting = [request for request in self.requests if request.pending]
        if not waiting:  # A piece of a long prompt.
            return
        logits = torch.stack([choice.logits for request in waiting for choice in request.pending]).float()
        scores = self.rules.processors(None, logits)  # (N, V)
        if self._sampler is not None:
            tokens = choose_by(self._sampler, scores, [(request, len(request.pending)) for request in waiting])
        else:
            draws = [draw for request in waiting for draw in _draws(request)] if self.rules.do_sample else None
            tokens = choose(scores, draws)
        first = 0
        for request in waiting:
            rows = {choice.behind: row for row, choice in enumerate(request.pending, start=first)}
            first += len(rows)
            while request.pending and not request.finished:
                row = rows[request.pending[0].behind]
                request.take(tokens[row])
                record(request, self.rules, scores[row], logits[row])
                request.finished = self._ends(request)

    def _ends(self, request: Request) -> bool:
        length = request.num_padding + len(request.verified)
        return request.verified[-1] in self._eos_token_ids or length >= self.rules.max_length


class Slab:
    """Rows that advance together, one position at a time."""

    def __init__(
        self, requests: list[Request], rules: Rules, device: torch.device, sampler: RejectionSampler | None = None
    ) -> None:
        self.requests = requests
        self.rules = rules
        self._sampler = sampler
        self._pads = rules.pads_finished_rows
        self._eos_token_ids = rules.eos_token_ids
        self._ends_by_last_token = rules.ends_by_last_token
        longest = max(request.num_padding + len(request.verified) for request in requests)
        self._fill = fill = 0 if rules.pad_token_id is None else rules.pad_token_id
        self._ids = torch.full((len(requests), longest + 256), fill, device=device)
        for row, request in enumerate(requests):
            self._ids[row, :longest] = torch.tensor([*request.padding, *request.verified], device=device)
        self.length = longest
        self._last = [fill] * len(requests)  # of every row, as in `_ids`: the host need not ask the device for it
        self._has_fired = [False] * len(requests)
        self._scores_so_far: tuple[torch.Tensor, ...] = ()

    def judge(self) -> None:
        """Advance as far as every row that goes on has logits waiting."""
        while not all(request.finished for request in self.requests) and all(
            request.pending or request.finished for request in self.requests
        ):
            self._advance()

    def _advance(self) -> None:
        live = [request for request in self.requests if not request.finished]
        width = live[0].pending[0].logits
        rows = [
            width.new_zeros(width.shape) if request.finished else request.pending[0].logits for request in self.requests
        ]
        logits = torch.stack(rows).to(torch.float32)  # (R, V)
        scores = self.rules.processors(self._ids[:, : self.length].contiguous(), logits)
        self._take(self._choose(scores), scores, logits)
        self._stop(scores)

    def _choose(self, scores: torch.Tensor) -> list[int]:
        if self._sampler is not None:
            rows = [row for row, request in enumerate(self.requests) if not request.finished]
            live = iter(choose_by(self._sampler, scores[rows], [(self.requests[row], 1) for row in rows]))
            return [0 if request.finished else next(live) for request in self.requests]
        draws = None
        if self.rules.do_sample:
            draws = [Draw(None) if request.finished else _draws(request)[0] for request in self.requests]
        return choose(scores, draws, [request.finished for request in self.requests])

    def _take(self, tokens: list[int], scores: torch.Tensor, logits: torch.Tensor) -> None:
        if self.length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.full_like(self._ids, self._fill)], dim=1)
        for row, request in enumerate(self.requests):
            self._last[row] = self._fill if request.finished else tokens[row]
            if not request.finished:
                request.take(tokens[row])
                record(request, self.rules, scores[row], logits[row])
                self._ids[row, self.length] = tokens[row]
        self.length += 1

    def _stop(self, scores: torch.Tensor) -> None:
        if self._ends_by_last_token:
            is_over = self.length >= self.rules.max_length
            fired = [is_over or token_id in self._eos_token_ids for token_id in self._last]
        else:
            fired = self._ask_criteria(scores)
        self._has_fired = [old or new for old, new in zip(self._has_fired, fired, strict=True)]
        for request, has_fired in zip(self.requests, self._has_fired, strict=True):
            request.finished = request.finished or (has_fired if self._pads else all(self._has_fired))
        if self.rules.streamer is not None:
            self._stream(self.rules.streamer)

    def _ask_criteria(self, scores: torch.Tensor) -> list[bool]:
        shown = None
        if self.rules.output_scores:
            self._scores_so_far = (*self._scores_so_far, scores)
            shown = self._scores_so_far
        fired = self.rules.criteria(self._ids[:, : self.length].contiguous(), shown)
        answers: list[bool] = torch.as_tensor(fired, device="cpu").expand(len(self.requests)).tolist()
        return answers

    def _stream(self, streamer: Any) -> None:
        """Show the last token of every row; a streamer with `put_verified` also hears which the draft had guessed."""
        token_ids = torch.tensor(self._last, device="cpu")  # (R,)
        if hasattr(streamer, "put_verified"):
            streamer.put_verified(token_ids, [request.was_drafted for request in self.requests])
        else:
            streamer.put(token_ids)


def choose(scores: torch.Tensor, draws: Sequence[Draw] | None, ignored: Sequence[bool] = ()) -> list[int]:
    """The target's choice per row of `scores` `(N, V)`; ties go to the lowest id.

    Raises
    ------
    ValueError
        Sampling from scores that are no distribution (NaN, or every token excluded).
    """
    if draws is None:
        return scores.argmax(dim=-1).tolist()
    values, token_ids = on_host(*noisy_max(scores, draws))
    check_finite(values, ignored)
    return token_ids


def choose_by(sampler: RejectionSampler, scores: torch.Tensor, counts: Sequence[tuple[Request, int]]) -> list[int]:
    """The token per row of `scores` `(N, V)` as `sampler` chooses it; raises as `choose` does."""
    tokens = sampler.choose(scores, counts)
    check_finite(sampler.largest)
    return tokens


def check_finite(values: Sequence[float], ignored: Sequence[bool] = ()) -> None:
    """Refuse to sample where the best score of a row, one of `N` `values`, is none."""
    for row, value in enumerate(values):
        if not math.isfinite(value) and not (ignored and ignored[row]):
            raise ValueError(
                f"sampling needs scores with a finite maximum, got {value} after the logits processors. Check the "
                f"model for overflow (float16?) and the processors for excluding every token, or pass "
                f"`remove_invalid_values=True`."
            )


def record(request: Request, rules: Rules, scores: torch.Tensor, logits: torch.Tensor) -> None:
    """Keep a position's processed scores and raw logits `(V,)` where the call asks for them; copies, not the window."""
    if rules.output_scores:
        request.scores.append(scores.clone())
    if rules.output_logits:
        request.logits.append(logits.clone())


def _draws(request: Request) -> list[Draw]:
    """Of the position of every choice that waits: guesses for one position share its noise."""
    if request.noise is None:
        raise ValueError(f"request {request.request_id} has no noise to sample with")
    first = len(request.verified) - request.pending[0].depth
    return [Draw(request.noise, first + choice.depth) for choice in request.pending]
