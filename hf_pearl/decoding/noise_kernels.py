"""Scores plus Gumbel noise, and their largest, in one pass over the vocabulary: a Triton kernel, for CUDA.

The noise is that of `noise.py`, bit for bit: the same words, and the same operations in float64. There it takes 150
small kernels and a tensor of the vocabulary's size per position; here it is never written down. `noisy_scores.py`
chooses between the two.

Shapes: `N` rows, `V` vocabulary, `L` tiles of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..device_guard import device_guard

_BLOCKS = 256  # Philox blocks of a tile, each four neighbouring tokens' words


@triton.jit
def noisy_scores_kernel(
    # pointers
    scores: tl.tensor,  # (N, V)
    rows: tl.tensor,  # (N, 4), int64: low and high word of the seed, stream, position
    noisy: tl.tensor,  # (N, V); not used unless KEEPS
    values: tl.tensor,  # (N, L)
    ids: tl.tensor,  # (N, L), int64
    # sizes
    vocab_size: tl.tensor,
    # strides
    row_stride: tl.tensor,
    # constants
    BLOCKS: tl.constexpr,
    KEEPS: tl.constexpr,
) -> None:
    """Add the noise to a tile of a row's scores; note the largest sum and the lowest id that has it. Grid `(N, L)`.

    With BLOCKS = 2, tile 1 holds the tokens 8 to 15. Their words are those of the Philox blocks with the counters (2,
    position, stream, 0) and (3, position, stream, 0); token 13 takes word 1 of the second. If tokens 9 and 13 have the
    largest sum of all, its id is 9. A sum that is no number is the largest of all, as in torch.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    low, high = tl.load(rows + 4 * row).to(tl.uint32), tl.load(rows + 4 * row + 1).to(tl.uint32)
    stream, position = tl.load(rows + 4 * row + 2).to(tl.uint32), tl.load(rows + 4 * row + 3).to(tl.uint32)
    counters = (tile * BLOCKS + tl.arange(0, BLOCKS)).to(tl.uint32)
    same = tl.full((BLOCKS,), 0, tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(counters, same + position, same + stream, same, low, high)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # As in noise.py: 1 - (word + 0.5) / 2**32, which is exact in float64, so that its log is log1p of the fraction.
    gumbel = -tl.log(-tl.log(words.to(tl.float64) * -2.3283064365386963e-10 + 0.9999999998835847))

    tokens = tile * BLOCKS * 4 + tl.arange(0, BLOCKS * 4)
    is_token = tokens < vocab_size
    score = tl.load(scores + row * row_stride + tokens, mask=is_token, other=float("-inf"))
    total = score + gumbel.to(tl.float32)
    if KEEPS:
        tl.store(noisy + row * vocab_size + tokens, total, mask=is_token)
    is_number = total == total
    comparable = tl.where(is_number, total, float("-inf"))
    largest = tl.max(comparable, axis=0)
    first = tl.min(tl.where(is_token & (comparable == largest), tokens, vocab_size - 1), axis=0)
    all_numbers = tl.min(is_number.to(tl.int32), axis=0) == 1
    place = row * tl.num_programs(1) + tile
    tl.store(values + place, tl.where(all_numbers, largest, float("nan")))
    tl.store(ids + place, first.to(tl.int64))


def noisy_max(scores: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of scores plus noise per row, and the lowest id that has it: `(N,)` each.

    Parameters
    ----------
    scores : torch.Tensor
        `(N, V)`, float32.
    rows : torch.Tensor
        `(N, 4)`, int64, on the same device: low and high word of each row's seed, stream, position.
    """
    values, ids = _launch(scores, rows, None)
    best = values.max(dim=1, keepdim=True)  # of equal ones the first, and so the lowest id
    return best.values[:, 0], ids.gather(1, best.indices)[:, 0]


def noisy_scores(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores plus noise, `(N, V)`; the arguments are those of `noisy_max`."""
    noisy = torch.empty_like(scores, memory_format=torch.contiguous_format)
    _launch(scores, rows, noisy)
    return noisy


def _launch(scores: torch.Tensor, rows: torch.Tensor, noisy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = scores.shape
    if scores.dtype != torch.float32 or scores.stride(1) != 1:
        raise ValueError(f"scores must be float32 and contiguous in a row, got {scores.dtype}, {scores.stride()}.")
    if rows.shape != (num_rows, 4) or rows.dtype != torch.int64 or not rows.is_contiguous():
        raise ValueError(f"rows must be ({num_rows}, 4) int64 and contiguous, got {tuple(rows.shape)} {rows.dtype}.")
    if rows.device != scores.device:
        raise ValueError(f"scores are on {scores.device}, rows on {rows.device}.")
    num_tiles = triton.cdiv(vocab_size, 4 * _BLOCKS)
    values = scores.new_empty(num_rows, num_tiles)
    ids = torch.empty(num_rows, num_tiles, dtype=torch.int64, device=scores.device)
    with device_guard(scores):
        noisy_scores_kernel[(num_rows, num_tiles)](
            *(scores, rows, scores if noisy is None else noisy, values, ids),
            vocab_size,
            scores.stride(0),
            BLOCKS=_BLOCKS,
            KEEPS=noisy is not None,
        )
    return values, ids
