"""Where two outputs part: is it a near-tie of the target's own choice?

A token's logits change with the size of the window that they are computed in (rounding), so that two tokens which are
nearly equally good may change places. Such a first difference says nothing about the decoding; any other is a bug.

Shapes: `t` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from ..compat import cache_argument
from ..decoding.noise import gumbel_noise, request_seed

WINDOWS = (1, 4, 9)  # query tokens: plain decoding, and what speculative decoding verifies at once
# Tokens whose logits are compared: of the embedded target's in bfloat16, none changes in many a stretch of nine.
MIN_COMPARED = 64


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """The first place where two outputs differ (one may end before the other); None where they are equal."""
    for place, (one, other) in enumerate(zip(expected, got, strict=False)):
        if one != other:
            return place
    return None if len(expected) == len(got) else min(len(expected), len(got))


@torch.no_grad()
def is_near_tie(
    target: PreTrainedModel,
    prompt: torch.Tensor,
    expected: Sequence[int],
    got: Sequence[int],
    temperature: float = 0.0,
    call_seed: int = 0,
    row: int = 0,
) -> bool:
    """Whether two outputs part at two tokens that the target finds equally good, as far as its rounding can tell.

    That is: their scores (`log p`, with the noise of sampling) are at most twice as far apart as the largest change of
    a score between windows of different sizes, or no farther than two logits that are neighbours in the target's dtype.

    Parameters
    ----------
    prompt : torch.Tensor
        `(1, prompt length)`, without padding.
    expected, got : sequence of int
        The tokens after the prompt.
    row : int
        Of the prompt in its batch, each of which has noise of its own.
    """
    place = first_difference(expected, got)
    if place is None or place >= min(len(expected), len(got)):
        return False  # Equal, or they stop differently.
    ids = torch.cat([prompt, torch.tensor([list(expected[:place])], dtype=prompt.dtype, device=prompt.device)], dim=1)
    scale = temperature or 1.0
    first, *others = [window_logits(target, ids, prompt.shape[1], window) / scale for window in WINDOWS]
    change = max(float((first - other).abs().max()) for other in others)
    both = [expected[place], got[place]]
    resolution = torch.finfo(target.dtype).eps * float(first[-1][both].abs().max())
    scores = first[-1]
    if temperature:
        scores = scores + gumbel_noise(request_seed(call_seed, row), ids.shape[1], 1, scores.shape[0], scores.device)[0]
    return abs(float(scores[both[0]] - scores[both[1]])) <= max(2 * change, resolution)


def window_logits(target: PreTrainedModel, ids: torch.Tensor, num_prompt_tokens: int, window: int) -> torch.Tensor:
    """Logits after the prompt and after every token behind it, computed `window` tokens at a time: `(t, V)`, float32.

    Windows are aligned to the end. Of the prompt, the last tokens are computed so too where little is behind it, so
    that the largest change is that of `MIN_COMPARED` tokens where there are as many.
    """
    kept = {cache_argument(target): DynamicCache(config=target.config), "use_cache": True}
    start, length = min(num_prompt_tokens, max(1, ids.shape[1] - MIN_COMPARED)), ids.shape[1]
    rows = [target(ids[:, :start], **kept).logits[:, -1:]]
    ends = [*range(length, start, -window)][::-1]  # Aligned to the end.
    for end in ends:
        rows.append(target(ids[:, start:end], **kept).logits)
        start = end
    return torch.cat(rows, dim=1)[0].float()
