"""The kernels of the paged cache and their twins, against attention in float64, token by token.

Without a GPU the Triton kernels run in Triton's interpreter. Unused slots, blocks, outputs and what lies between two
kernels are NaN beforehand.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import poisoned_memory  # skips the module where there is no Triton
from kernel_cases import Case, Shape, random_case
from models import (
    assert_equal,
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from transformers import LlamaConfig

from hf_pearl import PagedPrefixCache, PearlConfig
from hf_pearl.benchmark.near_tie import is_near_tie
from hf_pearl.cache import backends, kernels, torch_kernels
from hf_pearl.cache.backends import choose_kernels
from hf_pearl.cache.kernel_interface import Pools
from hf_pearl.cache.kernel_trial import trial_failure
from hf_pearl.cache.paged_layer import Held
from hf_pearl.cache.step import Attention, PagedStep
from hf_pearl.cache.step_tables import Bounds, Limits, StepTables
from hf_pearl.decoding.drafting import Drafter
from hf_pearl.decoding.policy import Pace

NUM_CASES, NUM_MOVES = 288, 240
NUM_FAST, NUM_FAST_MOVES = {kernels: 48, torch_kernels: 16}, 40
NUM_PARTS = (None, 2, 3, 1, 5, 9, 2)  # of contexts, in turn: in most cases they are split, and merged
WIDEST = {number: Shape(64, 1, 8, (32, 64)[number % 2]) for number in range(5, NUM_CASES, 25)}
NUM_ON_GPU, GPU_SCALE = 40, 16  # Contexts of up to 2,100 tokens; each case takes seconds to compile.
needs_interpreter = pytest.mark.skipif(not kernels.IS_INTERPRETED, reason="compiled kernels need tensors on a GPU")
# Largest error, over the largest number of the expected output.
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = list(MAX_ERROR)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def random_cases() -> list[Any]:
    """An implementation, a device, and the number of a case each; most of them only in `make test-all`."""
    cases = []
    for implementation, name in ((kernels, "triton"), (torch_kernels, "torch")):
        for number in range(NUM_CASES):
            marks = [needs_interpreter] if implementation is kernels else []
            marks += [] if number < NUM_FAST[implementation] else [pytest.mark.slow]
            cases.append(pytest.param(implementation, "cpu", number, marks=marks, id=f"{name}-{number}"))
    for number in range(NUM_ON_GPU):
        cases.append(pytest.param(kernels, "cuda", number, marks=pytest.mark.cuda, id=f"cuda-{number}"))
    return cases


def run(implementation: Any, case: Case, num_parts: int | None) -> torch.Tensor:
    """Store and attend; return the output, which was NaN before."""
    implementation.store(*case.new, case.pools, case.tables)
    num_heads, num_tokens = case.query.shape[1:3]
    output = case.query.new_full((1, num_tokens, num_heads, case.pools[1].shape[3]), torch.nan)
    with poisoned_memory():
        returned = implementation.paged_attention(
            case.query, case.pools, case.tables, case.attention, output, num_parts
        )
    assert returned is output
    return output[0].cpu()


@pytest.mark.parametrize(("implementation", "device", "number"), random_cases())
def test_attention_is_that_of_float64_token_by_token(implementation: Any, device: str, number: int, seed: int) -> None:
    dtype = DTYPES[number % 2 * (1 + number // 2 % 2)]  # every other one in float32
    case = random_case(seed, dtype, device, GPU_SCALE if device == "cuda" else 1, shape=WIDEST.get(number))
    num_parts = NUM_PARTS[number % len(NUM_PARTS)]
    output = run(implementation, case, num_parts)
    for pool, expected in zip(case.pools, case.stored, strict=True):
        assert torch.equal(pool.cpu().nan_to_num(1e9), expected.nan_to_num(1e9)), case.description  # and nothing else
    assert output[case.num_tokens :].isnan().all(), case.description
    expected = case.expected()
    error = (output[: case.num_tokens].double() - expected).abs().max() / expected.abs().max()
    assert error < MAX_ERROR[dtype], f"{error}: {case.description}, {num_parts} parts"


def test_every_kernel_is_interpreted_for_two_hundred_cases() -> None:
    """Those that put parts together and that move, too, and the most queries and heads that a group may have."""
    num_split = sum((NUM_PARTS[number % len(NUM_PARTS)] or 1) > 1 for number in range(NUM_CASES))
    assert min(NUM_CASES, num_split, NUM_MOVES) >= 200
    assert len(WIDEST) > 10 and min(WIDEST) < NUM_FAST[kernels]


@pytest.mark.parametrize(
    ("implementation", "device"),
    [
        pytest.param(kernels, "cpu", marks=needs_interpreter, id="triton"),
        pytest.param(torch_kernels, "cpu", id="torch"),
        pytest.param(kernels, "cuda", marks=pytest.mark.cuda, id="cuda"),
    ],
)
@pytest.mark.parametrize(
    "number",
    [pytest.param(each, marks=pytest.mark.slow if each >= NUM_FAST_MOVES else ()) for each in range(NUM_MOVES)],
)
def test_what_slots_hold_moves_in_all_pools_as_it_was_before(implementation: Any, device: str, number: int) -> None:
    chance, generator = random.Random(number), torch.Generator().manual_seed(number)
    dtype, num_slots = chance.choice(DTYPES), chance.choice([8, 64, 400])
    shapes = [(chance.choice([1, 3]), chance.choice([32, 48, 80, 256])) for _ in range(chance.choice([1, 2]))]
    places = chance.sample(range(num_slots), num_slots)
    places = places[: chance.randint(2, num_slots)]  # slots of a sequence, in the order of its tokens; others hold NaN
    kept = sorted(chance.sample(range(1, len(places)), chance.randint(1, min(len(places) - 1, 150))))
    source, target = [places[place] for place in kept], [places[new] for new in range(len(kept))]
    pools = []
    for heads, dim in (shape for shape in shapes for _ in range(chance.choice([2, 5]))):
        pool = torch.full((1, heads, num_slots, dim), torch.nan)
        pool[:, :, places] = torch.randn(1, heads, len(places), dim, generator=generator)
        pools.append(pool.to(device, dtype))
    expected = [pool.clone() for pool in pools]
    for pool in expected:
        pool[:, :, target] = pool[:, :, source].clone()
    implementation.move(pools, source, target)
    for pool, right in zip(pools, expected, strict=True):
        assert torch.equal(pool.nan_to_num(1e4), right.nan_to_num(1e4))


def test_one_set_of_tables_serves_many_steps_at_the_same_addresses(seed: int) -> None:
    """As a CUDA graph needs it: launched for fixed bounds, the kernels follow what the tables are filled with."""
    chance, config = random.Random(seed), LlamaConfig(num_hidden_layers=1, num_attention_heads=2)
    cache = PagedPrefixCache(config, 64, block_size=4)
    tables = StepTables(Limits(4, 16, 16, 200), 4, "cpu", Bounds(4, 16, 8, 64, True))
    addresses = [tensor.data_ptr() for tensor in tables.on_device]
    sequences = [cache.allocate(expected_length=40) for _ in range(4)]
    attention, generator = Attention(0.3), torch.Generator().manual_seed(seed)
    pools = Pools(*(torch.full((1, 1, cache.num_slots, 8), torch.nan) for _ in range(2)))
    for _ in range(6):
        chosen = chance.sample(sequences, chance.randint(1, 4))
        num_new = [chance.randint(1, 4) for _ in chosen]
        for sequence, num in zip(chosen, num_new, strict=True):
            cache.append(sequence, num)
        tables.fill(chosen, num_new, [None] * len(chosen))
        query, key, value = (torch.randn(1, heads, 16, 8, generator=generator) for heads in (2, 1, 1))
        torch_kernels.store(key, value, pools, tables)
        output = torch_kernels.paged_attention(query, pools, tables, attention)
        step = PagedStep(cache, chosen, num_new)
        total = sum(num_new)
        expected = step.attend(0, query[:, :, :total], key[:, :, :total], value[:, :, :total], attention)
        torch.testing.assert_close(output[:, :total], expected)
    assert [tensor.data_ptr() for tensor in tables.on_device] == addresses


@pytest.mark.parametrize(
    ("num_new", "words"),
    [([9], "max_queries=8"), ([1] * 5, "num_sequences=4"), ([8, 8, 8], "num_tokens=16")],
)
def test_a_step_beyond_the_bounds_of_tables_is_refused(num_new: list[int], words: str) -> None:
    cache = PagedPrefixCache(LlamaConfig(num_hidden_layers=1, num_attention_heads=2), 64, block_size=4)
    sequences = [cache.allocate() for _ in num_new]
    for sequence, num in zip(sequences, num_new, strict=True):
        cache.append(sequence, num)
    tables = StepTables(Limits(4, 16, 16, 200), 4, "cpu", Bounds(4, 16, 8, 64, True))
    with pytest.raises(ValueError, match=words):
        tables.fill(sequences, num_new, [None] * len(num_new))


def test_what_kernels_would_misread_is_refused(seed: int) -> None:
    case = random_case(seed, torch.float32)
    for query, words in (
        (case.query.half(), "one dtype"),
        (case.query[:, :, :0], "packed ones"),
        (case.query[0], "heads, tokens, head dim"),
        (case.query.repeat(1, 1, 1, 9), "dimensions"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.paged_attention(query, case.pools, case.tables, case.attention)
    wrong = torch.empty(1)
    with pytest.raises(ValueError, match="`output`"):
        kernels.paged_attention(case.query, case.pools, case.tables, case.attention, wrong)


# -- through the engine ---------------------------------------------------------------------------------------------


@pytest.fixture
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Bounds]:
    """Have `attention="triton"` served by an implementation, and collect the bounds of every call of its attention.

    One thread at a time, since the interpreter knows but one.
    """
    steps: list[Bounds] = []
    lock = threading.Lock()
    store, move, paged_attention = request.param.store, request.param.move, request.param.paged_attention

    def locked_store(*arguments: Any) -> None:
        with lock:
            store(*arguments)

    def locked_move(*arguments: Any) -> None:
        with lock:
            move(*arguments)

    def locked_attention(*arguments: Any) -> torch.Tensor:
        with lock:
            steps.append(arguments[2].bounds)
            return paged_attention(*arguments)

    monkeypatch.setattr(kernels, "store", locked_store)
    monkeypatch.setattr(kernels, "move", locked_move)
    monkeypatch.setattr(kernels, "paged_attention", locked_attention)
    return steps


def implementations(*architectures: str, fast: str) -> list[Any]:
    """The twins for every architecture, which are fast, and the interpreted kernels, of which one is in every run."""
    twins = [pytest.param(torch_kernels, each, id=f"torch-{each}") for each in architectures]
    marks = {each: [needs_interpreter, *([] if each == fast else [pytest.mark.slow])] for each in architectures}
    return twins + [pytest.param(kernels, each, id=f"triton-{each}", marks=marks[each]) for each in architectures]


@pytest.mark.parametrize(
    ("steps", "architecture"), implementations("llama", "mistral", "gemma2", "gpt2", fast="mistral"), indirect=["steps"]
)
def test_a_call_on_kernels_gives_the_tokens_of_generate(architecture: str, seed: int, steps: list[Bounds]) -> None:
    target = tiny_model(architecture, seed)
    draft = noisy_copy(target, 0.1, seed)
    inputs = random_prompts(random.Random(seed), 2, (5, 20))
    config = PearlConfig(execution="inline", attention="triton", draft_length=4)
    expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=16)
    assert_varied(expected)
    assert 0 < output.pearl.acceptance_rate < 1
    assert {each.num_sequences for each in steps} == {1, 2}
    assert_nothing_held(target)


@pytest.mark.parametrize(
    ("steps", "architecture"), implementations("llama", "mistral", fast="mistral"), indirect=["steps"]
)
def test_trees_of_draft_and_target_are_computed_by_kernels(
    architecture: str, seed: int, steps: list[Bounds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are as wide as can be, and all guesses are waited for and verified, whatever anything takes here."""
    monkeypatch.setattr(Drafter, "row_cost", 0.0)
    monkeypatch.setattr(Pace, "worth_verifying_above", lambda pace, num_rows: 0.0)
    monkeypatch.setattr(Pace, "wait_pays", lambda pace, hoped, num_rows, step_seconds: hoped > 0.05)
    target = tiny_model(architecture, seed)
    draft = noisy_copy(target, 0.1, seed)
    inputs = random_prompts(random.Random(seed), 1, (20,))
    config = PearlConfig(execution="threads", attention="triton")
    expected, _ = assert_equal(target, draft, inputs, config, max_new_tokens=24)
    assert_varied(expected)
    assert any(each.has_trees for each in steps)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_a_call_gives_the_tokens_of_generate_but_for_near_ties(
    architecture: str, dtype: torch.dtype, device: str, seed: int
) -> None:
    """On a GPU by the kernels; on a CPU by torch's SDPA, so that what they are compared with is known to be right."""
    target = tiny_model(architecture, seed, dtype=dtype).to(device)
    if architecture == "gemma2":
        target.set_attn_implementation("eager")  # With "sdpa", transformers leaves the soft-cap out.
    draft = noisy_copy(target, 0.03, seed)
    ids = random_prompts(random.Random(seed), 1, (40,))["input_ids"].to(device)
    expected = target.generate(ids, do_sample=False, max_new_tokens=40)[0, 40:].tolist()
    config = PearlConfig(attention="triton") if device == "cuda" else PearlConfig(execution="inline")
    got = target.generate(ids, do_sample=False, max_new_tokens=40, assistant_model=draft, pearl=config)[0, 40:].tolist()
    assert got == expected or is_near_tie(target, ids, expected, got)


