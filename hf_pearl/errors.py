"""What can go wrong, by name."""

from __future__ import annotations


class PearlError(RuntimeError):
    """Base of the errors that hf_pearl raises while it runs (bad arguments are `ValueError` or `TypeError`)."""


class PearlOutOfBlocksError(PearlError):
    """The paged cache has no block left for a request."""


class PearlUnsupportedModelError(PearlError, NotImplementedError):
    """A model, or one of its layers, that the paged cache cannot hold, or that cannot be cut over ranks."""


class PearlWorkerError(PearlError):
    """A lane's worker failed, died, or did not answer in time."""


def first_line(error: BaseException) -> str:
    """What an error says, as far as it goes into a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def described_error(error: BaseException) -> str:
    """Its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {first_line(error)}"
