"""Who runs: which requests are in the target's cache, which share a prompt there, and who gives way when it is full."""

from __future__ import annotations

from collections.abc import Sequence

from .lanes import Lane
from .request import Request
from .stats import PearlStats


class Scheduler:
    """Residency of the requests of a call.

    Requests with one and the same prompt (`num_return_sequences`) are computed once: the first of them leads, and the
    others are forked from it as soon as its prompt is there. When blocks run out, the last request gives its own back
    and is computed again when another one has ended (vLLM's recomputation, Kwon et al. 2023, section 4.5).

    Parameters
    ----------
    target : Lane
        The target on its cache.
    may_preempt : bool
        Whether rows may run ahead of each other, so that one of them can wait.
    """

    def __init__(self, target: Lane, requests: Sequence[Request], may_preempt: bool, stats: PearlStats) -> None:
        self.target = target
        self.may_preempt = may_preempt
        self.stats = stats
        self.resident: dict[int, Request] = {}
        self._followers: dict[int, list[Request]] = {}
        self._preempted: list[Request] = []
        leaders: dict[tuple[int, ...], int] = {}
        for request in requests:
            leader = leaders.setdefault(tuple(request.verified), request.request_id)
            if leader == request.request_id:
                stats.prefilled_tokens += len(request.verified) - self._admit(request)
            else:
                self._followers.setdefault(leader, []).append(request)

    def _admit(self, request: Request) -> int:
        self.resident[request.request_id] = request
        return self.target.admit(request.request_id, request.verified, request.max_length)

    def waiting(self) -> list[Request]:
        """The requests that a forward could serve now."""
        return [request for request in self.resident.values() if not request.pending]

    def is_awaited(self, request: Request) -> bool:
        """Whether others wait for its prompt, to begin in the blocks that it ends in: nothing may move there then."""
        return request.request_id in self._followers

    def fork_followers(self, leader: Request) -> list[Request]:
        """The requests with the prompt of `leader`, which has just been computed: now they are there too."""
        followers = self._followers.pop(leader.request_id, [])
        for follower in followers:
            self.target.fork(leader.request_id, follower.request_id, follower.num_prompt_tokens)
            self.resident[follower.request_id] = follower
        return followers

    def preempt(self) -> bool:
        """Take the last request that can wait out of the cache; False if nobody can, or it would be the only one."""
        able = self.waiting()
        if not self.may_preempt or len(self.resident) < 2 or not able:
            return False
        request = max(able, key=lambda request: request.request_id)
        self._leave(request)
        self._preempted.append(request)
        self.stats.preemptions += 1
        return True

    def end(self, request: Request) -> None:
        """A request has ended: its memory is free for one that was preempted."""
        self._leave(request)
        if self._preempted:
            self._admit(self._preempted.pop())

    def _leave(self, request: Request) -> None:
        del self.resident[request.request_id]
        self.target.release(request.request_id, request.verified)
