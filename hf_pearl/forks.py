"""What a forked child begins anew: it has one thread, and all that the others held and were half through."""

from __future__ import annotations

import os
from collections.abc import Callable


def in_forked_children(begin_anew: Callable[[], None]) -> None:
    """Have every child that is forked from this process on call `begin_anew` first; nothing where there is no fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=begin_anew)
