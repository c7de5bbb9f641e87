"""What a GPU might change: tokens, noise, streams, memory. `pytest -m cuda` runs it there.

Every test runs on the CPU too, in the same form, so that it is known to work before a GPU is at hand.
"""

from __future__ import annotations

import functools
import gc
import json
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import (
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from transformers import PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.benchmark.near_tie import first_difference, is_near_tie
from hf_pearl.cache.sizing import CUDA_SHARE, free_cuda_memory, main_memory
from hf_pearl.decoding import noise
from hf_pearl.pair import PROMPTS
from hf_pearl.parallel.memory import cache_share
from hf_pearl.parallel.workers.shipping import pack
from hf_pearl.registry import engines_of

DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.cuda)]
EXECUTIONS = ("inline", "threads")
NUM_TOKENS, SEED = 24, 7
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 0}
MASK = 2**32 - 1

Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def tiny_pair(device: torch.device, architecture: str = "llama", dtype: torch.dtype = torch.float64) -> Pair:
    """A target and a draft that guesses it now and then."""
    target = tiny_model(architecture, 1)
    draft = noisy_copy(target, 0.05, 2)
    return target.to(device, dtype), draft.to(device, dtype)


def prompts(device: torch.device, batch_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Of unequal lengths, padded on the left."""
    inputs = random_prompts(random.Random(seed), batch_size, (5, 21, 40))
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def reference(target: PreTrainedModel, inputs: dict[str, torch.Tensor], num_tokens: int = NUM_TOKENS) -> torch.Tensor:
    """transformers' own greedy tokens, `(batch, new tokens)`."""
    return target.generate(**inputs, do_sample=False, max_new_tokens=num_tokens)[:, inputs["input_ids"].shape[1] :]


def answer(
    pair: Pair,
    inputs: dict[str, torch.Tensor],
    execution: str,
    num_tokens: int = NUM_TOKENS,
    in_lockstep: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """Our tokens, greedy unless `options` say otherwise, and the statistics.

    Inline in lockstep, which follows no clock; in threads with all that is automatic, or in lockstep, too.
    """
    is_free = execution == "threads" and not in_lockstep
    config = PearlConfig(execution=execution, draft_length="auto" if is_free else 4, seed=SEED)
    output = pair[0].generate(
        **inputs,
        **({"do_sample": False} | options),
        max_new_tokens=num_tokens,
        assistant_model=pair[1],
        pearl=config,
        return_dict_in_generate=True,
    )
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.pearl


def assert_same_but_near_ties(
    target: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    expected: torch.Tensor,
    got: torch.Tensor,
    **sampling: Any,
) -> None:
    """Every row's first difference, if it has one, is where the target finds both tokens equally good."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    for row, (right, text) in enumerate(zip(expected.tolist(), got.tolist(), strict=True)):
        if first_difference(right, text) is not None:
            is_tie = is_near_tie(target, ids[row][mask[row]][None], right, text, row=row, **sampling)
            assert is_tie, f"row {row}: {right} and {text}"


# -- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_greedy_tokens_are_those_of_generate(
    architecture: str, batch_size: int, execution: str, device: torch.device, seed: int
) -> None:
    pair, inputs = tiny_pair(device, architecture), prompts(device, batch_size, seed)
    expected = reference(pair[0], inputs)
    assert_varied(expected)
    got, stats = answer(pair, inputs, execution)
    assert got.device == device
    assert got.tolist() == expected.tolist()
    assert stats.execution == execution and stats.generated_tokens == batch_size * NUM_TOKENS
    assert_nothing_held(*pair)


MAP = """
import pickle, sys, torch
torch.cuda.init()
storage = torch.UntypedStorage._new_shared_cuda(*pickle.load(sys.stdin.buffer))
print(torch.empty(0, device=storage.device).set_(storage, 0, (1,), (1,)).item())
"""


@functools.cache
def refusal_to_map() -> str | None:
    """Why no process may map what lies in another one's memory on the GPU; None: one can.

    Some containers refuse it, and some settings of torch's allocator; a thread drafts there.
    """
    number = torch.full((1,), 7.0, device="cuda:0")
    torch.cuda.synchronize()
    try:
        told = pickle.dumps(number.untyped_storage()._share_cuda_())
    except RuntimeError as error:
        return str(error)
    result = subprocess.run([sys.executable, "-c", MAP], input=told, capture_output=True, timeout=120, check=False)
    torch.cuda.ipc_collect()
    return None if result.stdout.strip() == b"7.0" else result.stderr.decode()[-500:]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes need Linux")
def test_a_process_drafts_on_weights_that_lie_on_the_device(device: torch.device, seed: int) -> None:
    """On a GPU they are mapped there: what the user changes in place, the worker has."""
    if device.type == "cuda" and (refusal := refusal_to_map()):
        pytest.skip(f"another process cannot map the GPU's memory here: {refusal}")
    target, draft = tiny_pair(device)
    inputs = prompts(device, 2, seed)
    expected = reference(target, inputs)
    if device.type == "cuda":
        assert pack(draft)[0].num_bytes == 64, "weights would be copied"
    config = PearlConfig(execution="processes", draft_length=4)
    options = {"do_sample": False, "max_new_tokens": NUM_TOKENS, "return_dict_in_generate": True}
    rates = []
    for _ in range(2):
        output = target.generate(**inputs, **options, assistant_model=draft, pearl=config)
        (worker,) = [engine.workers.worker for engine in engines_of(target) if engine.workers.worker]
        assert worker.wait_until_ready(120.0), worker.why_it_ended()
        output = target.generate(**inputs, **options, assistant_model=draft, pearl=config)
        assert output.sequences[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()
        assert output.pearl.execution == "processes"
        rates.append(output.pearl.acceptance_rate)
        draft.load_state_dict(target.state_dict())
    assert rates[0] < rates[1] == 1.0
    hf_pearl.release(target)


def assert_replayed(pair: Pair, device: torch.device) -> None:
    """Fail unless both lanes have run captured forwards; on the CPU there are none.

    There must have been a call in lockstep: in one that follows the clock, a draft that is as slow as its target may
    hardly ever make two steps of one size.
    """
    runners = [engine.graphs._runners for engine in engines_of(pair[0]) if "draft" in engine.caches]
    assert len(runners) == 1
    replays = {name: each.num_replays + each.num_chains for name, each in runners[0].items()}
    if device.type == "cuda":
        assert replays.keys() == {"target", "draft"} and min(replays.values()) > 0, replays
    else:
        assert replays == {}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_greedy_tokens_in_float32_are_those_of_generate_but_for_near_ties(
    architecture: str, batch_size: int, execution: str, device: torch.device, seed: int
) -> None:
    """On a GPU, Triton kernels read the cache in float32, and forwards are captured; in float64 there is neither."""
    pair, inputs = tiny_pair(device, architecture, torch.float32), prompts(device, batch_size, seed)
    expected = reference(pair[0], inputs)
    assert_varied(expected)
    for in_lockstep in (False, False, True):
        got, _ = answer(pair, inputs, execution, in_lockstep=in_lockstep)
        assert_same_but_near_ties(pair[0], inputs, expected, got)
    assert_replayed(pair, device)
    assert_nothing_held(*pair)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sampled_tokens_are_those_of_the_cpu_without_a_draft(
    batch_size: int, execution: str, device: torch.device, seed: int
) -> None:
    """In float64: whatever the device, the draft and the schedule, a seed gives the same tokens."""
    cpu = torch.device("cpu")
    target, _ = tiny_pair(cpu)
    without = PearlConfig(execution="inline", seed=SEED)
    inputs = prompts(cpu, batch_size, seed)
    expected = target.generate(**inputs, **SAMPLED, max_new_tokens=NUM_TOKENS, pearl=without)
    expected = expected[:, inputs["input_ids"].shape[1] :]
    assert_varied(expected)
    got, stats = answer(tiny_pair(device), prompts(device, batch_size, seed), execution, **SAMPLED)
    assert got.tolist() == expected.tolist()
    assert execution == "threads" or 0 < stats.acceptance_rate < 1


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sampled_tokens_in_float32_are_those_without_a_draft(
    batch_size: int, execution: str, device: torch.device, seed: int
) -> None:
    """On one device, but for near-ties."""
    pair, inputs = tiny_pair(device, dtype=torch.float32), prompts(device, batch_size, seed)
    without = PearlConfig(execution="inline", seed=SEED)
    expected = pair[0].generate(**inputs, **SAMPLED, max_new_tokens=NUM_TOKENS, pearl=without)
    expected = expected[:, inputs["input_ids"].shape[1] :]
    assert_varied(expected)
    for in_lockstep in (False, False, True):
        got, _ = answer(pair, inputs, execution, in_lockstep=in_lockstep, **SAMPLED)
        assert_same_but_near_ties(pair[0], inputs, expected, got, temperature=SAMPLED["temperature"], call_seed=SEED)
    assert_replayed(pair, device)


@pytest.fixture(scope="module", params=DEVICES)
def embedded(request: pytest.FixtureRequest) -> Iterator[tuple[PreTrainedModel, PreTrainedModel, list[torch.Tensor]]]:
    """The embedded pair in bfloat16, and held-out prompts; fewer on the CPU, which is slow in bfloat16."""
    try:
        target, draft, tokenizer = hf_pearl.load_demo_pair(request.param, torch.bfloat16)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    texts = [json.loads(line)["turns"][0] for line in PROMPTS.read_text("utf-8").splitlines()]
    chosen = texts[:1] if request.param == "cpu" else texts[:8]
    yield target, draft, [tokenizer(text, return_tensors="pt").input_ids.to(request.param) for text in chosen]
    hf_pearl.release(target)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_embedded_pair_in_bfloat16_parts_from_generate_at_near_ties_only(
    execution: str, embedded: tuple[PreTrainedModel, PreTrainedModel, list[torch.Tensor]]
) -> None:
    target, draft, every = embedded
    num_tokens = NUM_TOKENS if len(every) == 1 else 100
    rates = []
    for ids in every:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got, stats = answer((target, draft), inputs, execution, num_tokens)
        assert_same_but_near_ties(target, inputs, reference(target, inputs, num_tokens), got)
        rates.append(stats.mean_accepted_tokens)
    assert max(rates) > 1.2 or execution == "threads", "a draft that never helps tests little"


# -- noise ----------------------------------------------------------------------------------------------------------


def test_philox_gives_the_same_bits_on_every_device(device: torch.device, seed: int) -> None:
    chance = random.Random(seed)
    key = chance.randrange(MASK), chance.randrange(MASK)
    blocks, rows = torch.arange(3000)[None], torch.arange(5)[:, None] + chance.randrange(2**30)
    zeros = torch.zeros(1, 1, dtype=torch.int64)
    expected = noise.philox4x32((blocks, rows, zeros, zeros), key)
    got = noise.philox4x32(tuple(each.to(device) for each in (blocks, rows, zeros, zeros)), key)
    for word, right in zip(got, expected, strict=True):
        assert torch.equal(word.cpu(), right)
    assert expected[0].unique().numel() > 14_900


def test_the_noise_of_torch_is_that_of_numpy(device: torch.device, seed: int) -> None:
    """Bit for bit in all but the few values that a last bit of a float64 logarithm decides."""
    key, positions, vocab_size = (seed & MASK, 12345), range(1000, 1016), 151_936
    expected = noise._numpy_noise(key, positions, vocab_size, 0, torch.device("cpu"))
    got = noise._torch_noise(key, positions, vocab_size, 0, device).cpu()
    differ = got != expected
    assert differ.sum() <= 2
    torch.testing.assert_close(got[differ], expected[differ], rtol=1e-6, atol=1e-7)
    assert torch.equal(got.argmax(dim=-1), expected.argmax(dim=-1))


# -- lanes ----------------------------------------------------------------------------------------------------------


@contextmanager
def watched(pair: Pair) -> Iterator[list[set[tuple[int, int]]]]:
    """In which threads, and on which CUDA streams, the target and the draft computed."""
    seen: list[set[tuple[int, int]]] = [set(), set()]

    def note(places: set[tuple[int, int]]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any) -> None:
            on = module.weight.device
            stream = torch.cuda.current_stream(on).cuda_stream if on.type == "cuda" else 0
            places.add((threading.get_ident(), stream))

        return hook

    handles = [
        model.get_output_embeddings().register_forward_pre_hook(note(places))
        for model, places in zip(pair, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_ten_calls_in_a_row_of_lanes_that_replay_give_the_same_tokens(device: torch.device, seed: int) -> None:
    """In threads, in float32: a missing event between streams shows as a wrong token."""
    pair = tiny_pair(device, dtype=torch.float32)
    for call in range(10):
        inputs = prompts(device, 1 + call % 2, seed + call)
        got, _ = answer(pair, inputs, "threads", in_lockstep=call % 3 == 2)
        assert_same_but_near_ties(pair[0], inputs, reference(pair[0], inputs), got)
    assert_replayed(pair, device)


def test_lanes_run_in_two_threads_on_two_streams(device: torch.device, seed: int) -> None:
    """With the same tokens, ten calls in a row: a missing event between streams shows as a wrong one."""
    pair = tiny_pair(device)
    # What caches may take of a GPU is found in the first call, by a forward of each model in the caller's thread.
    answer(pair, prompts(device, 1, seed), "threads")
    drafted = 0
    with watched(pair) as (target, draft):
        for call in range(10):
            inputs = prompts(device, 1 + call % 2, seed + call)
            got, stats = answer(pair, inputs, "threads")
            drafted += stats.draft_steps
            assert got.tolist() == reference(pair[0], inputs).tolist()
    assert drafted > 0
    assert {thread for thread, _ in target}.isdisjoint(thread for thread, _ in draft)
    if device.type == "cuda":
        assert {stream for _, stream in target}.isdisjoint(stream for _, stream in draft)


# -- memory ---------------------------------------------------------------------------------------------------------


def held_bytes(pair: Pair, device: torch.device) -> int:
    """What a GPU's allocator has given out; on the CPU, what the caches of the pair take.

    Without the work spaces of cuBLAS: a capture frees them, and the next forward that is not captured makes them anew,
    so that it would depend on time which of them are there.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated(device)
    caches = [cache for engine in engines_of(pair[0]) for cache in engine.caches.values()]
    return sum(layer.nbytes for cache in caches for layer in cache.layers)


@pytest.mark.parametrize(
    ("execution", "dtype"), [("inline", torch.float64), ("threads", torch.float64), ("inline", torch.float32)]
)
def test_repeated_calls_do_not_grow(execution: str, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """Nor do captured forwards, of which a lane in lockstep needs the same ones in every call."""
    pair, inputs = tiny_pair(device, dtype=dtype), prompts(device, 4, seed)
    sizes = []
    for _ in range(12):
        answer(pair, inputs, execution)
        sizes.append(held_bytes(pair, device))
    assert max(sizes[8:]) <= max(sizes[3:8])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_release_gives_the_memory_back(execution: str, dtype: torch.dtype, device: torch.device, seed: int) -> None:
    """All but what libraries keep for a stream from its first use on: hence the rounds before."""
    pair, inputs = tiny_pair(device, dtype=dtype), prompts(device, 4, seed)
    sizes = []
    for _ in range(4):
        answer(pair, inputs, execution)
        during = held_bytes(pair, device)
        hf_pearl.release(pair[0])
        sizes.append(held_bytes(pair, device))
        assert during > sizes[-1]
    assert sizes[3] <= sizes[2]


def test_caches_may_take_what_weights_and_forwards_leave(device: torch.device) -> None:
    pair = tiny_pair(device, dtype=torch.float32)
    share = cache_share(device, pair)
    if device.type == "cuda":
        free = free_cuda_memory(device)
        assert 0.5 * CUDA_SHARE * free < share <= CUDA_SHARE * free
    else:
        assert 0 < share < main_memory()


@pytest.mark.parametrize("part", ["target", "draft"])
def test_after_a_forward_without_memory_the_next_call_is_right(part: str, device: torch.device, seed: int) -> None:
    """A layer asks for more than there is, in the third forward of either model."""
    pair, inputs = tiny_pair(device), prompts(device, 1, seed)
    expected = reference(pair[0], inputs)
    num_calls = 0

    def ask_for_too_much(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            torch.empty(2**50, dtype=torch.uint8, device=device)

    layer = pair[part == "draft"].model.layers[1].mlp
    handle = layer.register_forward_pre_hook(ask_for_too_much)
    with pytest.raises(RuntimeError, match="memory"):
        answer(pair, inputs, "inline")
    handle.remove()
    assert_nothing_held(*pair)
    for execution in EXECUTIONS:
        assert answer(pair, inputs, execution)[0].tolist() == expected.tolist()
