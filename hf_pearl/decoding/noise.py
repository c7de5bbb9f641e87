"""The shared Gumbel noise of coupled sampling (Daliri et al. 2024, drafter-invariant decoding, arXiv 2408.07978).

Every request has a 64-bit seed; each position of it has one fixed noise vector `G`, and `argmax(log p + G)` is a sample
from `p`. The draft uses the same `G` on its `q`, so a draft token stands exactly if it equals the target's own.

The noise is a pure function of (seed, stream, position, token id). Its random words come from Philox4x32-10 (Salmon et
al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in integer operations: the same bits on every device. The last
bits of the two float64 logarithms may differ between devices; that hardly ever survives the rounding to float32.

Shapes: `P` positions, `V` vocabulary, `B = ceil(V / 4)` Philox blocks (each gives four neighbouring tokens' words).
"""

import hashlib
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

# What a request draws independently of each other at one position: the noise that draft and target share; and, where a
# draft token is accepted or rejected, the draft's token, the test, and what replaces a token that fails it.
SHARED_STREAM, DRAFT_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = range(4)

Words = TypeVar("Words", npt.NDArray[np.int64], torch.Tensor)
Key = tuple[int, int]
NoiseRow = tuple[int, int, int, int]

_MASK = 2**32 - 1
# Philox blocks at a time on a CPU: 64 KiB per temporary stays in its cache (40% less time at V=152k).
_TILE_BLOCKS = 8192
# A chunk is so large that the fixed cost of its 150 small operations hardly counts, and no larger: a lane waits for it.
_CHUNK_WORDS = {"cpu": 2**16, "cuda": 2**22}
_MAX_CHUNK_POSITIONS = 16
_CACHED_POSITIONS = 32  # a target window and the draft's lead over it; 20 MiB per request at V=152k


