"""In low precision, outputs part from transformers' own only where the target finds two tokens equally good.

The comparison goes on behind every first difference, from the reference's prefix, so that one near-tie hides nothing.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.benchmark.near_tie import first_difference, is_near_tie
from hf_pearl.pair import PROMPTS, demo_pair_folder

Pair = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]
NUM_TOKENS = 200


def has_pair() -> bool:
    """Whether the embedded pair's weights are there."""
    try:
        demo_pair_folder()
    except FileNotFoundError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_pair(), reason="the weights of the embedded pair are not there")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The embedded pair, with `pearl`; one thread, since the draft needs the other core."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    target, draft, tokenizer = hf_pearl.load_demo_pair("cpu", request.param)
    hf_pearl.enable(target)
    yield target, draft, tokenizer
    hf_pearl.release(target)
    torch.set_num_threads(num_threads)


def read_prompts(num_prompts: int) -> list[str]:
    """Held-out prompts, evenly spread; where there are not as many, also their beginnings."""
    texts = [json.loads(line)["turns"][0] for line in PROMPTS.read_text("utf-8").splitlines()]
    num_cuts = -(-num_prompts // len(texts))
    texts = [text[: len(text) * cut // num_cuts] for cut in range(1, num_cuts + 1) for text in texts]
    step = max(1, len(texts) // num_prompts)
    return texts[::step][:num_prompts]


def generate(target: PreTrainedModel, ids: torch.Tensor, num_tokens: int, **options: object) -> list[int]:
    """Tokens after `ids`, greedy unless `options` say otherwise."""
    mask = torch.ones_like(ids)
    output = target.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, **({"do_sample": False} | options))
    return output[0, ids.shape[1] :].tolist()


def sampling(temperature: float) -> dict[str, object]:
    """Options of `generate`; transformers' own top-k would be on."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}


def references(dtype: torch.dtype, prompts: list[str], num_tokens: int = NUM_TOKENS) -> list[list[int]]:
    """What `generate` makes of every prompt, on one thread."""
    torch.set_num_threads(1)
    target, _, tokenizer = hf_pearl.load_demo_pair("cpu", dtype)
    return [generate(target, tokenizer(prompt, return_tensors="pt").input_ids, num_tokens) for prompt in prompts]


def references_on_two_cores(dtype: torch.dtype, prompts: list[str], num_tokens: int) -> list[list[int]]:
    """The same in two processes."""
    half = len(prompts) // 2
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        halves = pool.map(references, [dtype] * 2, [prompts[:half], prompts[half:]], [num_tokens] * 2)
        return list(chain(*halves))


def count_near_ties(pair: Pair, prompt: str, expected: list[int], config: PearlConfig, temperature: float = 0.0) -> int:
    """Compare one prompt's tokens from difference to difference, each of which must be a near-tie."""
    target, draft, tokenizer = pair
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    options, num_near_ties = sampling(temperature), 0
    while expected:
        got = generate(target, ids, len(expected), assistant_model=draft, pearl=config, **options)
        place = first_difference(expected, got)
        if place is None:
            break
        is_tie = is_near_tie(target, ids, expected, got, temperature=temperature, call_seed=config.seed or 0)
        assert is_tie, f"{prompt[:40]!r}: token {place} differs by a wide margin"
        num_near_ties += 1
        ids = torch.cat([ids, torch.tensor([expected[: place + 1]])], dim=1)
        expected = expected[place + 1 :]
    return num_near_ties


def test_every_first_difference_is_a_near_tie(pair: Pair) -> None:
    """Fifty prompts in bfloat16, 60 tokens each, with the default; in float32, where differences are rare, 6 of 200."""
    num_prompts, num_tokens = (50, 60) if pair[0].dtype == torch.bfloat16 else (6, NUM_TOKENS)
    prompts = read_prompts(num_prompts)
    assert len(prompts) == num_prompts
    expected = references_on_two_cores(pair[0].dtype, prompts, num_tokens)
    near_ties = [count_near_ties(pair, *each, PearlConfig()) for each in zip(prompts, expected, strict=True)]
    assert sum(near_ties) < num_prompts * num_tokens // 20, "too many for rounding to be the reason"


NUM_ALL, NUM_PARTS = 500, 5


@pytest.mark.slow
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_first_difference_of_five_hundred_prompts_is_a_near_tie(part: int, pair: Pair) -> None:
    """In either dtype, 200 tokens each."""
    prompts = read_prompts(NUM_ALL)[part::NUM_PARTS]
    assert len(prompts) == NUM_ALL // NUM_PARTS
    expected = references_on_two_cores(pair[0].dtype, prompts, NUM_TOKENS)
    near_ties = [count_near_ties(pair, *each, PearlConfig()) for each in zip(prompts, expected, strict=True)]
    assert sum(near_ties) < len(prompts) * NUM_TOKENS // 20, "too many for rounding to be the reason"


@pytest.mark.parametrize(
    ("num_prompts", "part"), [(4, 0), *(pytest.param(100, part, marks=pytest.mark.slow) for part in range(NUM_PARTS))]
)
def test_every_first_difference_of_a_sampled_text_is_a_near_tie(num_prompts: int, part: int, pair: Pair) -> None:
    """At temperature 0.7, against decoding without a draft: scores with the noise that both share are nearly equal."""
    target, _, tokenizer = pair
    config = PearlConfig(seed=part)
    num_near_ties = 0
    for prompt in read_prompts(num_prompts * NUM_PARTS)[part::NUM_PARTS]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = generate(target, ids, NUM_TOKENS, pearl=config, **sampling(0.7))
        num_near_ties += count_near_ties(pair, prompt, expected, config, 0.7)
    assert num_near_ties < num_prompts * NUM_TOKENS // 20, "too many for rounding to be the reason"


@pytest.mark.parametrize("num_tokens", [60, pytest.param(NUM_TOKENS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("draft_length", [1, 8])
def test_every_first_difference_is_a_near_tie_in_lockstep(pair: Pair, draft_length: int, num_tokens: int) -> None:
    """Two prompts for each draft length."""
    prompts = read_prompts(2)
    for prompt, expected in zip(prompts, references(pair[0].dtype, prompts, num_tokens), strict=True):
        count_near_ties(pair, prompt, expected, PearlConfig(draft_length=draft_length, execution="threads"))


def test_lockstep_with_a_cold_cache_repeats_bit_for_bit(pair: Pair) -> None:
    """What the README promises for low precision."""
    target, draft, tokenizer = pair
    config = PearlConfig(draft_length=4, prefix_cache=False)
    for prompt in read_prompts(3):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        first, second = (generate(target, ids, 64, assistant_model=draft, pearl=config) for _ in range(2))
        assert first == second
