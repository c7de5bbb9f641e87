"""Promises of `hf_pearl.decoding.noise`: known answers, equal twins, chunking nobody sees, and Gumbel's law."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_pearl.decoding import noise
from hf_pearl.decoding.noise import NoiseSource, draw_call_seed, gumbel_noise, philox4x32, request_seed

SEED = int(os.environ.get("HF_PEARL_SEED", "0"))
CPU = torch.device("cpu")
LARGEST = 33 * math.log(2)  # 22.87, of the word 0: -log(-log1p(-2**-33))
MASK = 2**32 - 1
words32 = st.integers(0, MASK)
seeds = st.integers(0, 2**64 - 1)

# Random123's kat_vectors file, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    pytest.param((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
    pytest.param((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]


def textbook_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & MASK, (product0 >> 32) ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def test_a_source_computes_nothing_before_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would be 150 launches for each request and lane."""
    monkeypatch.setattr(noise, "_numpy_noise", None)
    NoiseSource(SEED, 151_936)


def numpy_words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (np.array([word], dtype=np.int64) for word in counter)
    return tuple(int(word[0]) for word in philox4x32((c0, c1, c2, c3), key))


def torch_words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return tuple(int(word[0]) for word in philox4x32((c0, c1, c2, c3), key))


def chi_square_p_value(observed: torch.Tensor, expected: torch.Tensor) -> float:
    statistic = ((observed - expected) ** 2 / expected).sum().double()
    return float(torch.special.gammaincc(torch.tensor((observed.numel() - 1) / 2).double(), statistic / 2))


def law_holds(p_value: Callable[[int, int], float], num_samples: int) -> bool:
    """Two stages: p < 1e-3 repeats with a fresh seed and four times the samples, and p < 1e-4 there fails."""
    return (
        p_value(request_seed(SEED, 1), num_samples) >= 1e-3 or p_value(request_seed(SEED, 2), 4 * num_samples) >= 1e-4
    )


@pytest.mark.parametrize("words", [numpy_words, torch_words, textbook_philox])
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(
    words: Callable[..., tuple[int, ...]], counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]
) -> None:
    assert words(counter, key) == result


