"""What the paged cache costs and saves, beside transformers' `DynamicCache`: same model, same run, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from ..cache import PagedPrefixCache
from ..cache.attention import paged_attention
from ..cache.sizing import DEFAULT_BLOCK_SIZE, CacheNeeds
from ..compat import cache_argument
from ..decoding.messages import Window
from ..device_guard import synchronize
from ..parallel.lane import ModelLane

BATCHES = (1, 4, 16)
CONTEXTS = (128, 1024, 4096)
BLOCK_SIZES = (8, 16, 32, 64)
PROMPT_TOKENS = 1024
SHARED_TOKENS = PROMPT_TOKENS * 9 // 10
NUM_REQUESTS = 16
NUM_TURNS = len(BATCHES) * len(CONTEXTS) + 1 + 1 + 1 + len(BLOCK_SIZES)

Figures = dict[str, Any]


class Turn(NamedTuple):
    """Something to be timed: what runs, what undoes it (untimed), and in what scope."""

    run: Callable[[], Any]
    undo: Callable[[], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


def measure_cache(model: PreTrainedModel, num_steps: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """All of the suite; `advance` hears of every part before it begins."""

    def part(name: str, run: Callable[[], Figures]) -> Figures:
        advance(name)
        return run()

    return {
        "decode_steps": [
            part(f"{batch} x {context}", lambda b=batch, c=context: decode_step(model, b, c, num_steps))  # type: ignore[misc]
            for batch in BATCHES
            for context in CONTEXTS
        ],
        "prefill": part("prefill", lambda: shared_prefill(model, num_steps)),
        "memory": part("memory", lambda: shared_memory(model)),
        "fork": part("fork", lambda: fork_and_drop(model, num_steps)),
        "block_sizes": [
            part(f"blocks of {size}", lambda s=size: block_size(model, s, num_steps))  # type: ignore[misc]
            for size in BLOCK_SIZES
        ],
    }


def decode_step(model: PreTrainedModel, batch: int, context: int, num_steps: int) -> Figures:
    """Milliseconds of a decode step of rows of `context / 4` to `context` tokens (one row: `context`)."""
    lengths = [context - (context - context // 4) * row // max(1, batch - 1) for row in range(batch)]
    cache, inputs = random_dynamic_cache(model, batch, context), _left_padded_step(model, lengths, context)
    kept = {cache_argument(model): cache, "use_cache": True}
    turns = {
        "dynamic": Turn(lambda: model(**inputs, **kept), lambda: cache.crop(-1), torch.no_grad),
        "paged": paged_step(model, paged_rows(model, lengths)),
    }
    seconds = in_turns(turns, num_steps, model.device)
    ratio = seconds["paged"] / seconds["dynamic"]
    return {"batch": batch, "context": context, **_milliseconds(seconds), "ratio": ratio}


def shared_prefill(model: PreTrainedModel, num_steps: int) -> Figures:
    """Milliseconds of the prefill of a prompt of which nine tenths are cached, and of one of which nothing is."""
    prompt = _random_tokens(model)
    other = [prompt[0] + 1, *prompt[1:]]
    lane = ModelLane(model, new_cache(model))

    def prefill(tokens: list[int]) -> None:
        num_cached = lane.admit(0, tokens, 0)
        lane.forward([Window(0, tuple(tokens[num_cached:]), 1)])

    with lane.ready():
        prefill(prompt[:SHARED_TOKENS])
        lane.release(0, prompt[:SHARED_TOKENS])
        undo = lambda: lane.release(0, ())  # noqa: E731
        turns = {"cold": Turn(lambda: prefill(other), undo), "warm": Turn(lambda: prefill(prompt), undo)}
        seconds = in_turns(turns, num_steps, model.device)
    figures = {"prompt_tokens": PROMPT_TOKENS, "cached_tokens": SHARED_TOKENS, **_milliseconds(seconds)}
    return {**figures, "speedup": seconds["cold"] / seconds["warm"]}


def shared_memory(model: PreTrainedModel) -> Figures:
    """Blocks in use for one and for `NUM_REQUESTS` requests with one prompt: with it alone, and 16 tokens on."""
    lane, prompt = ModelLane(model, new_cache(model)), _random_tokens(model)
    pool, num_new = lane.cache.pool, 16
    with lane.ready():
        lane.admit(0, prompt, 0)
        lane.forward([Window(0, tuple(prompt), 1)])
        one_prompt = pool.num_referenced
        for row in range(1, NUM_REQUESTS):
            lane.fork(0, row, PROMPT_TOKENS)
        all_prompts = pool.num_referenced
        for _ in range(num_new):
            lane.forward([Window(row, (1,), 1) for row in range(NUM_REQUESTS)])
        all_later = pool.num_referenced
        for row in range(1, NUM_REQUESTS):
            lane.release(row, ())
        one_later = pool.num_referenced
    return {
        "requests": NUM_REQUESTS,
        "prompt_tokens": PROMPT_TOKENS,
        "blocks_of_one": one_prompt,
        "blocks_of_all": all_prompts,
        "ratio": all_prompts / one_prompt,
        "new_tokens": num_new,
        "ratio_later": all_later / one_later,
        "ratio_of_tokens_later": (PROMPT_TOKENS + NUM_REQUESTS * num_new) / (PROMPT_TOKENS + num_new),
    }


def fork_and_drop(model: PreTrainedModel, num_steps: int) -> Figures:
    """Milliseconds to fork and drop a line, to do so with a token written to it, and to copy a block of every layer."""
    lane = paged_rows(model, [PROMPT_TOKENS + DEFAULT_BLOCK_SIZE // 2])
    cache, sequence = lane.cache, lane.sequences[0]
    first, second = (slice(block * cache.block_size, (block + 1) * cache.block_size) for block in (0, 1))

    def fork(num_new: int) -> None:
        line = cache.fork(sequence)
        cache.append(line, num_new)
        cache.free(line)

    def copy() -> None:
        for layer in cache.layers:
            layer.copy(first, second)

    nothing = lambda: None  # noqa: E731
    turns = {
        "fork": Turn(lambda: fork(0), nothing),
        "fork_and_write": Turn(lambda: fork(1), nothing),
        "block_copy": Turn(copy, nothing),
    }
    seconds = in_turns(turns, 10 * num_steps, model.device)
    return {"tokens": sequence.length, **_milliseconds(seconds), "ratio": seconds["fork"] / seconds["block_copy"]}


def block_size(model: PreTrainedModel, size: int, num_steps: int) -> Figures:
    """Milliseconds of a decode step of four rows on blocks of `size` tokens: in runs, and scattered."""
    lengths = [PROMPT_TOKENS] * 4
    turns = {
        "runs": paged_step(model, paged_rows(model, lengths, size)),
        "scattered": paged_step(model, paged_rows(model, lengths, size, scattered=True)),
    }
    return {"block_size": size, **_milliseconds(in_turns(turns, num_steps, model.device))}


def in_turns(turns: dict[str, Turn], num_steps: int, device: torch.device) -> dict[str, float]:
    """Median seconds of every turn, one after the other, `num_steps` times."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for step in range(num_steps + 2):
        for name, turn in turns.items():
            with turn.scope():
                synchronize(device)
                started = time.perf_counter()
                turn.run()
                synchronize(device)
                if step >= 2:  # The first ones warm up.
                    seconds[name].append(time.perf_counter() - started)
            turn.undo()
    return {name: statistics.median(each) for name, each in seconds.items()}