def philox4x32(
    counter: tuple[Words, Words, Words, Words], key: Key | tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10: four random 32-bit words for every 128-bit counter.

    Parameters
    ----------
    counter : tuple of arrays or tensors
        Four int64 ones of 32-bit values, of shapes that broadcast.
    key : tuple
        Two 32-bit words, or two such arrays or tensors.

    Returns
    -------
    tuple of arrays or tensors
        Four int64 ones of 32-bit values, of the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # A product of two 32-bit words overflows int64, but with m' = m - 2**32, |m'| < 2**30, it does not. As m * c is
    # m' * c + 2**32 * c, the low words agree and the high word is (m' * c >> 32) + c. Nothing wraps on any device.
    m0, m1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
    for _ in range(10):
        product0, product1 = c0 * m0, c2 * m1
        high0, high1 = (product0 >> 32) + c0, (product1 >> 32) + c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _MASK, high0 ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def gumbel_noise(
    seed: int,
    first_position: int,
    num_positions: int,
    vocab_size: int,
    device: torch.device | str = "cpu",
    stream: int = 0,
) -> torch.Tensor:
    """Standard Gumbel noise of one request: `G = -log(-log1p(-v))` with `v = (word + 0.5) / 2**32`.

    Token `t` at position `i` takes word `t % 4` of the Philox block with counter `(t // 4, i, stream, 0)` and the seed
    (low word first) as key. A smaller vocabulary's noise begins a larger one's: draft and target may pad differently.
    Values lie in [-3.14, 22.88]: the upper tail, which decides the argmax, is `v` near 0 and cut at 2**-33 only.

    Parameters
    ----------
    seed : int
        The request's seed, in [0, 2**64).
    first_position : int
        Absolute position without padding; all positions lie in [0, 2**32).
    num_positions : int
        `P`, may be 0.
    vocab_size : int
        `V`, at least 1.
    device : torch.device or str
        Where the noise is wanted.
    stream : int
        Independent noise for the same positions, in [0, 2**32).

    Returns
    -------
    torch.Tensor
        `(P, V)`, float32.

    Raises
    ------
    ValueError
        A number that is out of its range.
    """
    _check_source(seed, vocab_size, stream)
    _check_range("first_position", first_position, 0, 2**32)
    _check_range("num_positions", num_positions, 0, 2**32 - first_position + 1)
    device = torch.device(device)
    # For a CPU numpy takes half of torch's time; for all but CUDA too (MPS has no float64), and the result is copied.
    twin = _torch_noise if device.type == "cuda" else _numpy_noise
    key = (seed & _MASK, seed >> 32)
    return twin(key, range(first_position, first_position + num_positions), vocab_size, stream, device)


def _numpy_noise(key: Key, positions: range, vocab_size: int, stream: int, device: torch.device) -> torch.Tensor:
    noise = np.empty((len(positions), vocab_size), dtype=np.float32)
    rows = np.arange(positions.start, positions.stop, dtype=np.int64)[:, None]  # (P, 1)
    streams, zeros = np.full((1, 1), stream, dtype=np.int64), np.zeros((1, 1), dtype=np.int64)
    num_blocks, step = -(-vocab_size // 4), max(_TILE_BLOCKS // max(len(positions), 1), 64)
    for start in range(0, num_blocks, step):
        blocks = np.arange(start, min(start + step, num_blocks), dtype=np.int64)[None, :]  # (1, B)
        words = np.stack(philox4x32((blocks, rows, streams, zeros), key), axis=-1)  # (P, B, 4)
        # 1 - v is exact in float64 (33 bits), so its log is log1p(-v), and in numpy up to ten times as fast.
        gumbel = -np.log(-np.log(words * -(2.0**-32) + (1 - 2.0**-33)))
        tile = noise[:, 4 * start : 4 * (start + step)]
        tile[:] = gumbel.reshape(len(positions), 4 * blocks.size)[:, : tile.shape[1]]
    return torch.from_numpy(noise).to(device)


def _torch_noise(key: Key, positions: range, vocab_size: int, stream: int, device: torch.device) -> torch.Tensor:
    blocks = torch.arange(-(-vocab_size // 4), device=device)[None, :]  # (1, B)
    rows = torch.arange(positions.start, positions.stop, device=device)[:, None]  # (P, 1)
    streams, zeros = torch.full((1, 1), stream, device=device), torch.full((1, 1), 0, device=device)
    return _gumbel_of(torch.stack(philox4x32((blocks, rows, streams, zeros), key), dim=-1), vocab_size)


def noise_of_rows(rows: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The noise `(N, V)`, float32, of rows `(N, 4)`, int64, as `NoiseSource.row` gives them, on their device."""
    low, high, streams, positions = rows[:, :, None].unbind(1)  # (N, 1) each
    blocks = torch.arange(-(-vocab_size // 4), device=rows.device)[None, :]  # (1, B)
    words = philox4x32((blocks, positions, streams, torch.zeros_like(low)), (low, high))
    return _gumbel_of(torch.stack(words, dim=-1), vocab_size)


def _gumbel_of(words: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Noise `(P, V)` of words `(P, B, 4)`."""
    gumbel = -torch.log(-torch.log(words.double() * -(2.0**-32) + (1 - 2.0**-33)))
    return gumbel.flatten(1)[:, :vocab_size].float().contiguous()


def request_seed(call_seed: int, row: int) -> int:
    """Seed of one request, in [0, 2**64): BLAKE2b of the call's seed and the row, each as 8 little-endian bytes."""
    _check_range("call_seed", call_seed, 0, 2**64)
    _check_range("row", row, 0, 2**64)
    message = call_seed.to_bytes(8, "little") + row.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=b"hf_pearl").digest(), "little")


def draw_call_seed() -> int:
    """One draw from torch's default CPU generator, in [0, 2**63): `torch.manual_seed` repeats it, the next differs."""
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


class NoiseSource:
    """One request's noise, computed ahead in chunks and kept for a while. Not thread-safe: each lane has its own.

    Positions are asked for in small, overlapping, mostly increasing ranges, and some again after a rollback. The values
    are those of `gumbel_noise`, however they are asked for.
    """

    def __init__(self, seed: int, vocab_size: int, device: torch.device | str = "cpu", stream: int = 0) -> None:
        self._seed, self._vocab_size, self._device, self._stream = seed, vocab_size, torch.device(device), stream
        _check_source(seed, vocab_size, stream)  # Refused now and not at the first token.
        chunk_words = _CHUNK_WORDS["cuda" if self._device.type == "cuda" else "cpu"]
        self._chunk_length = min(max(chunk_words // vocab_size, 1), _MAX_CHUNK_POSITIONS)
        self._chunks: dict[int, torch.Tensor] = {}  # by position // chunk length, least recently used first

    def rows(self, first_position: int, num_positions: int) -> torch.Tensor:
        """Noise of consecutive positions: `(P, V)`, float32; often a view of the cache, callers must not modify it."""
        if num_positions < 1 or not 0 <= first_position <= 2**32 - num_positions:
            return self._compute(first_position, num_positions)  # empty, or the ValueError
        length = self._chunk_length
        indices = range(first_position // length, (first_position + num_positions - 1) // length + 1)
        chunks = [self._chunk(index) for index in indices]
        while len(self._chunks) > _CACHED_POSITIONS // length + 1:  # + 1: the window begins anywhere in a chunk
            del self._chunks[next(iter(self._chunks))]
        noise = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
        return noise[first_position - indices.start * length :][:num_positions]

    def row(self, position: int) -> NoiseRow:
        """What a kernel needs to know of a position's noise: low and high word of the seed, stream, position."""
        return self._seed & _MASK, self._seed >> 32, self._stream, position

    def _chunk(self, index: int) -> torch.Tensor:
        chunk = self._chunks.pop(index, None)
        if chunk is None:
            first = index * self._chunk_length
            chunk = self._compute(first, min(self._chunk_length, 2**32 - first))
        self._chunks[index] = chunk
        return chunk

    def _compute(self, first_position: int, num_positions: int) -> torch.Tensor:
        return gumbel_noise(self._seed, first_position, num_positions, self._vocab_size, self._device, self._stream)


def _check_source(seed: int, vocab_size: int, stream: int) -> None:
    _check_range("seed", seed, 0, 2**64)
    _check_range("stream", stream, 0, 2**32)
    _check_range("vocab_size", vocab_size, 1, 2**34 + 1)


def _check_range(name: str, value: int, low: int, end: int) -> None:
    if not low <= value < end:
        raise ValueError(f"`{name}` is {value}, but must lie in [{low}, {end}).")
