"""The draft's side of the decoding: it grows a tree of guesses per request, and a verdict prunes it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

from ..errors import PearlOutOfBlocksError
from .calibration import MAX_RANKS, Calibration
from .chaining import VerdictTimes, chain_length
from .draft_tree import MAX_LINE, Candidate, DraftTree, Node
from .draft_windows import draft_window
from .lanes import ChainingLane, Lane
from .messages import MAX_TREE_TOKENS, Admission, DraftReport, DraftStep, Removal, TokenTree, Verdict, Window
from .policy import ForwardTimes
from .proposal import Guess, Prefix, Proposer

# A guess that is less likely than this to stand is not drafted further: the step would more often delay the restart
# after a rejection than be of use. In simulation 0.02 gave 1 to 4% more tokens per second than 0, and 0.05 no more.
MIN_CHANCE = 0.02
MAX_WIDTH = 8
MAX_CATCH_UP = 4  # verified tokens in a draft step; more are a prompt, or missed while resting, and take another time

Choice = tuple[DraftTree, int, Node]  # a guess to compute, its tree, and its request


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
        Whether the likeliest guesses grow, as many at a time as pays, and unlikely ones are left alone. Otherwise every
        granted step lengthens the one line of every request, so that nothing depends on what was learnt before.
    max_width : int
        Guesses that a step computes at most, if it has no more requests; 1 is one line.
    """

    def __init__(
        self,
        lane: Lane,
        proposer: Proposer,
        calibration: Calibration,
        max_line: int = MAX_LINE,
        free_running: bool = True,
        max_width: int = MAX_WIDTH,
    ) -> None:
        self.lane = lane
        self._chaining = lane if isinstance(lane, ChainingLane) and lane.chains else None
        self.proposer = proposer
        self.max_line = max_line
        self.free_running = free_running
        self.max_width = max_width if free_running else 1
        self.num_guesses = min(MAX_RANKS, self.max_width)
        self.calibration = calibration
        self.trees: dict[int, DraftTree] = {}
        self.num_steps = 0
        self.step_times = ForwardTimes()
        self._verdict_times = VerdictTimes()
        self.num_drafted = 0
        self.num_prefilled = 0
        self.timeline: list[DraftStep] = []
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
        self.proposer.admit(message)

    def _admit(self, request_id: int, token_ids: Sequence[int], max_length: int) -> None:
        num_cached = self.lane.admit(request_id, token_ids, max_length)
        self.num_prefilled += len(token_ids) - num_cached

    def _fork_followers(self) -> None:
        """Give every request that waits for another one's prompt its share of it, all but the last token."""
        for follower, (leader, num_prompt) in list(self._followed.items()):
            tree = self.trees[follower]
            leading = self.trees.get(leader)
            if leading is None or not leading.has_room(leading.root):  # It will not compute its prompt.
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
        self._verdict_times.hear(message.request_id)
        pruned = tree.prune(message.number, message.token_ids)
        self._learn(pruned.judged)
        if message.request_id not in self._followed and self.lane.length(message.request_id) > pruned.num_first:
            self.lane.keep(message.request_id, pruned.num_first, pruned.places)

    def _learn(self, judged: Sequence[tuple[Node, int]]) -> None:
        for node, token_id in judged:
            for rank, child in enumerate(node.children):
                if child.candidate is not None:
                    self.calibration.judge(child.candidate.confidence, child.token_id == token_id, rank)

    def remove(self, message: Removal) -> None:
        """End a request."""
        tree = self.trees.pop(message.request_id)
        self.num_drafted += tree.num_drafted
        self.proposer.remove(message)
        self._verdict_times.forget(message.request_id)
        if self._followed.pop(message.request_id, None) is None:
            self._drop_guesses(message.request_id, tree)
            self.lane.release(message.request_id, tree.verified)
        self._is_out_of_memory = False

    def has_work(self) -> bool:
        """Whether any guess may be drafted further."""
        if self._is_out_of_memory:
            return False
        least = MIN_CHANCE if self.free_running else 0.0
        return any(node.path_chance >= least for tree in self.trees.values() for node in self._leaves(tree))

    def _leaves(self, tree: DraftTree) -> Iterator[Node]:
        """The guesses that have room for another one behind them."""
        return (node for node in tree.leaves() if tree.has_room(node) and node.depth < self.max_line)

    def _choose(self) -> list[Choice]:
        """The guesses that the next step computes: in lockstep all, else the likeliest, as many as pay."""
        found = [
            (tree, request_id, node)
            for request_id, tree in self.trees.items()
            if request_id not in self._followed
            for node in self._leaves(tree)
        ]
        if not self.free_running:
            return found
        found.sort(key=lambda each: -each[2].path_chance)
        return found[: self._width([node.path_chance for *_, node in found])]

    def _width(self, chances: Sequence[float]) -> int:
        """How many of the likeliest guesses, by their chances, make a step that gains most per second."""
        row_cost = self.row_cost
        gained, steps = 0.0, 1.0 - row_cost
        most = max(self.max_width, len(self.trees))
        for width, chance in enumerate(chances[:most]):
            if width and chance * steps < row_cost * gained:
                return width
            gained, steps = gained + chance, steps + row_cost
        return most

    @property
    def step_seconds(self) -> float:
        """Seconds of a draft step; 0.0 while unknown."""
        return self.step_times.seconds(1)

    @property
    def row_cost(self) -> float:
        """What one more guess in a step costs, in steps."""
        seconds = self.step_times.seconds(1)
        return self.step_times.per_token / seconds if seconds > 0 else 0.1

    @property
    def num_unheard(self) -> int:
        """How many steps may be made without hearing a verdict; it may come anywhere in them."""
        return 1 if self._chaining is None else self._verdict_times.num_steps(self.step_seconds)

    def step(self, most: int = 1) -> list[TokenTree]:
        """A draft step over the guesses that are likeliest to stand; return what is guessed of their requests.

        Up to `most` steps are made where they fit into one launch, each over the likeliest guess behind those of the
        one before.
        """
        self.num_steps += 1
        if not self.has_work():
            return []
        started, num_warm_ups = time.perf_counter(), self.lane.num_warm_ups
        self._fork_followers()
        chosen = self._choose()
        if not chosen:
            return []
        chosen.sort(key=lambda each: each[1])  # the nodes of a request side by side, in the order of their chances
        windows = self._windows(chosen)
        computed = {window.request_id for window in windows if window.num_logits}
        behind = [each for each in chosen if each[1] in computed]
        try:
            steps = self._chain(windows, behind, most) or [self._propose(windows, behind)]
        except PearlOutOfBlocksError:
            self._give_up()
            return []
        self._grow(behind, steps)
        self.num_steps += len(steps) - 1
        seconds = (time.perf_counter() - started) / len(steps)
        is_prefill = any(len(window.token_ids) > MAX_CATCH_UP and not window.branches for window in windows)
        for start in (started + seconds * place for place in range(len(steps))):
            self.timeline.append(DraftStep(start, start + seconds, len(chosen)))
            if not is_prefill and self.lane.num_warm_ups == num_warm_ups:
                self.time_step(len(chosen), seconds)
        return [self.token_tree(request_id) for request_id in computed]

    def time_step(self, num_guesses: int, seconds: float) -> None:
        """Learn what a draft step costs."""
        self.step_times.record(num_guesses, seconds)

    def _chain(self, windows: Sequence[Window], behind: Sequence[Choice], most: int) -> list[list[list[Guess]]]:
        """What is guessed in several steps, if they can be made in one launch; else nothing."""
        lane = self._chaining
        is_of_guesses = all(window.num_logits == len(window.token_ids) for window in windows)
        if most == 1 or lane is None or self._followed or not is_of_guesses:
            return []
        rooms = [tree.max_length - 1 - tree.length(node) for tree, _, node in behind]
        depths = [self.max_line - node.depth for *_, node in behind]
        num_steps, prefixes = chain_length(min(most, *rooms, *depths)), self._prefixes(behind)
        chooser = self.proposer.chooser(prefixes, self.num_guesses)
        if num_steps == 1 or chooser is None:
            return []
        chosen = lane.chain(windows, num_steps, chooser, self.proposer.noise_rows(prefixes, num_steps, lane.device))
        return [] if chosen is None else self.proposer.guesses(chosen)

    def _propose(self, windows: Sequence[Window], behind: Sequence[Choice]) -> list[list[Guess]]:
        logits = self.lane.forward(windows)
        return self.proposer.propose(logits, self._prefixes(behind), self.num_guesses) if behind else []

    @staticmethod
    def _prefixes(behind: Sequence[Choice]) -> list[Prefix]:
        return [Prefix(request_id, tree.length(node), partial(tree.tokens, node)) for tree, request_id, node in behind]

    def _grow(self, behind: Sequence[Choice], steps: Sequence[Sequence[Sequence[Guess]]]) -> None:
        """Take what was guessed behind some nodes, then behind the likeliest of these guesses, and so on."""
        for num_left, guesses in zip(range(len(steps), 0, -1), steps, strict=True):
            for request_id, group in groupby(zip(behind, guesses, strict=True), key=lambda each: each[0][1]):
                found = list(group)
                first = self.lane.length(request_id) - len(found) * num_left
                for place, ((tree, _, node), row) in enumerate(found, start=first):
                    tree.computed(node, place, [self._candidate(*each) for each in enumerate(row)])
            if num_left > 1:
                behind = [(tree, request_id, node.children[0]) for tree, request_id, node in behind]

    def _candidate(self, rank: int, guess: Guess) -> Candidate:
        return Candidate(guess.token_id, guess.confidence, self.calibration.chance(guess.confidence, rank))

    def _windows(self, chosen: Sequence[Choice]) -> list[Window]:
        """One window per request: what is verified and not computed, or guesses."""
        return [
            draft_window(request_id, self.trees[request_id], [node for *_, node in nodes], self.lane.length(request_id))
            for request_id, nodes in groupby(chosen, key=lambda each: each[1])
        ]

    def _give_up(self) -> None:
        """Memory has run out: drop all guesses, and draft no more until a request has ended."""
        self._is_out_of_memory = True  # Only guesses are lost; the target needs no draft.
        for request_id, tree in self.trees.items():
            if request_id not in self._followed:
                self._drop_guesses(request_id, tree)

    def _drop_guesses(self, request_id: int, tree: DraftTree) -> None:
        tree.drop_guesses()
        if self.lane.length(request_id) > tree.num_verified - 1:
            self.lane.rollback(request_id, tree.num_verified - 1)

    def report(self) -> DraftReport:
        """What the draft did in this call; every request must have been removed."""
        return DraftReport(len(self.timeline), self.num_drafted, self.num_prefilled, tuple(self.timeline))

    def token_tree(self, request_id: int) -> TokenTree:
        """What is guessed of a request as it stands."""
        tree = self.trees[request_id]
        nodes = tree.likeliest(MAX_TREE_TOKENS)
        places: dict[Node | None, int] = {node: place for place, node in enumerate((tree.root, *nodes), start=-1)}
        return TokenTree(
            request_id,
            tree.verdict_number,
            self.num_steps,
            tree.num_verified,
            tuple(node.token_id for node in nodes),
            tuple(places[node.parent] for node in nodes),
            tuple(node.candidate.chance for node in nodes if node.candidate),
        )