def paged_step(model: PreTrainedModel, lane: ModelLane) -> Turn:
    """A decode step of all rows of a lane."""
    lengths = {row: lane.length(row) for row in lane.sequences}
    windows = [Window(row, (1,), 1) for row in lengths]

    def undo() -> None:
        for row, length in lengths.items():
            lane.rollback(row, length)

    return Turn(lambda: lane.forward(windows), undo, lambda: paged_attention(model))


def new_cache(
    model: PreTrainedModel, size: int = DEFAULT_BLOCK_SIZE, max_blocks: int | None = None
) -> PagedPrefixCache:
    """An empty paged cache for a model."""
    return PagedPrefixCache(model.config, max_blocks, size, device=model.device)


def paged_rows(
    model: PreTrainedModel, lengths: list[int], size: int = DEFAULT_BLOCK_SIZE, scattered: bool = False
) -> ModelLane:
    """A lane with rows of random keys and values, in runs of blocks or on every other block of the pool."""
    max_blocks = 2 * sum(length // size + 2 for length in lengths)
    cache = new_cache(model, size, max_blocks if scattered else None)
    if scattered:
        taken = [cache.allocate() for _ in range(max_blocks)]
        for sequence in taken:
            cache.append(sequence, 1)
        for sequence in taken[::2]:
            cache.free(sequence)
    lane = ModelLane(model, cache)
    for row, length in enumerate(lengths):
        lane.admit(row, (), max(lengths) + 64)
        sequence = lane.sequences[row]
        cache.append(sequence, length)
        for layer, states in zip(cache.layers, _random_states(model, 1, length), strict=True):
            if layer.pools is None:
                layer.make_pools(cache.num_slots, states, states)
            layer.write(sequence.slots(size, 0, length), states, states)
    return lane


def random_dynamic_cache(model: PreTrainedModel, batch: int, length: int) -> DynamicCache:
    """A `DynamicCache` full of random keys and values."""
    cache = DynamicCache(config=model.config)
    for layer_index, states in enumerate(_random_states(model, batch, length)):
        cache.update(states, states.clone(), layer_index)
    return cache


def _random_states(model: PreTrainedModel, batch: int, length: int) -> Iterator[torch.Tensor]:
    config = model.config.get_text_config()
    num_heads, dim, _ = CacheNeeds.of(model).heads
    for _ in range(config.num_hidden_layers):
        yield torch.randn(batch, num_heads, length, dim, dtype=model.dtype, device=model.device)


def _left_padded_step(model: PreTrainedModel, lengths: list[int], context: int) -> dict[str, torch.Tensor]:
    """Inputs of a decode step of rows that are padded on the left to `context` tokens."""
    mask = torch.zeros(len(lengths), context + 1, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, context - length :] = 1
    inputs = {
        "input_ids": torch.ones(len(lengths), 1, dtype=torch.long),
        "position_ids": torch.tensor(lengths)[:, None],
    }
    if min(lengths) < context:
        inputs["attention_mask"] = mask
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _random_tokens(model: PreTrainedModel) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(1, vocab_size - 1, (PROMPT_TOKENS,), generator=generator).tolist()


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {f"{name}_ms": 1000 * each for name, each in seconds.items()}
