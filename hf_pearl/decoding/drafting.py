"""The draft's side of the decoding: it grows a tree of guesses per request, and a verdict prunes it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from ..errors import PearlOutOfBlocksError
from .calibration import Calibration
from .draft_tree import DraftTree
from .messages import Admission, DraftReport, Line, Removal, Verdict, Window
from .proposal import Proposer

MAX_LINE = 32
# A line that is less likely than this to stand is not drafted further: the step would more often delay the restart
# after a rejection than be of use. In simulation 0.05 gave 2 to 4% more tokens per second than 0, and 0.1 no more.
MIN_CHANCE = 0.05
MAX_PREFILL_TOKENS = 1024


class Lane(Protocol):
    """What the decoding asks of a model on its cache; `parallel.lane.ModelLane` is the real one."""

    def admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> int:
        """Begin a sequence of `max_length` tokens in the end; return how many of them are already in the cache."""

    def fork(self, request_id: int, new_id: int, length: int) -> None:
        """Begin a sequence with the first `length` tokens of another."""

    def length(self, request_id: int) -> int:
        """How many tokens of a sequence are in the cache."""

    def forward(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute new tokens; return the logits `(sum of num_logits, vocab_size)`."""

    def rollback(self, request_id: int, length: int) -> None:
        """Drop a sequence's tokens from position `length` on."""

    def release(self, request_id: int, verified: Sequence[int]) -> None:
        """End a sequence whose `verified` tokens may be found again."""


