"""The kernels of the paged cache and their twins, against attention in float64, token by token.

Without a GPU the Triton kernels run in Triton's interpreter. Unused slots, blocks and outputs are NaN beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import interpreter  # noqa: F401 - skips the module where there is no Triton
import pytest
import torch
from kernel_cases import Case, random_case
from models import enabled_for_tiny_models

from hf_pearl.cache import kernels, torch_kernels

NUM_CASES = 264
NUM_FAST = {kernels: 48, torch_kernels: 16}
# Largest error, over the largest number of the expected output.
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(MAX_ERROR)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def random_cases() -> list[Any]:
    """An implementation and the number of a random case each; most of them only in `make test-all`."""
    cases = []
    for implementation, name in ((kernels, "triton"), (torch_kernels, "torch")):
        for number in range(NUM_CASES):
            marks = () if number < NUM_FAST[implementation] else pytest.mark.slow
            cases.append(pytest.param(implementation, number, marks=marks, id=f"{name}-{number}"))
    return cases


def run(implementation: Any, case: Case) -> torch.Tensor:
    """Store and attend; return the output, which was NaN before."""
    implementation.store(*case.new, *case.pools, case.tables)
    num_heads, num_tokens = case.query.shape[1:3]
    output = case.query.new_full((1, num_tokens, num_heads, case.pools[1].shape[3]), torch.nan)
    returned = implementation.paged_attention(
        case.query, *case.pools, case.tables, case.attention, output, case.num_parts
    )
    assert returned is output
    return output[0].cpu()


@pytest.mark.parametrize(("implementation", "number"), random_cases())
def test_attention_is_that_of_float64_token_by_token(implementation: Any, number: int, seed: int) -> None:
    dtype = DTYPES[number % 2 * (1 + number // 2 % 2)]  # every other one in float32
    case = random_case(seed, dtype)
    output = run(implementation, case)
    for pool, expected in zip(case.pools, case.stored, strict=True):
        assert torch.equal(pool.nan_to_num(1e9), expected.nan_to_num(1e9)), case.description  # and nothing else
    assert output[case.num_tokens :].isnan().all(), case.description
    expected = case.expected()
    error = (output[: case.num_tokens].double() - expected).abs().max() / expected.abs().max()
    assert error < MAX_ERROR[dtype], f"{error}: {case.description}"
