"""Models that compute nothing: a recorded trace says what they would say.

A trace says of every position whether the draft would have guessed the target's token there, and how sure it was, and
perhaps which token it was. Where it does not, all of the target's tokens are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from .messages import MAX_TREE_TOKENS, Window
from .proposal import Guess, Prefix, Proposer


class TracedGuess(NamedTuple):
    """The draft's guesses at one position.

    Attributes
    ----------
    stands : bool
        Whether the likeliest was the target's token.
    probability : float
        What the draft gave it.
    rank : int or None
        Which of its guesses was the target's token; None: none of them.
    others : tuple of float
        How near the second, third, ... came to the first (`Guess.confidence`).
    token_id : int or None
        The target's token, if that is recorded: nothing can be looked up in a text whose tokens are not known.
    guess_ids : tuple of int
        The draft's guesses, the likeliest first, if they are recorded: the text so far may go on behind a wrong one.
    """

    stands: bool
    probability: float
    rank: int | None = None
    others: tuple[float, ...] = ()
    token_id: int | None = None
    guess_ids: tuple[int, ...] = ()


def has_tokens(traces: Sequence[Sequence[TracedGuess]]) -> bool:
    """Whether the tokens of all traces are recorded."""
    return all(traced.token_id is not None for trace in traces for traced in trace)


def _token_ids(prompt_ids: Sequence[int], trace: Sequence[TracedGuess]) -> list[int]:
    """What follows the first token of a prompt: the rest of it, and the tokens of the trace."""
    return [*prompt_ids[1:], *(1 if traced.token_id is None else traced.token_id for traced in trace)]


class RecordedLane:
    """A lane that computes nothing: it keeps the lengths of its sequences, and its logits say what traces say.

    Parameters
    ----------
    reads_prompts : bool
        Whether it computes prompts, in one forward. Otherwise all of a prompt but its last token is in the cache from
        the beginning.
    """

    num_warm_ups = 0

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        traces: Sequence[Sequence[TracedGuess]],
        advance: Callable[[Sequence[Window]], None] = lambda windows: None,
        reads_prompts: bool = False,
    ) -> None:
        self._token_ids = [_token_ids(*row) for row in zip(prompts, traces, strict=True)]
        self._vocab_size = 1 + max(max(token_ids) for token_ids in self._token_ids)
        self._lengths: dict[int, int] = {}
        self._advance = advance
        self._reads_prompts = reads_prompts

    def admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> int:
        """Begin a sequence."""
        self._lengths[request_id] = 0 if self._reads_prompts else len(token_ids) - 1
        return self._lengths[request_id]

    def fork(self, request_id: int, new_id: int, length: int) -> None:
        """Begin a sequence with a part of another."""
        self._lengths[new_id] = length

    def length(self, request_id: int) -> int:
        """Tokens of a sequence so far."""
        return self._lengths[request_id]

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """Let the time of a forward pass; `(sum of num_logits, vocab_size)`."""
        right: list[int] = []
        for window in windows:
            start = self._lengths[window.request_id]
            self._lengths[window.request_id] += len(window.token_ids)
            token_ids = self._token_ids[window.request_id]
            lengths = [start + 1 + place for place in range(len(window.token_ids))]
            if window.branches is not None:
                lengths = [window.branches.num_common + len(path) for path in window.branches.paths]
            right += [token_ids[min(length, len(token_ids)) - 1] for length in lengths[-window.num_logits :]]
        self._advance(windows)
        return torch.nn.functional.one_hot(
            torch.tensor(right, dtype=torch.long, device="cpu"), self._vocab_size
        ).float()

    def rollback(self, request_id: int, length: int) -> None:
        """Drop tokens."""
        self._lengths[request_id] = length

    def keep(self, request_id: int, num_first: int, places: Sequence[int]) -> None:
        """Drop tokens between others."""
        self._lengths[request_id] = num_first + len(places)

    def release(self, request_id: int, verified: Sequence[int]) -> None:
        """End a sequence."""
        del self._lengths[request_id]


class RecordedProposer(Proposer):
    """Guesses from a trace; behind a guess that is wrong, every further one is wrong too.

    Wrong ones are negative, unless the trace says which token was guessed. Behind a wrong one the same is guessed then
    as behind the right one: none of it can stand.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], traces: Sequence[Sequence[TracedGuess]]) -> None:
        super().__init__(2, LogitsProcessorList())
        self._prompts, self._traces = prompts, traces
        self._token_ids = [_token_ids(*row) for row in zip(prompts, traces, strict=True)]

    def propose(self, logits: torch.Tensor, prefixes: Sequence[Prefix], num_guesses: int = 1) -> list[list[Guess]]:
        """The traced guesses."""
        return [self._guesses(prefix)[:num_guesses] for prefix in prefixes]

    def _guesses(self, prefix: Prefix) -> list[Guess]:
        trace, token_ids = self._traces[prefix.request_id], self._token_ids[prefix.request_id]
        place = min(prefix.length, len(token_ids)) - 1  # A row that ends before others goes on as it ended.
        traced = trace[place + 1 - len(self._prompts[prefix.request_id])]
        if traced.guess_ids:
            return list(map(Guess, traced.guess_ids, (traced.probability, *traced.others)))
        # What is further back than the longest line is verified.
        is_right = token_ids[: prefix.length - 1][-MAX_TREE_TOKENS:] == prefix.token_ids()[1:][-MAX_TREE_TOKENS:]
        rank = (0 if traced.stands else traced.rank) if is_right else None
        confidences = (traced.probability, *traced.others)
        right = token_ids[place]
        return [Guess(right if place == rank else -1 - place, each) for place, each in enumerate(confidences)]
