"""The kernel that adds noise and takes the largest, against `noise.py`: equal bit for bit."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import pytest
import torch
from interpreter import IS_INTERPRETED, poisoned_memory
from models import assert_varied, enabled_for_tiny_models, noisy_copy, random_prompts, tiny_model

from hf_pearl import PearlConfig
from hf_pearl.decoding import noise_kernels, noisy_scores
from hf_pearl.decoding.noise import NoiseSource, gumbel_noise
from hf_pearl.decoding.noisy_scores import Draw
from hf_pearl.decoding.on_host import in_one_copy

NUM_CASES, NUM_FAST = 240, 60
needs_interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="compiled kernels need tensors on a GPU")
DEVICES = [pytest.param("cpu", marks=needs_interpreter), pytest.param("cuda", marks=pytest.mark.cuda)]
CASES = [pytest.param(number, marks=pytest.mark.slow if number >= NUM_FAST else ()) for number in range(NUM_CASES)]


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def random_rows(
    chance: random.Random, num_rows: int, vocab_size: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel is told of some rows, `(N, 4)`, and their noise by definition, `(N, V)`."""
    rows, noise = [], []
    for _ in range(num_rows):
        seed, stream = chance.getrandbits(64), chance.choice([0, 0, 1, 2**32 - 1])
        position = chance.choice([0, 1, chance.randrange(2**16), 2**32 - 1])
        rows.append(NoiseSource(seed, 1, stream=stream).row(position))
        noise.append(gumbel_noise(seed, position, 1, vocab_size, device, stream).cpu())
    return torch.tensor(rows), torch.cat(noise)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", CASES)
def test_the_kernel_gives_the_bits_of_the_definition(number: int, device: str, seed: int) -> None:
    """Scores from few values tie often, some rows exclude tokens, and some hold a NaN."""
    chance = random.Random(seed)
    vocab_size = chance.choice([1, 3, 64, 1023, 1024, 1025, 2500] if device == "cpu" else [1, 1025, 50_257, 151_936])
    rows, noise = random_rows(chance, chance.randint(1, 4), vocab_size, device)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(rows), vocab_size, generator=generator)
    kind = chance.choice(["plain", "excluded", "ties", "NaN", "nothing"])
    if kind == "excluded":
        scores[torch.rand(scores.shape, generator=generator) < 0.9] = -torch.inf
    elif kind == "ties":  # of sums: the noise is taken off again, and what is left has few values
        scores = scores.round() - noise
    elif kind == "NaN":
        scores[-1, chance.randrange(vocab_size)] = torch.nan
    elif kind == "nothing":
        scores[0] = -torch.inf
    expected = scores + noise
    padded = torch.full((len(rows), vocab_size + 3), torch.nan)  # rows of a wider tensor
    padded[:, :vocab_size] = scores
    given = padded.to(device)[:, :vocab_size]
    with poisoned_memory():
        noisy = noise_kernels.noisy_scores(given, rows.to(device)).cpu()
        values, ids = (each.cpu() for each in noise_kernels.noisy_max(given, rows.to(device)))
    assert torch.equal(noisy.nan_to_num(1e9), expected.nan_to_num(1e9))
    best = expected.max(dim=1)
    assert torch.equal(values.nan_to_num(1e9), best.values.nan_to_num(1e9))
    is_number = ~values.isnan()
    assert ids[is_number].tolist() == best.indices[is_number].tolist()
    assert ((ids >= 0) & (ids < vocab_size)).all()


@needs_interpreter
def test_ties_go_to_the_lowest_id_over_tiles() -> None:
    """Two tiles of 1,024 tokens; sums of noise and score are made equal."""
    (row,), noise = random_rows(random.Random(1), 1, 2048)
    wanted = noise.new_full((1, 2048), -5.0)
    for ids in ([1500, 700, 30], [2047, 1024]):
        scores = wanted.clone() - noise
        for token_id in ids:
            scores[0, token_id] = 40.0 - noise[0, token_id]
        total = scores + noise
        best = (total == total.max()).nonzero()[:, 1].tolist()
        _, found = noise_kernels.noisy_max(scores, row[None])
        assert found.item() == best[0]


def test_rows_are_those_of_their_sources(seed: int) -> None:
    """Draws of several requests, some at one position, some without noise."""
    chance = random.Random(seed)
    sources = [NoiseSource(chance.getrandbits(64), 50) for _ in range(3)]
    draws = [Draw(sources[0], 5), Draw(sources[0], 6), Draw(sources[0], 6), Draw(sources[1], 9), Draw(None)]
    draws += [Draw(sources[1], 3), Draw(sources[2], 40), Draw(sources[2], 38)]
    scores = torch.randn(len(draws), 50, generator=torch.Generator().manual_seed(seed))
    noise = [torch.zeros(1, 50) if draw.source is None else draw.source.rows(draw.position, 1) for draw in draws]
    expected = scores + torch.cat(noise)
    assert torch.equal(noisy_scores.noisy_scores(scores, draws), expected)
    values, ids = noisy_scores.noisy_max(scores, draws)
    assert torch.equal(values, expected.max(dim=1).values)
    assert torch.equal(ids, expected.max(dim=1).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_and_ids_come_to_the_host_in_one_copy(dtype: torch.dtype) -> None:
    """Of whatever a user's processor has made of the scores; some are no numbers."""
    numbers = torch.tensor([[0.5, -torch.inf, torch.nan], [-3.25, 0.0, torch.inf]], dtype=dtype)
    ids = torch.tensor([[2**40, 0, 1], [2, 3, 4]])
    found, found_ids = in_one_copy(numbers, ids)
    torch.testing.assert_close(torch.tensor(found), numbers.float(), equal_nan=True)
    assert found_ids == ids.tolist()


def test_what_the_kernel_would_misread_is_refused() -> None:
    scores, rows = torch.zeros(2, 8), torch.zeros(2, 4, dtype=torch.int64)
    for wrong_scores, wrong_rows in (
        (scores.double(), rows),
        (torch.zeros(8, 2).T, rows),
        (scores, rows[:1]),
        (scores, rows.int()),
    ):
        with pytest.raises(ValueError, match=r"scores must be|rows must be"):
            noise_kernels.noisy_max(wrong_scores, wrong_rows)


@needs_interpreter
def test_sampled_tokens_are_the_same_by_the_kernel(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_model("llama", seed)
    draft = noisy_copy(target, 0.03, seed)
    inputs = random_prompts(random.Random(seed), 2, (5, 9))
    config = PearlConfig(execution="inline", seed=seed)
    arguments = {**inputs, "do_sample": True, "max_new_tokens": 12, "assistant_model": draft, "pearl": config}
    expected = target.generate(**arguments)
    assert_varied(expected[:, inputs["input_ids"].shape[1] :])
    num_calls = 0

    def kernels_here(scores: torch.Tensor, draws: object) -> object:
        nonlocal num_calls
        num_calls += 1
        return noisy_scores.load_kernels(scores.device)

    monkeypatch.setattr(noisy_scores, "_kernels", kernels_here)
    assert target.generate(**arguments).tolist() == expected.tolist()
    assert num_calls > 0


def test_a_kernel_that_fails_is_left_out_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no compiler")

    noisy_scores.load_kernels.cache_clear()
    monkeypatch.setattr(noise_kernels, "noisy_max", fails)
    with caplog.at_level(logging.INFO, logger="hf_pearl"):
        assert noisy_scores.load_kernels(torch.device("cpu")) is None
    noisy_scores.load_kernels.cache_clear()
    assert "Noise on cpu is added without Triton, which fails: OSError: no compiler" in caplog.text
