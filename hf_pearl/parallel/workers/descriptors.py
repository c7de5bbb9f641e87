"""Descriptors that a child process inherits under their numbers: never 0 to 2, where its standard streams come to lie.

A process whose own standard streams are closed, as those of a daemon may be, gets these numbers for what it opens next.
"""

from __future__ import annotations

import os
import socket

_FIRST = 3


def anonymous_memory(name: str, num_bytes: int) -> int:
    """A descriptor of anonymous memory that ends with the last process that holds it.

    Its size is for good, unless it is 0: whoever has mapped what another process cuts off ends with a bus error.
    """
    import fcntl  # Not every system has it.

    descriptor = _moved_up(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    if num_bytes:
        os.ftruncate(descriptor, num_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def event(flags: int = 0) -> int:
    """An event descriptor that never blocks."""
    return _moved_up(os.eventfd(0, flags | os.EFD_NONBLOCK | os.EFD_CLOEXEC))


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two sockets that are connected to each other."""
    ours, others = (socket.socket(fileno=_moved_up(each.detach())) for each in socket.socketpair())
    return ours, others


def _moved_up(descriptor: int) -> int:
    if descriptor >= _FIRST:
        return descriptor
    try:
        return _moved_up(os.dup(descriptor))
    finally:
        os.close(descriptor)
