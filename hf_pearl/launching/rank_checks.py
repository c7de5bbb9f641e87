"""The numbers of ranks that `launch` is asked for, looked at before anything is started."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from ..parallel.ranks.child_ranks import num_files
from ..parallel.ranks.shared_collectives import HAS_EVENTS
from ..parallel.ranks.world import in_world
from ..parallel.workers.child_process import why_no_child

MAX_RANKS_HERE = 64  # of a lane on one host: it has two semaphores for every two of them
SPARE_FILES = 32  # that a start opens for a moment, or whoever calls


def check_size(argument: str, size: Any) -> None:
    """Raise `ValueError` for what is no number of ranks, or, where `launch` starts them, too many for a host."""
    is_number = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    if not is_number or (size > MAX_RANKS_HERE and not in_world()):
        limits = "1 or more" if in_world() else f"from 1 to {MAX_RANKS_HERE}"
        raise ValueError(
            f"`{argument}` must be a number of ranks, {limits}, got {size!r}. Every rank is a process with its part of "
            "the weights: take as many as the model needs."
        )


def check_sizes(target_tp: Any, draft_tp: Any, has_draft: bool) -> None:
    """Raise `ValueError` for what are no numbers of ranks, or too many, or ranks of a draft that there is not."""
    check_size("target_tp", target_tp)
    check_size("draft_tp", draft_tp)
    if draft_tp > 1 and not has_draft:
        raise ValueError(f"`draft_tp` is {draft_tp}, and there is no draft. Give `draft` a folder or a name, too.")


def check_ranks(device: torch.device, target_tp: int, draft_tp: int) -> None:
    """Raise unless there are as many ranks, or can be; `draft_tp` is 0 where there is no draft.

    Raises
    ------
    ValueError
        A launcher has started another number, or they take more open files than a process may have.
    NotImplementedError
        `launch` would have to start several on another system than Linux, in a frozen app, or for a `device` that is
        neither a CPU nor CUDA's; or a launcher has started them, with a draft, on another system than Linux.
    """
    if in_world():
        _check_world(target_tp, draft_tp)
    elif max(target_tp, draft_tp) > 1:
        _check_ranks_here(device, target_tp, draft_tp)


def _check_world(target_tp: int, draft_tp: int) -> None:
    if draft_tp and not HAS_EVENTS:  # On every rank: none waits for the others.
        raise NotImplementedError(
            "a draft on ranks of its own needs Linux (memfd, eventfd). Leave `draft` out, or run this without a "
            "launcher, with `target_tp` and `draft_tp` at 1."
        )
    num_ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    asked = target_tp + draft_tp
    if asked != num_ranks:
        raise ValueError(
            f"{num_ranks} ranks run, and `target_tp` + `draft_tp` is {target_tp} + {draft_tp}. "
            f"Start {asked} (`torchrun --nproc-per-node {asked}`), or choose other sizes."
        )


def _check_ranks_here(device: torch.device, target_tp: int, draft_tp: int) -> None:
    if not HAS_EVENTS:
        raise NotImplementedError("several ranks need Linux (memfd, eventfd). Leave `target_tp` and `draft_tp` at 1.")
    reason = why_no_child()
    if reason is not None:
        raise NotImplementedError(
            f"several ranks need new processes, and {reason}. Leave `target_tp` and `draft_tp` at 1, or run this as a "
            "script of an installed Python."
        )
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"the ranks that `launch` starts compute on CPUs and CUDA devices, and `device` is {device}. Leave "
            '`target_tp` and `draft_tp` at 1, or say `device="cpu"`.'
        )
    for argument, size in (("target_tp", target_tp), ("draft_tp", draft_tp)):
        _check_files(argument, size)


def _check_files(argument: str, size: int) -> None:
    import resource  # Unix alone has it.

    limit, taken = resource.getrlimit(resource.RLIMIT_NOFILE)[0], len(os.listdir("/proc/self/fd")) + SPARE_FILES
    if limit == resource.RLIM_INFINITY or taken + num_files(size) <= limit:
        return
    most = max(each for each in range(1, size) if each == 1 or taken + num_files(each) <= limit)
    raise ValueError(
        f"`{argument}` is {size}, which takes {num_files(size)} open files, two for every two ranks among them, and "
        f"this process may open {limit}, of which {taken} are taken. Take {most} at most, or raise the limit "
        "(`ulimit -n`)."
    )
