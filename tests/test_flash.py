"""FlashAttention beside the Triton kernels: what it is handed, when, and what is said where it cannot be.

Stand-ins of the libraries' signatures compute it, and the kernels' twins in torch the rest.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import interpreter  # noqa: F401 - skips the module where there is no Triton
import pytest
import torch
from flash_stand_ins import StandIns
from kernel_cases import Case, random_case
from models import (
    assert_equal,
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    noisy_copy,
    random_prompts,
    tiny_model,
)

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.cache import backends, flash_kernels, kernels, torch_kernels
from hf_pearl.cache.backends import choose_kernels
from hf_pearl.cache.flash_kernels import FlashKernels, find_flash
from hf_pearl.cache.flash_libraries import LIBRARIES, Library
from hf_pearl.cache.kernel_interface import Kernels
from hf_pearl.cache.paged_layer import Held

NAMES = [library.name for library in LIBRARIES]
MAX_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NUM_CASES, NUM_ON_GPU = 400, 24


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    """`pearl=` for tiny models."""
    with enabled_for_tiny_models():
        yield


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIns]:
    """Libraries to be installed, on the CPU, in float64 too."""
    monkeypatch.setattr(kernels, "store", torch_kernels.store)
    monkeypatch.setattr(kernels, "move", torch_kernels.move)
    monkeypatch.setattr(kernels, "paged_attention", torch_kernels.paged_attention)
    monkeypatch.setattr(kernels, "IS_INTERPRETED", True)
    monkeypatch.setattr(kernels, "DTYPES", (*kernels.DTYPES, torch.float64))
    monkeypatch.setattr(flash_kernels, "DTYPES", (torch.bfloat16, torch.float16, torch.float64))
    failure = flash_kernels.failure
    failure.cache_clear()
    yield StandIns(monkeypatch)
    failure.cache_clear()


def held(**others: Any) -> Held:
    """What a layer may hold."""
    plain = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "max_head_dim": 64, "eight_bit": False}
    return Held(**{**plain, **others})


def found(name: str) -> Library:
    """A library by its name."""
    return next(library for library in LIBRARIES if library.name == name)


def is_for_flash(name: str, case: Case) -> bool:
    """Whether a step is one that the library should be handed."""
    knows = not case.tables.has_fixed_bounds and not any(case.trees) and case.attention.sinks is None
    knows &= case.pools.keys.shape[3] == case.pools.values.shape[3]
    return knows and not (name == "torch's varlen_attn" and case.attention.softcap is not None)


def assert_right(implementation: Kernels, case: Case, writes: bool = False) -> None:
    """Fail unless store and attention are as expected, returned or written to what was given."""
    implementation.store(*case.new, case.pools, case.tables)
    expected = case.expected()
    shape = (1, case.query.shape[2], *expected.shape[1:])
    given = case.query.new_full(shape, torch.nan) if writes else None
    output = implementation.paged_attention(case.query, case.pools, case.tables, case.attention, given)
    assert output.shape == shape and (output is given or not writes)
    error = (output[0, : case.num_tokens].double().cpu() - expected).abs().max() / expected.abs().max()
    assert error < MAX_ERROR[output.dtype], f"{error}: {case.description}"


@pytest.mark.parametrize("name", NAMES)
def test_each_step_is_computed_right_by_the_library_where_it_knows_it_and_else_by_ours(
    name: str, seed: int, stand_ins: StandIns
) -> None:
    """Unused slots hold NaN; blocks lie anywhere for those that follow block tables.

    It knows one step in ten; of the others, a sixth are computed.
    """
    stand_ins.install(name)
    taken = 0
    for number in range(NUM_CASES):
        stand_ins.calls.clear()
        dtype = (torch.float64, torch.bfloat16)[number % 2]
        case = random_case(seed + number, dtype, in_runs=name == "flash-attn 2")
        if not is_for_flash(name, case) and number % 6:
            continue
        assert_right(FlashKernels(found(name)), case, writes=number % 4 > 1)
        assert bool(stand_ins.calls) == is_for_flash(name, case), case.description
        taken += bool(stand_ins.calls)
    assert 3 < taken < NUM_CASES


def test_a_sequence_in_pieces_is_not_for_flash_attn_2(seed: int, stand_ins: StandIns) -> None:
    stand_ins.install("flash-attn 2")
    cases = (random_case(seed + number, torch.float64) for number in range(200))
    case = next(each for each in cases if is_for_flash("flash-attn 2", each) and each.tables.runs() is None)
    assert_right(FlashKernels(found("flash-attn 2")), case)
    assert not stand_ins.calls


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_gives_the_tokens_of_generate(name: str, architecture: str, seed: int, stand_ins: StandIns) -> None:
    stand_ins.install(name)
    target = tiny_model(architecture, seed)
    draft = noisy_copy(target, 0.1, seed)
    inputs = random_prompts(random.Random(seed), 2, (5, 20))
    config = PearlConfig(execution="inline", attention="flash", draft_length=4)
    expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=16)
    assert_varied(expected)
    assert 0 < output.pearl.acceptance_rate < 1
    if architecture == "gemma2" and name == "torch's varlen_attn":
        assert stand_ins.calls[name] == 2  # its trial; it knows no soft-cap
    else:
        assert stand_ins.calls[name] > 16
    assert_nothing_held(target)


def test_the_first_library_that_works_is_taken(monkeypatch: pytest.MonkeyPatch, stand_ins: StandIns) -> None:
    for name in reversed(NAMES):
        stand_ins.install(name)
        assert chosen_library() == name

    def fails(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    def is_wrong(*arguments: Any) -> torch.Tensor:
        return 1.1 * found(NAMES[1]).attend(*arguments)

    broken = [found(NAMES[0])._replace(attend=fails), found(NAMES[1])._replace(attend=is_wrong), found(NAMES[2])]
    monkeypatch.setattr(flash_kernels, "LIBRARIES", broken)
    assert chosen_library() == NAMES[2]
    monkeypatch.setattr(flash_kernels, "LIBRARIES", broken[:2])
    said = find_flash(held())
    assert isinstance(said, str)
    assert re.search(rf"{NAMES[0]} fails: RuntimeError: no kernel image.*; {NAMES[1]} computes something else", said)


def chosen_library() -> str:
    """The library that `attention="flash"` means."""
    chosen = choose_kernels("flash", held())
    assert isinstance(chosen, FlashKernels)
    return chosen.library.name


def test_a_library_is_tried_once_for_what_a_layer_holds(stand_ins: StandIns) -> None:
    stand_ins.install("flash-attn 3")
    for _ in range(3):
        choose_kernels("flash", held())
    assert stand_ins.calls == {"flash-attn 3": 2}  # without a window, and with one
    choose_kernels("flash", held(dtype=torch.float16))
    assert stand_ins.calls == {"flash-attn 3": 4}


def test_a_trial_leaves_the_random_state_alone(stand_ins: StandIns) -> None:
    stand_ins.install("flash-attn 3")
    before = torch.get_rng_state()
    choose_kernels("flash", held())
    assert torch.equal(torch.get_rng_state(), before)


# -- what is said ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        pytest.param(held(), ["pip install flash-attn", "flash-attn 3 is not installed", "varlen_attn"], id="none"),
        pytest.param(held(dtype=torch.float32), ["bfloat16, float16", "float32"], id="dtype"),
        pytest.param(held(max_head_dim=20), ["multiple of 8", "20"], id="head dimension"),
        pytest.param(held(eight_bit=True), ["8-bit", "`cache_dtype`"], id="8 bits"),
    ],
)
def test_flash_where_it_cannot_be_says_why(what: Held, words: list[str], stand_ins: StandIns) -> None:
    with pytest.raises(ValueError) as raised:
        choose_kernels("flash", what)
    assert all(word in str(raised.value) for word in ['`attention="flash"`', '"auto"', *words])


def test_flash_is_refused_before_any_work(stand_ins: StandIns) -> None:
    with pytest.raises(ValueError, match="pip install flash-attn"):
        tiny_model("llama", 1).generate(torch.tensor([[1, 2]]), max_new_tokens=2, pearl=PearlConfig(attention="flash"))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "eager", "paged|sdpa"])
def test_names_that_transformers_uses_are_answered_with_ours(name: str) -> None:
    with pytest.raises(ValueError) as raised:
        PearlConfig(attention=name)  # type: ignore[arg-type]
    assert all(word in str(raised.value) for word in ("`attention`", repr(name), *map(repr, backends.BACKENDS)))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What was said of attention at INFO level; what had been said before may be said again."""
    logging.Logger.info_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO, logger="hf_pearl"):
        yield lambda: [text for text in map(logging.LogRecord.getMessage, caplog.records) if "attention on" in text]


