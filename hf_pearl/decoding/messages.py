"""What lanes and engine say to each other."""

from __future__ import annotations

from typing import NamedTuple

MAX_TREE_TOKENS = 64  # guesses of a published tree


class Branches(NamedTuple):
    """What the new tokens of a window follow where that is a branch of a tree, not all before them.

    All of them follow the first `num_common` tokens of the sequence; `paths[i]` are the places in the sequence of the
    further tokens that the `i`-th follows, from the tree's root on and itself included.
    """

    num_common: int
    paths: tuple[tuple[int, ...], ...]


class Window(NamedTuple):
    """New tokens of one sequence for one forward; logits are wanted after the last `num_logits` of them."""

    request_id: int
    token_ids: tuple[int, ...]
    num_logits: int
    branches: Branches | None = None


class Admission(NamedTuple):
    """A request begins. To the draft.

    `token_ids` is its prompt without padding, `max_length` the length at which it ends at the latest, `num_padding`
    the pad tokens that its row has in the user's batch, and `seed` its noise (None: greedy).
    """

    request_id: int
    token_ids: tuple[int, ...]
    max_length: int
    num_padding: int
    seed: int | None


class Verdict(NamedTuple):
    """The target's own next tokens of a request, numbered from 1. To the draft."""

    request_id: int
    number: int
    token_ids: tuple[int, ...]


class Removal(NamedTuple):
    """A request has ended. To the draft."""

    request_id: int


class TokenTree(NamedTuple):
    """What the draft guesses behind the first `root` tokens of a request, the likeliest guesses first. From the draft.

    `parents[i]` is the place here of the guess before the `i`-th, always an earlier one; -1 where it follows the root.
    `chances[i]` is the estimated probability that `token_ids[i]` stands if all before it do. `verdict` is the number of
    the last verdict the draft had seen, `num_steps` counts the draft steps of the call so far.
    """

    request_id: int
    verdict: int
    num_steps: int
    root: int
    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    chances: tuple[float, ...]


class Grant(NamedTuple):
    """Leave for `num_steps` draft steps, in the lockstep and sequential schedules. To the draft."""

    num_steps: int


class Rest(NamedTuple):
    """Draft no more, or go on. To the draft."""

    is_resting: bool


class DraftStep(NamedTuple):
    """When a draft step began and ended, in seconds, and over how many guesses it went."""

    started: float
    ended: float
    num_guesses: int


class DraftReport(NamedTuple):
    """What the draft did in a call. From the draft, at its end."""

    num_steps: int
    num_drafted: int
    num_prefilled: int
    timeline: tuple[DraftStep, ...]