@given(st.tuples(words32, words32, words32, words32), st.tuples(words32, words32))
def test_both_twins_give_the_papers_bits(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert numpy_words(counter, key) == torch_words(counter, key) == textbook_philox(counter, key)


@given(seeds, st.integers(0, 2**32 - 4), st.integers(0, 2**17), words32, st.data())
def test_each_token_takes_its_documented_word(
    seed: int, position: int, token: int, stream: int, data: st.DataObject
) -> None:
    vocab_size = token + data.draw(st.integers(1, 9))
    word = textbook_philox((token // 4, position, stream, 0), (seed & MASK, seed >> 32))[token % 4]
    expected = -math.log(-math.log1p(-(word + 0.5) / 2**32))
    value = float(gumbel_noise(seed, position, 1, vocab_size, stream=stream)[0, token])
    assert value == pytest.approx(expected, rel=2**-23, abs=1e-14)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("vocab_size", [1, 5, 2048, 152_064])
def test_both_twins_give_the_same_noise(vocab_size: int, device: str) -> None:
    """The words are equal; a logarithm's last bit may differ in float64, and so one float32 value in many millions."""
    arguments = ((123, 456), range(2**31 - 1, 2**31 + 2), vocab_size, 7)
    ours, theirs = noise._numpy_noise(*arguments, CPU), noise._torch_noise(*arguments, torch.device(device)).cpu()
    assert ours.shape == theirs.shape == (3, vocab_size)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2**-23, atol=1e-14)
    assert int((ours != theirs).sum()) <= 2


@settings(max_examples=60)
@given(seeds, st.integers(1, 40_000), st.integers(1, 40_000), st.integers(0, 2**32 - 5), st.integers(0, 5))
def test_a_smaller_vocabularys_noise_begins_a_larger_ones(seed: int, a: int, b: int, first: int, num: int) -> None:
    small, large = sorted((a, b))
    assert torch.equal(gumbel_noise(seed, first, num, small), gumbel_noise(seed, first, num, large)[:, :small])


@given(
    seeds,
    st.sampled_from([1, 3, 300, 1500, 2000, 5000]),
    st.sampled_from([0, 1000, 2**32 - 100]),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=12),
)
def test_chunking_is_invisible(seed: int, vocab_size: int, start: int, requests: list[tuple[int, int]]) -> None:
    """Chunks of 16, 13, 2 and 1 positions; ranges overlap, go back, leave the window, and end at the last position."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(noise._CHUNK_WORDS, "cpu", 4000)
        source = NoiseSource(seed, vocab_size)
    reference = gumbel_noise(seed, start, 100, vocab_size)
    for offset, num_positions in requests:
        rows = source.rows(start + offset, num_positions)
        assert rows.shape == (num_positions, vocab_size)
        assert torch.equal(rows, reference[offset : offset + num_positions])


@pytest.mark.parametrize("vocab_size", [2048, 40_000, 152_064])
def test_a_rollback_within_the_window_computes_nothing_again(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = NoiseSource(SEED, vocab_size)
    computed: list[int] = []

    def compute(seed: int, first_position: int, *rest: Any) -> torch.Tensor:
        computed.append(first_position)
        return gumbel_noise(seed, first_position, *rest)

    monkeypatch.setattr(noise, "gumbel_noise", compute)
    for position in range(101):
        source.rows(position, 1)
    num_computed = len(computed)
    source.rows(69, 32)
    assert len(computed) == num_computed == len(set(computed))
    held = sum(len(chunk) for chunk in source._chunks.values())
    assert 32 <= held <= 32 + 16


def test_distinct_positions_rows_seeds_and_streams_have_unrelated_noise() -> None:
    """2,016 pairs of vectors of 4,096 values; a correlation beyond 0.1 (6.4 sigma) is chance in 3e-7 of runs."""
    parts = [gumbel_noise(SEED, 0, 16, 4096)]  # 16 positions
    parts += [gumbel_noise(request_seed(SEED, row), 0, 1, 4096) for row in range(16)]
    parts += [gumbel_noise(seed, 0, 1, 4096) for i in range(8) for seed in (2**63 + i, (SEED + 1 + i) % 2**63 + 1)]
    parts += [gumbel_noise(SEED, 0, 1, 4096, stream=stream) for stream in range(1, 17)]
    correlation = torch.corrcoef(torch.cat(parts).double()) - torch.eye(64)
    assert float(correlation.abs().max()) < 0.1


def test_noise_follows_gumbels_law() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)), 1e6 values (4e6 in stage two); false-alarm rate 1e-3 * 1e-4."""

    def p_value(seed: int, num_samples: int) -> float:
        values = gumbel_noise(seed, 10, 100, num_samples // 100).double().flatten().sort().values
        law = torch.exp(-torch.exp(-values))
        steps = torch.arange(num_samples + 1).double() / num_samples
        distance = max(float((steps[1:] - law).max()), float((law - steps[:-1]).max()))
        return min(2 * math.exp(-2 * num_samples * distance**2), 1.0)

    assert law_holds(p_value, 1_000_000)


P5 = torch.tensor([0.5, 0.25, 0.15, 0.08, 0.02], dtype=torch.float64)


def pick(values: torch.Tensor) -> torch.Tensor:
    """The tokens of `(N, 5)` noise under the law P5."""
    return (P5.log() + values).argmax(dim=-1)


def over_rows(seed: int, num_samples: int) -> torch.Tensor:
    return torch.cat([pick(gumbel_noise(request_seed(seed, row), 3, 2, 5)) for row in range(num_samples // 2)])


def pairs_of_positions(seed: int, num_samples: int) -> torch.Tensor:
    tokens = pick(gumbel_noise(seed, 0, 2 * num_samples, 5))
    return tokens[::2] * 5 + tokens[1::2]


def pairs_of_rows(seed: int, num_samples: int) -> torch.Tensor:
    tokens = torch.stack([pick(gumbel_noise(request_seed(seed, row), 0, 4, 5)) for row in range(num_samples // 2)])
    return (tokens[::2] * 5 + tokens[1::2]).flatten()


def pairs_of_streams(seed: int, num_samples: int) -> torch.Tensor:
    return pick(gumbel_noise(seed, 0, num_samples, 5)) * 5 + pick(gumbel_noise(seed, 0, num_samples, 5, stream=1))


@pytest.mark.parametrize(
    ("draw", "law", "num_samples"),
    [
        pytest.param(lambda seed, n: pick(gumbel_noise(seed, 0, n, 5)), P5, 200_000, id="over positions"),
        pytest.param(over_rows, P5, 10_000, id="over rows"),
        pytest.param(pairs_of_positions, torch.outer(P5, P5).flatten(), 200_000, id="pairs of positions"),
        pytest.param(pairs_of_rows, torch.outer(P5, P5).flatten(), 20_000, id="pairs of rows"),
        pytest.param(pairs_of_streams, torch.outer(P5, P5).flatten(), 200_000, id="pairs of streams"),
    ],
)
def test_argmax_of_log_p_plus_noise_is_a_sample(
    draw: Callable[[int, int], torch.Tensor], law: torch.Tensor, num_samples: int
) -> None:
    """Chi-square of counts (10,000 to 200,000 draws, four times as many in stage two); false-alarm rate 1e-7 each."""

    def p_value(seed: int, num_samples: int) -> float:
        tokens = draw(seed, num_samples)
        return chi_square_p_value(torch.bincount(tokens, minlength=len(law)).double(), law * len(tokens))

    assert law_holds(p_value, num_samples)


@pytest.mark.parametrize("twin", [noise._numpy_noise, noise._torch_noise])
@pytest.mark.parametrize(("word", "expected"), [(0, LARGEST), (MASK, -math.log(33 * math.log(2)))])
def test_the_tails_are_finite_and_the_upper_one_is_not_cut(
    twin: Callable[..., torch.Tensor], word: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 `v` rounds to 1 and gives an infinity; with its coarse end at the upper tail `G` ends at 16.6."""
    monkeypatch.setattr(noise, "philox4x32", lambda counter, key: (sum(counter) * 0 + word,) * 4)
    value = twin((1, 2), range(3, 5), 6, 0, CPU)
    assert value.tolist() == [[pytest.approx(expected, abs=1e-4)] * 6] * 2


def test_noise_is_finite() -> None:
    assert bool(gumbel_noise(SEED, 0, 64, 152_064).isfinite().all())


def test_the_device_argument_wins_over_the_default_device() -> None:
    with torch.device("meta"):
        assert gumbel_noise(SEED, 0, 2, 8).device == CPU
        assert 0 <= draw_call_seed() < 2**64
    assert gumbel_noise(SEED, 0, 2, 8, device="meta").device.type == "meta"


@pytest.mark.parametrize("num_positions", [0, 3])
@pytest.mark.parametrize("vocab_size", [1, 9])
def test_any_number_of_positions_has_the_right_shape(num_positions: int, vocab_size: int) -> None:
    for rows in (
        gumbel_noise(SEED, 2**32 - 3, num_positions, vocab_size),
        NoiseSource(SEED, vocab_size).rows(2**32 - 3, num_positions),
        noise._torch_noise((1, 2), range(5, 5 + num_positions), vocab_size, 0, CPU),
    ):
        assert rows.shape == (num_positions, vocab_size)
        assert rows.dtype == torch.float32


def test_request_seeds_are_distinct_repeatable_and_fixed_across_versions() -> None:
    seeds = [request_seed(call_seed, row) for call_seed in range(100) for row in range(100)]
    assert len(set(seeds)) == 10_000
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) >= 2**63
    assert request_seed(1, 2) == 0xDD8D888908C69D7E
    assert request_seed(2**64 - 1, 2**64 - 1) != request_seed(0, 0)


def test_manual_seed_repeats_a_call_seed_and_two_in_a_row_differ() -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(5)
        first, second = draw_call_seed(), draw_call_seed()
        torch.manual_seed(5)
        assert (draw_call_seed(), draw_call_seed()) == (first, second)
    finally:
        torch.set_rng_state(state)
    assert first != second
    assert max(first, second) >= 2**32


def test_noise_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()
    NoiseSource(request_seed(SEED, 0), 100).rows(0, 20)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: gumbel_noise(0, 0, 1, 0), r"`vocab_size` is 0, .*\[1, ", id="vocab_size 0"),
        pytest.param(lambda: NoiseSource(0, -1), r"`vocab_size` is -1, .*\[1, ", id="source's vocab_size"),
        pytest.param(lambda: gumbel_noise(0, 0, -1, 8), r"`num_positions` is -1, .*\[0, ", id="num_positions"),
        pytest.param(lambda: NoiseSource(0, 8).rows(0, -1), r"`num_positions` is -1", id="source's num_positions"),
        pytest.param(lambda: gumbel_noise(0, -1, 1, 8), r"`first_position` is -1, .*4294967296\)", id="position -1"),
        pytest.param(lambda: gumbel_noise(0, 2**32, 0, 8), r"`first_position` is 4294967296", id="position 2**32"),
        pytest.param(lambda: NoiseSource(0, 8).rows(-1, 2), r"`first_position` is -1", id="source's position -1"),
        pytest.param(lambda: gumbel_noise(0, 2**32 - 2, 3, 8), r"`num_positions` is 3, .*\[0, 3\)", id="last position"),
        pytest.param(lambda: NoiseSource(0, 8).rows(2**32 - 2, 3), r"`num_positions` is 3", id="source's last"),
        pytest.param(lambda: gumbel_noise(-1, 0, 1, 8), r"`seed` is -1, .*18446744073709551616\)", id="seed -1"),
        pytest.param(lambda: NoiseSource(2**64, 8), r"`seed` is 18446744073709551616", id="source's seed 2**64"),
        pytest.param(lambda: gumbel_noise(0, 0, 1, 8, stream=2**32), r"`stream` is 4294967296", id="stream"),
        pytest.param(lambda: request_seed(-1, 0), r"`call_seed` is -1", id="call seed"),
        pytest.param(lambda: request_seed(0, -1), r"`row` is -1", id="row"),
    ],
)
def test_bad_arguments_are_refused_with_value_and_limit(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
