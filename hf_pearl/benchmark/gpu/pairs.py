"""PEARL on one device beside plain and assisted generation.

The pair is the embedded one, at its own acceptance, with the layers and the weights per step of real models. Its
vocabulary stays as small as it is: what a larger one costs shows in the steps of the random models. Its MLPs are far
wider than theirs, so that how near their bandwidth bound its own steps come is measured, too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ...enabling import measuring
from ...pair import PROMPTS, load_demo_pair
from ..completion import Workload
from ..heavier import heavier_to
from ..measurement import measure
from ..methods import DEMO, Method
from .parts import Attempts, Figures, free_memory
from .shapes import Shape, shape_step_weights, step_weights
from .steps import draft_steps, random_rows, target_steps

NUM_CANDIDATES = 3  # of every method, its default included: trials take time
STEP_PROMPT, NUM_DRAFT_STEPS, NUM_TARGET_STEPS = 128, 32, 5  # of the pair's own steps
WITHOUT_BATCHES = ("assisted",)  # what transformers refuses for more than one row


class Size(NamedTuple):
    """What a model is made to weigh: its layers, and the weights that a step reads."""

    num_layers: int
    num_weights: int

    @classmethod
    def of(cls, shape: Shape) -> Size:
        """That of a model of this shape."""
        return cls(shape.num_layers, shape_step_weights(shape))


class Asked(NamedTuple):
    """What is generated, and how often."""

    batch_size: int
    num_prompts: int
    max_new_tokens: int
    num_runs: int


def measure_pair(
    draft_size: Size,
    target_size: Size,
    asked: Asked,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float | None,
    attempt: Attempts,
) -> Figures:
    """All methods on one workload, as `bench` measures them: in turns, each at its best setting, outputs compared.

    Parameters
    ----------
    bandwidth : float or None
        Bytes per second; None where it is not known. The pair's own steps are compared with reading their weights once.

    Returns
    -------
    dict
        `wrong` are our methods that failed, or whose texts are not those of `generate`, each with its error.
    """
    target, draft, tokenizer = load_demo_pair(device, dtype)
    target, draft = heavier_to(target, *target_size), heavier_to(draft, *draft_size)
    prompts = tuple(tokenizer(text, return_tensors="pt").input_ids.to(device) for text in texts(asked.num_prompts))
    workload = Workload(target, draft, prompts, asked.max_new_tokens, batch_size=asked.batch_size)
    own_steps = _own_steps(draft, target, asked.batch_size, bandwidth, attempt)
    free_memory()  # of the lanes that made them
    with measuring(target):
        measurement = measure(workload, methods(asked.batch_size), asked.num_runs, unattended=True)
    wrong = {each.name: each.error for each in measurement.results if each.method.is_ours and each.error}
    return {
        "draft": describe(draft),
        "target": describe(target),
        "own_steps": own_steps,
        "wrong": wrong,
        **measurement.as_dict(),
    }


def _own_steps(
    draft: PreTrainedModel, target: PreTrainedModel, batch_size: int, bandwidth: float | None, attempt: Attempts
) -> list[Figures]:
    """A step of each model, of one token a row, beside reading its weights once. None is profiled before a contest."""
    rows = random_rows(batch_size, STEP_PROMPT, target.config.get_text_config().vocab_size)
    draft_step = partial(draft_steps, draft, rows, batch_size, NUM_DRAFT_STEPS, watches=False)
    target_step = partial(target_steps, target, rows, (1,), NUM_TARGET_STEPS, attempt, watches=False)
    drafted = attempt("draft step", draft_step)
    verified, _ = attempt("target steps", target_step) or ([], None)
    made = [("draft", draft, drafted), ("target", target, verified[0] if verified else None)]
    return [
        {"model": name, "seconds": step["seconds"], "bound_seconds": _bound_seconds(model, bandwidth)}
        for name, model, step in made
        if step is not None
    ]


def _bound_seconds(model: PreTrainedModel, bandwidth: float | None) -> float | None:
    return None if bandwidth is None else step_weights(model) * model.dtype.itemsize / bandwidth


def methods(batch_size: int) -> list[Method]:
    """Those of the demo, with fewer settings to try; for a batch, those that know batches, as they are."""
    if batch_size > 1:
        return [
            replace(method, candidates=method.candidates[:1]) for method in DEMO if method.name not in WITHOUT_BATCHES
        ]
    return [replace(method, candidates=method.candidates[:NUM_CANDIDATES]) for method in DEMO]


def texts(num_prompts: int) -> list[str]:
    """Held-out prompts of the embedded pair, evenly spread."""
    every = [json.loads(line)["turns"][0] for line in PROMPTS.read_text("utf-8").splitlines()]
    return [every[index * len(every) // num_prompts] for index in range(num_prompts)]


def describe(model: PreTrainedModel) -> Figures:
    """What a model was made of."""
    return {"num_layers": model.config.get_text_config().num_hidden_layers, "num_weights": model.num_parameters()}
