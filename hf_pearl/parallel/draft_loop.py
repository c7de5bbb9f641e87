"""What a draft lane does that runs by itself, in a thread or in a process: hear, draft, publish."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ..decoding.drafting import Drafter
from ..decoding.messages import Admission, Grant, Removal, Rest, TokenTree, Verdict


class EndOfCall(Exception):
    """The engine has ended the call."""


class Inbox(Protocol):
    """Where messages of the engine arrive."""

    def get(self, block: bool) -> Admission | Verdict | Removal | Grant | Rest | None:
        """The next message; None where none is there and `block` is False.

        Raises
        ------
        EndOfCall
            The engine has ended the call.
        """


def run_draft_loop(
    drafter: Drafter, inbox: Inbox, publish: Callable[[list[TokenTree]], None], free_running: bool
) -> None:
    """Draft until the call ends, which `inbox` or `publish` says.

    Free-running: hear everything, make a step, or a chain of a few, if any guess may grow and nobody wants rest, else
    wait for a message. In lockstep and sequential schedules a grant is used up before the next message is heard, so
    that nothing depends on timing.
    """
    with suppress(EndOfCall):
        granted, is_resting = 0, False
        while True:
            while not granted:
                idle = is_resting or not free_running or not drafter.has_work()
                message = inbox.get(block=idle)
                if message is None:
                    break
                if isinstance(message, Grant):
                    granted += message.num_steps
                elif isinstance(message, Rest):
                    is_resting = message.is_resting
                else:
                    drafter.handle(message)
            before = drafter.num_steps
            publish(drafter.step(granted or drafter.num_unheard))
            granted = max(0, granted - (drafter.num_steps - before))
