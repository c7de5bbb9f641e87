"""Everything that is measured of the GPU path, in the order of its importance, and how long it may take.

The same code runs on a CPU with tiny shapes (`QUICK`), where its figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from ...planning.topology import copy_bandwidth
from .attention import Case, attention_figures
from .models import Sizes, measure_model, measure_rival
from .pairs import Asked, Size, measure_pair
from .parts import Attempts, Figures, Part, Results, needed, run_parts
from .rivals import CONTINUOUS, STATIC
from .shapes import QWEN3, Shape
from .simulated import recorded, simulated_speed_ups

BANDWIDTH, ATTENTION = "copy bandwidth", "attention"


class Model(NamedTuple):
    """A shape, whether it drafts, how long its part may take, in seconds, and whether it is compiled."""

    shape: Shape
    is_draft: bool
    seconds: float
    compiles: bool = False


@dataclass(frozen=True)
class Extent:
    """How much is measured.

    Attributes
    ----------
    copy_bytes : int
        Of the tensor that is copied for the bandwidth; far more than the device caches.
    models : mapping
        By name, in the order of their importance; the names of `pairs` are among them.
    pairs : sequence of tuple of str
        Draft and target.
    rivals : sequence of str
        Models that transformers' other ways decode.
    sizes : Sizes
        What is measured of a model.
    attention : sequence of Case
        With the heads and the layers of the first pair's target.
    asked : sequence of Asked
        What the first pair generates.
    traced : Asked
        What the simulation's text is.
    pair_sizes : tuple of Size
        Of the first pair's draft and target, as they are made from the embedded ones.
    compiled : sequence of str
        Models that are measured last of all: compiled twins.
    haste : float
        By which the times that parts may take are multiplied.
    """

    copy_bytes: int
    models: Mapping[str, Model]
    pairs: Sequence[tuple[str, str]]
    rivals: Sequence[str]
    sizes: Sizes
    attention: Sequence[Case]
    asked: Sequence[Asked]
    traced: Asked
    pair_sizes: Callable[[], tuple[Size, Size]]
    compiled: Sequence[str] = ()
    haste: float = 1.0


def _real_sizes() -> tuple[Size, Size]:
    return Size.of(QWEN3["0.6B"]), Size.of(QWEN3["8B"])


FULL = Extent(
    copy_bytes=2**32,
    models={
        "0.6B": Model(QWEN3["0.6B"], True, 30.0),
        "8B": Model(QWEN3["8B"], False, 30.0),
        "1.7B": Model(QWEN3["1.7B"], True, 30.0),
        "32B": Model(QWEN3["32B"], False, 45.0),
        "0.6B, compiled": Model(QWEN3["0.6B"], True, 150.0, compiles=True),
        "8B, compiled": Model(QWEN3["8B"], False, 120.0, compiles=True),
    },
    pairs=(("0.6B", "8B"), ("1.7B", "32B")),
    rivals=("8B", "0.6B"),
    sizes=Sizes(128, 32, (1, 8, 32), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32), (1, 4), num_steps=64, num_runs=3),
    attention=(Case(1, 1024, 1), Case(1, 1024, 8), Case(1, 16_384, 1), Case(8, 2048, 1), Case(32, 1024, 4)),
    asked=(Asked(1, 3, 64, 2), Asked(8, 8, 48, 1), Asked(32, 32, 48, 1)),
    traced=Asked(1, 4, 64, 1),
    pair_sizes=_real_sizes,
    compiled=("0.6B, compiled", "8B, compiled"),
)
_TINY = Shape(2, 32, 48, 4, 2, True, head_dim=16, vocab_size=96)
QUICK = Extent(
    copy_bytes=2**20,
    models={
        "0.6B": Model(_TINY, True, 0.0),
        "8B": Model(_TINY._replace(num_layers=3, ties_embeddings=False), False, 0.0),
    },
    pairs=(("0.6B", "8B"),),
    rivals=("8B",),
    sizes=Sizes(24, 4, (1, 3), (1, 4), (1, 4), (1, 2), num_steps=32, num_runs=1),
    attention=(Case(1, 32, 1), Case(2, 20, 3)),
    asked=(Asked(1, 1, 8, 1), Asked(2, 2, 8, 1)),
    traced=Asked(1, 1, 16, 1),
    pair_sizes=lambda: (Size(3, 2_000_000), Size(19, 9_000_000)),
    haste=0.0,
)


def measure_gpu(
    extent: Extent,
    device: torch.device,
    dtype: torch.dtype,
    minutes: float,
    save: Callable[[Figures], object],
    say: Callable[[str], object],
    only: Collection[str] = (),
    known: Figures | None = None,
) -> Figures:
    """Measure what fits into the time, and save after every part; see `run_parts`.

    Parameters
    ----------
    only : collection of str
        Names of the parts that are measured; all where there are none.
    known : dict, optional
        What an earlier run has found, which the others need, and which these are added to.
    """
    parts = [
        part._replace(seconds=extent.haste * part.seconds)
        for part in gpu_parts(extent, device, dtype)
        if not only or part.name in only
    ]
    return run_parts(parts, 60.0 * minutes, save, say, known=known)


def part_names(extent: Extent) -> list[str]:
    """What can be measured alone, in the order in which all of it is."""
    return [part.name for part in gpu_parts(extent, torch.device("cpu"), torch.float32)]


def model_name(name: str) -> str:
    """The part of a model's steps."""
    return f"steps, {name}"