def held(device: str = "cuda", **others: Any) -> Held:
    """What a layer may hold."""
    return Held(
        **{"device": torch.device(device), "dtype": torch.bfloat16, "max_head_dim": 64, "eight_bit": False} | others
    )


@pytest.mark.parametrize(
    ("what", "words"),
    [
        pytest.param(held(eight_bit=True), ["8-bit", "`cache_dtype`"], id="8 bits"),
        pytest.param(held(max_head_dim=512), ["256", "512"], id="head dimension"),
        pytest.param(held(dtype=torch.float8_e4m3fn), ["bfloat16", "float8_e4m3fn"], id="dtype"),
    ],
)
def test_a_backend_that_was_asked_for_and_cannot_says_why(what: Held, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        choose_kernels("triton", what)
    assert all(word in str(raised.value) for word in ['`attention="triton"`', '"auto"', *words])
    assert choose_kernels("auto", what) is None


def test_without_triton_its_kernels_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        choose_kernels("triton", held())
    assert choose_kernels("auto", held()) is None


def test_without_a_gpu_kernels_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "IS_INTERPRETED", False)
    target = tiny_model("llama", 1)
    with pytest.raises(ValueError, match="CUDA device"):
        target.generate(torch.tensor([[1, 2]]), max_new_tokens=2, pearl=PearlConfig(attention="triton"))
    assert choose_kernels("auto", held("cpu")) is None


def test_auto_takes_the_kernels_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "failure_of_triton", lambda held: None)
    assert choose_kernels("auto", held()) is kernels
    assert choose_kernels("sdpa", held()) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs kernels that fail: those of a device that is not there")
def test_where_the_kernels_fail_auto_takes_sdpa_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    what = held("cuda:7", dtype=torch.float16)
    with caplog.at_level(logging.INFO, logger="hf_pearl"):
        assert choose_kernels("auto", what) is None
    assert "torch's SDPA, since a trial of the Triton kernels fails: " in caplog.text
    with pytest.raises(ValueError, match=r"`attention=\"triton\"` cannot be used here: a trial of the Triton kernels"):
        choose_kernels("triton", what)


@needs_interpreter
def test_a_trial_tells_kernels_that_work_from_those_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    what = held("cpu", dtype=torch.float32, max_head_dim=16)
    assert trial_failure(kernels, what, (None, 9)) is None
    monkeypatch.setattr(kernels, "store", lambda *_: None)
    assert "computes something else" in str(trial_failure(kernels, what, (None,)))

    def fails(*_: Any) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(kernels, "store", fails)
    assert trial_failure(kernels, what, (None,)) == "fails: OSError: no compiler"