class Drafter:
    """Draft steps over all requests of a call. Single-threaded; whoever runs the lane calls it.

    Parameters
    ----------
    lane : Lane
        The draft model on its cache.
    proposer : Proposer
        Turns draft logits into guesses.
    max_line : int
        Guesses beyond the verified tokens at which a line waits for a verdict.
    free_running : bool
        Whether an unlikely line is left alone. Otherwise every granted step lengthens every line, so that nothing
        depends on what was learnt in earlier calls.
    """

    def __init__(
        self,
        lane: Lane,
        proposer: Proposer,
        calibration: Calibration,
        max_line: int = MAX_LINE,
        free_running: bool = True,
    ) -> None:
        self.lane = lane
        self.proposer = proposer
        self.max_line = max_line
        self.min_chance = MIN_CHANCE if free_running else 0.0
        self.calibration = calibration
        self.trees: dict[int, DraftTree] = {}
        self.num_steps = 0
        self.step_seconds = 0.0
        self.num_drafted = 0
        self.num_wasted = 0
        self.num_prefilled = 0
        self.intervals: list[tuple[float, float]] = []
        self._probabilities: dict[int, list[float]] = {}
        self._leaders: dict[tuple[int, ...], int] = {}  # prompt -> the request that computes it
        self._followed: dict[int, tuple[int, int]] = {}  # waiting request -> its leader, length of their prompt
        self._is_out_of_memory = False

    def handle(self, message: Admission | Verdict | Removal) -> None:
        """Do what a message says."""
        if isinstance(message, Verdict):
            self.verdict(message)
        elif isinstance(message, Admission):
            self.admit(message)
        else:
            self.remove(message)

    def admit(self, message: Admission) -> None:
        """Begin a request; one with the same prompt as another waits until that is computed."""
        leader = self._leaders.setdefault(message.token_ids, message.request_id)
        if leader == message.request_id:
            self._admit(message.request_id, message.token_ids, message.max_length)
        else:
            self._followed[message.request_id] = leader, len(message.token_ids)
        self.trees[message.request_id] = DraftTree(message.token_ids, message.max_length)
        self._probabilities[message.request_id] = []
        self.proposer.admit(message)

    def _admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> None:
        num_cached = self.lane.admit(request_id, token_ids, max_length)
        self.num_prefilled += len(token_ids) - num_cached

    def _fork_followers(self) -> None:
        """Give every request that waits for another one's prompt its share of it, all but the last token."""
        for follower, (leader, num_prompt) in list(self._followed.items()):
            tree = self.trees[follower]
            if leader not in self.trees:
                self._admit(follower, tree.verified, tree.max_length)
            elif self.lane.length(leader) >= num_prompt:
                self.lane.fork(leader, follower, num_prompt - 1)
                self.num_prefilled += 1
            else:
                continue
            del self._followed[follower]

    def verdict(self, message: Verdict) -> None:
        """Move a request's root; keep what agrees, roll the cache back behind it."""
        tree = self.trees[message.request_id]
        self._learn(message)
        unchanged = tree.prune(message.number, message.token_ids)
        if message.request_id not in self._followed and unchanged < self.lane.length(message.request_id):
            self.lane.rollback(message.request_id, unchanged)

    def _learn(self, message: Verdict) -> None:
        probabilities = self._probabilities[message.request_id]
        line, num_stood = self.trees[message.request_id].line, 0
        for guess, probability, token in zip(line, probabilities, message.token_ids, strict=False):
            self.calibration.judge(probability, guess == token)
            if guess != token:
                break
            num_stood += 1
        stands = num_stood == len(message.token_ids)
        self._probabilities[message.request_id] = probabilities[num_stood:] if stands else []

    def remove(self, message: Removal) -> None:
        """End a request."""
        tree = self.trees.pop(message.request_id)
        self.num_drafted += tree.num_drafted
        self.num_wasted += tree.num_wasted + len(tree.line)
        self._probabilities.pop(message.request_id)
        self.proposer.remove(message)
        if self._followed.pop(message.request_id, None) is None:
            self.lane.release(message.request_id, tree.verified)
        self._is_out_of_memory = False

    def has_work(self) -> bool:
        """Whether any line may grow."""
        return not self._is_out_of_memory and any(self._may_grow(tree) for tree in self.trees.values())

    def _may_grow(self, tree: DraftTree) -> bool:
        return tree.room > 0 and len(tree.line) < self.max_line and tree.chance >= self.min_chance

    def step(self) -> list[Line]:
        """One draft forward: one more guess for every line that may grow; return these lines."""
        self.num_steps += 1
        if not self.has_work():
            return []
        started = time.perf_counter()
        self._fork_followers()
        growing = [i for i, tree in self.trees.items() if i not in self._followed and self._may_grow(tree)]
        windows = [self._window(request_id) for request_id in growing]
        try:
            logits = self.lane.forward(windows)
        except PearlOutOfBlocksError:
            self._is_out_of_memory = True  # Only a guess is lost; the target needs no draft.
            return []
        ready = [window.request_id for window in windows if window.num_logits]
        if ready:
            for guess in self.proposer.propose(logits, [(i, self.trees[i]) for i in ready]):
                chance = self.calibration.chance(guess.probability)
                self.trees[guess.request_id].extend(guess.token_id, chance)
                self._probabilities[guess.request_id].append(guess.probability)
        ended = time.perf_counter()
        self.intervals.append((started, ended))
        if all(len(window.token_ids) <= 4 for window in windows):  # Prefill says nothing about a draft step.
            seconds = ended - started
            self.step_seconds = 0.9 * self.step_seconds + 0.1 * seconds if self.step_seconds else seconds
        return [self.line(request_id) for request_id in ready]

    def _window(self, request_id: int) -> Window:
        tokens = self.trees[request_id].tokens_from(self.lane.length(request_id))
        if len(tokens) > MAX_PREFILL_TOKENS:
            return Window(request_id, tuple(tokens[:MAX_PREFILL_TOKENS]), 0)
        return Window(request_id, tuple(tokens), 1)

    def report(self) -> DraftReport:
        """What the draft did in this call; every request must have been removed."""
        return DraftReport(
            len(self.intervals), self.num_drafted, self.num_wasted, self.num_prefilled, tuple(self.intervals)
        )

    def line(self, request_id: int) -> Line:
        """The best line of a request as it stands."""
        tree = self.trees[request_id]
        return Line(request_id, tree.verdict_number, self.num_steps, tree.root, tuple(tree.line), tuple(tree.chances))
