"""`launch`: a pair of models of which each may lie on several ranks, ready to generate."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..pair import load_model
from ..parallel.cores import available_cores
from ..parallel.ranks.models import close_ranks, load_first_part, stand_in
from ..parallel.ranks.wire import RankModel
from ..parallel.ranks.world import in_world
from ..vocabularies import check_vocabularies
from .checks import check_sources, checked_device, checked_dtype, checked_folder, checked_model
from .launched_pair import LaunchedPair
from .rank_checks import check_ranks, check_sizes
from .rank_devices import first_devices
from .world_pair import WorldPair


def launch(
    target: str | Path,
    draft: str | Path | None = None,
    *,
    target_tp: int = 1,
    draft_tp: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LaunchedPair:
    """Load a pair of models, each over as many ranks as it needs, and start these; `close` it, or use it in a `with`.

    A rank is a process with its part of the weights (tensor parallel), which it alone reads. This process is the
    target's first rank. Works from a script, with or without a main guard, `python -c`, standard input and notebooks.

    Under `torchrun` or `accelerate launch` nothing is started: every rank of the script calls this, and then
    `generate`, with the same arguments. The target takes the first ranks, the draft the others.

    Parameters
    ----------
    target, draft : str or Path
        Folders, or names on the Hub, with weights in safetensors. No draft: plain decoding.
    target_tp, draft_tp : int
        Ranks of each; 64 at most where nobody else starts them.
    dtype : torch.dtype, optional
        Of both models' weights; by default float32 on a CPU and bfloat16 elsewhere.
    device : torch.device or str, optional
        Where both models go; by default a CUDA device if there is one (under `torchrun` each rank's own), else the CPU.
        Of several ranks on GPUs each has its own: the target's from this one on, then the draft's.

    Raises
    ------
    TypeError, ValueError
        An argument that makes no sense, a model or a device that is not there, or files that hold no weights; a draft
        with another vocabulary; another number of ranks than `torchrun` has started.
    FileNotFoundError
        There are no weights in safetensors.
    NotImplementedError
        Several ranks (under `torchrun`: a draft) on another system than Linux, in a frozen app, or on devices that are
        neither CPUs nor CUDA's; a model that PEARL cannot run, or not cut (`PearlUnsupportedModelError`).
    PearlWorkerError
        A rank could not be started.
    """
    check_sources(target, draft)
    check_sizes(target_tp, draft_tp, draft is not None)
    device = checked_device(device)
    dtype = checked_dtype(dtype, device)
    draft_ranks = 0 if draft is None else draft_tp
    check_ranks(device, target_tp, draft_ranks)
    first, draft_first = first_devices(device, target_tp, draft_ranks)
    num_threads = _threads_per_rank(target_tp + draft_ranks)
    target_model, structure = _rank_model(target, dtype, "target", target_tp, num_threads, first)
    draft_model = None
    if draft is not None:
        draft_model, draft_structure = _rank_model(draft, dtype, "draft", draft_tp, num_threads, draft_first)
        check_vocabularies(structure, draft_structure)
    if in_world():
        return WorldPair(target_model, draft_model, device)
    return _hold(target_model, draft_model)


def _threads_per_rank(num_ranks: int) -> int:
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)) if in_world() else num_ranks
    return max(1, len(available_cores()) // num_here)


def _rank_model(
    name: str | Path, dtype: torch.dtype, lane: str, size: int, num_threads: int, device: torch.device
) -> tuple[RankModel, PreTrainedModel]:
    """What its ranks are to load, and the model's structure."""
    folder = checked_folder(lane, name)  # Whatever is downloaded, this process does it, once.
    structure = checked_model(lane, folder, dtype, size)
    return RankModel(str(folder), str(dtype).removeprefix("torch."), lane, size, num_threads, str(device)), structure


def _hold(target: RankModel, draft: RankModel | None) -> LaunchedPair:
    held_target, held_draft = load_first_part(target) if target.size > 1 else _load(target), None
    try:
        if draft is not None:
            held_draft = stand_in(draft) if draft.size > 1 else _load(draft)
        return LaunchedPair(held_target, held_draft)
    except BaseException:
        close_ranks(held_target)  # Whoever keeps the error keeps the target, too.
        raise


def _load(model: RankModel) -> PreTrainedModel:
    return load_model(model.name, model.device_of(0), model.torch_dtype)