def test_auto_takes_the_fastest_and_says_which(
    monkeypatch: pytest.MonkeyPatch, stand_ins: StandIns, said: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(flash_kernels, "failure", lambda library, held: None)
    monkeypatch.setattr(backends, "failure_of_triton", lambda held: None)
    on_cuda = held(device=torch.device("cuda:0"))
    assert choose_kernels("auto", held()) is None
    assert choose_kernels("auto", held(device=torch.device("cuda:0"), eight_bit=True)) is None
    assert choose_kernels("auto", on_cuda) is kernels
    stand_ins.install("flash-attn 3")
    assert isinstance(choose_kernels("auto", on_cuda), FlashKernels)
    cpu, eight_bit, triton, flash = said()
    assert cpu == "hf_pearl's attention on cpu runs on torch's SDPA."
    assert "cuda:0 runs on torch's SDPA, since they read no 8-bit cache" in eight_bit
    assert "cuda:0 runs on Triton kernels" in triton and "pip install flash-attn" in triton
    assert "cuda:0 runs on FlashAttention (flash-attn 3)" in flash and "Triton kernels" in flash


def test_auto_says_it_once_for_both_models_and_all_calls(said: Callable[[], list[str]]) -> None:
    target = tiny_model("llama", 1)
    for _ in range(2):
        target.generate(
            torch.tensor([[1, 2]]), max_new_tokens=3, assistant_model=noisy_copy(target, 0.1, 1), pearl=True
        )
    hf_pearl.release(target)
    target.generate(torch.tensor([[1, 2]]), max_new_tokens=3, pearl=True)
    assert said() == ["hf_pearl's attention on cpu runs on torch's SDPA."]


@pytest.mark.cuda
@pytest.mark.parametrize("number", range(NUM_ON_GPU))
@pytest.mark.parametrize("library", LIBRARIES, ids=NAMES)
def test_on_a_gpu_the_library_computes_what_it_should(library: Library, number: int, seed: int) -> None:
    obstacle = library.missing() or flash_kernels.failure(library, held(device=torch.device("cuda:0")))
    if obstacle:
        pytest.skip(f"{library.name} {obstacle}")
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    assert_right(FlashKernels(library), random_case(seed, dtype, "cuda", 16, in_runs=number % 2 == 0))