def pair_name(pair: tuple[str, str], batch_size: int) -> str:
    """The part of a pair on one device."""
    return f"pair {'/'.join(pair)}, batch {batch_size}"


def simulated_name(pair: tuple[str, str]) -> str:
    """The part of a pair on two devices and more."""
    return f"simulated {'/'.join(pair)}"


def gpu_parts(extent: Extent, device: torch.device, dtype: torch.dtype) -> Iterator[Part]:
    """The parts, the most important first: what the goals are about, then the rest.

    Small contests come before all steps, which are profiled: that may make later launches slower (`observing.py`).
    By what they say to take, the time of the command's default ends with attention; continuous batching, the rivals of
    the draft and compiled models are for a second run.
    """
    yield Part(BANDWIDTH, 10.0, lambda *_: {"bytes_per_second": copy_bandwidth(device, extent.copy_bytes, 10)})
    first, *others = extent.pairs
    rival, *other_rivals = extent.rivals
    *small_batches, large_batch = extent.asked
    for number, asked in enumerate(small_batches):
        yield _pair_part(extent, asked, device, dtype, 35.0 if number else 75.0)
    for name in first:
        yield _model_part(extent, name, device, dtype)
    for draft, _ in others:
        yield _model_part(extent, draft, device, dtype)
    yield _rival_part(extent, rival, STATIC, device, dtype)
    yield _pair_part(extent, large_batch, device, dtype, 35.0)
    for _, target in others:
        yield _model_part(extent, target, device, dtype)
    for pair in extent.pairs:
        yield _simulated_part(extent, pair, device, dtype)
    yield Part(ATTENTION, 25.0, partial(_attention, extent, device, dtype))
    yield _rival_part(extent, rival, CONTINUOUS, device, dtype)
    for name in other_rivals:
        for method in (STATIC, CONTINUOUS):
            yield _rival_part(extent, name, method, device, dtype)
    for name in extent.compiled:
        yield _model_part(extent, name, device, dtype)


def _bandwidth(results: Results) -> float:
    return float(needed(results, BANDWIDTH)["bytes_per_second"])


def _model_part(extent: Extent, name: str, device: torch.device, dtype: torch.dtype) -> Part:
    model = extent.models[name]

    def measure(results: Results, attempt: Attempts) -> Figures:
        where = device, dtype, _bandwidth(results)
        return measure_model(model.shape, model.is_draft, extent.sizes, *where, attempt, model.compiles)

    return Part(model_name(name), model.seconds, measure)


def _rival_part(extent: Extent, name: str, method: str, device: torch.device, dtype: torch.dtype) -> Part:
    def measure(_: Results, attempt: Attempts) -> Figures:
        shape = extent.models[name].shape
        return {"model": name, **measure_rival(shape, method, extent.sizes, device, dtype, attempt)}

    return Part(f"{method}, {name}", 60.0 if method == STATIC else 40.0, measure)


def _pair_part(extent: Extent, asked: Asked, device: torch.device, dtype: torch.dtype, seconds: float) -> Part:
    def measure(results: Results, attempt: Attempts) -> Figures:
        bandwidth = _bandwidth(results) if BANDWIDTH in results else None
        return measure_pair(*extent.pair_sizes(), asked, device, dtype, bandwidth, attempt)

    return Part(pair_name(extent.pairs[0], asked.batch_size), seconds, measure)


def _simulated_part(extent: Extent, pair: tuple[str, str], device: torch.device, dtype: torch.dtype) -> Part:
    def measure(results: Results, _: Attempts) -> Figures:
        draft, target = (needed(results, model_name(name)) for name in pair)
        traces = recorded(extent.traced.num_prompts, extent.traced.max_new_tokens, device, dtype)
        return {"simulated": simulated_speed_ups(traces, draft, target)}

    return Part(simulated_name(pair), 15.0, measure)


def _attention(
    extent: Extent, device: torch.device, dtype: torch.dtype, results: Results, attempt: Attempts
) -> Figures:
    shape, bandwidth = extent.models[extent.pairs[0][1]].shape, _bandwidth(results)
    num_runs = extent.sizes.num_runs
    figures = partial(attention_figures, shape, device=device, dtype=dtype, bandwidth=bandwidth, num_runs=num_runs)
    return {"cases": [figures(case=case, attempt=attempt) for case in extent.attention]}
