"""Seconds per token of one model without a draft: transformers' `generate`, its faster ways, and our engine.

A call's time is divided by its new tokens, the prompts' forward included; of continuous batching, which begins by
setting up a manager, the time from the first token to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from ... import compat
from ...config import PearlConfig
from ...generation import pearl_generate
from ...model_devices import input_device
from ...registry import release
from .parts import Figures
from .steps import Rows
from .timing import seconds_of

GENERATE, ENGINE, STATIC, CONTINUOUS = "generate", "engine", "static cache, compiled", "continuous batching"
BLOCKS_PER_ROW = 8  # of 256 tokens, in continuous batching
COMPILED_WARM_UPS = 3  # A compiled forward is recorded as a CUDA graph in its second run, as ours is.
EAGER_RUNS = 2  # of what takes long, at most, and nearly the same every time


def token_seconds(model: PreTrainedModel, method: str, rows: Rows, num_new_tokens: int, num_runs: int) -> Figures:
    """Median seconds per token and row of a method.

    Parameters
    ----------
    rows : sequence of sequence of int
        Prompts of one length.

    Raises
    ------
    RuntimeError
        It wrote fewer tokens than it was asked for.
    """
    seconds = METHODS[method](model, rows, num_new_tokens, num_runs)
    return {"method": method, "rows": len(rows), "seconds": seconds}


def _generated(model: PreTrainedModel, rows: Rows, num_new_tokens: int, num_runs: int) -> float:
    call = partial(compat.original_generate(), model, **_inputs(model, rows, num_new_tokens))
    return _per_token(call, model, rows, num_new_tokens, min(num_runs, EAGER_RUNS), num_warm_ups=1)


def _on_our_engine(model: PreTrainedModel, rows: Rows, num_new_tokens: int, num_runs: int) -> float:
    generate = partial(compat.original_generate(), model)
    config, inputs = PearlConfig(prefix_cache=False), _inputs(model, rows, num_new_tokens)
    try:
        return _per_token(
            lambda: pearl_generate(generate, model, config, (), dict(inputs)), model, rows, num_new_tokens, num_runs
        )
    finally:
        release(model)


def _with_static_cache(model: PreTrainedModel, rows: Rows, num_new_tokens: int, num_runs: int) -> float:
    inputs = _inputs(model, rows, num_new_tokens)
    call = partial(compat.original_generate(), model, **inputs, cache_implementation="static")
    return _per_token(call, model, rows, num_new_tokens, num_runs)


def _in_continuous_batch(model: PreTrainedModel, rows: Rows, num_new_tokens: int, num_runs: int) -> float:
    config = GenerationConfig(
        max_new_tokens=num_new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=model.config.pad_token_id
    )
    # By default its cache takes nearly all of the memory, and a CPU long to clear it; so many blocks are plenty.
    sizes = ContinuousBatchingConfig(num_blocks=BLOCKS_PER_ROW * len(rows), max_batch_tokens=len(rows) * len(rows[0]))
    outputs = model.generate_batch(
        [list(row) for row in rows],
        generation_config=config,
        continuous_batching_config=sizes,
        record_timestamps=True,
        progress_bar=False,
    )
    done = [each for each in outputs.values() if len(each.generated_tokens) == num_new_tokens]
    if len(done) < len(rows):
        raise RuntimeError(f"continuous batching gave {len(done)} whole answers to {len(rows)} prompts")
    started, ended = min(each.timestamps[0] for each in done), max(each.timestamps[-1] for each in done)
    return (ended - started) / (num_new_tokens - 1)


def _inputs(model: PreTrainedModel, rows: Rows, num_new_tokens: int) -> dict[str, object]:
    ids = torch.tensor([list(row) for row in rows], device=input_device(model))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": num_new_tokens,
        "do_sample": False,
    }


def _per_token(
    call: Callable[[], torch.Tensor],
    model: PreTrainedModel,
    rows: Rows,
    num_new_tokens: int,
    num_runs: int,
    num_warm_ups: int = COMPILED_WARM_UPS,
) -> float:
    num_written = call().shape[1] - len(rows[0])
    if num_written != num_new_tokens:
        raise RuntimeError(f"{num_written} tokens were written instead of {num_new_tokens}")
    return seconds_of(call, input_device(model), num_runs, num_warm_ups - 1) / num_new_tokens


METHODS: dict[str, Callable[[PreTrainedModel, Rows, int, int], float]] = {
    GENERATE: _generated,
    ENGINE: _on_our_engine,
    STATIC: _with_static_cache,
    CONTINUOUS: _in_continuous_batch,
}
