"""Attention over a part of the keys, and how parts are put together.

Sequences that share a prefix read its keys and values once, for all of them, and each its own (Juravsky et al. 2024,
"Hydragen", arXiv 2402.05099). A part comes with the logarithm of its softmax's denominator, which is its weight.

Shapes: `S` sequences, `Q` query tokens, `L` keys, `H` query heads, `K` key-value heads, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def attend_part(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of `(S, H, Q, D)` over `(S, K, L, D)`, to `(S, H, Q, D + 1)` in float32 at least.

    The last column is the log of the sum of the exponentials of all scores. `mask` `(S, 1, Q, L)` is added to the
    scores, after a soft-cap (Gemma-2).
    """
    num_queries = q.shape[2]
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (S, K, H / K * Q, D)
    scores = (grouped @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = (scores.unflatten(2, (-1, num_queries)) + mask[:, :, None]).flatten(2, 3)
    weight = torch.logsumexp(scores, dim=-1, keepdim=True)
    output = torch.exp(scores - weight).to(v.dtype) @ v
    return torch.cat([output.to(weight.dtype), weight], dim=-1).unflatten(2, (-1, num_queries)).flatten(1, 2)


def merge_parts(parts: Sequence[torch.Tensor], sinks: torch.Tensor | None = None) -> torch.Tensor:
    """One attention out of its parts `(S, Q, H, D + 1)`, to `(S, Q, H, D)`.

    `sinks` `(H,)` are logits that take attention away and bring nothing (GPT-OSS).
    """
    if len(parts) == 1 and sinks is None:
        return parts[0][..., :-1]
    logits = [part[..., -1:] for part in parts]
    if sinks is not None:
        logits.append(sinks.to(logits[0].dtype)[:, None].expand_as(logits[0]))
    weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
    output = parts[0][..., :-1] * weights[..., :1]
    for place, part in enumerate(parts[1:], start=1):
        output += part[..., :-1] * weights[..., place : place + 1]
    return output
