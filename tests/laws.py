"""The exact joint law of a model's next tokens, and whether counts follow it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from transformers import LogitsProcessorList, PreTrainedModel

MIN_EXPECTED = 5.0  # below, chi-square's approximation of a cell's count is poor


def exact_law(
    target: PreTrainedModel,
    prompt: list[int],
    num_tokens: int,
    processors: LogitsProcessorList,
    eos_token_id: int | None = None,
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `num_tokens` tokens, or fewer where one ends in `eos_token_id`.

    By enumeration: the chain rule over all prefixes, with plain forwards of the target without a cache.
    """
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for length in range(num_tokens):
        open_ones = [each for each in law if len(each) == length and eos_token_id not in each]
        ids = torch.tensor([[*prompt, *each] for each in open_ones])
        with torch.no_grad():
            logits = target(input_ids=ids).logits[:, -1]
        probabilities = processors(ids, logits.float()).double().softmax(dim=-1)
        for prefix, row in zip(open_ones, probabilities.tolist(), strict=True):
            chance = law.pop(prefix)
            law |= {(*prefix, token): chance * probability for token, probability in enumerate(row)}
    assert abs(sum(law.values()) - 1) < 1e-9
    return law


def chi_square_p_value(counts: dict[tuple[int, ...], int], law: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic, the rarest cells pooled until `MIN_EXPECTED` are expected; 0 for what cannot happen."""
    num_samples = sum(counts.values())
    if any(law.get(outcome, 0.0) == 0.0 for outcome in counts):
        return 0.0
    cells = sorted((chance * num_samples, counts.get(outcome, 0)) for outcome, chance in law.items() if chance > 0)
    pooled = list(itertools.accumulate(expected for expected, _ in cells))
    num_pooled = sum(expected < MIN_EXPECTED for expected, _ in cells)
    while num_pooled and num_pooled < len(cells) and pooled[num_pooled - 1] < MIN_EXPECTED:
        num_pooled += 1
    rare = [(sum(cell[0] for cell in cells[:num_pooled]), sum(cell[1] for cell in cells[:num_pooled]))]
    kept = (rare if num_pooled else []) + cells[num_pooled:]
    assert len(kept) > 10, "so few cells say little"
    expected, observed = torch.tensor(kept, dtype=torch.float64).T
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(kept) - 1) / 2, dtype=torch.float64), statistic / 2))


def law_holds(p_value: Callable[[int, int], float], num_samples: int, num_laws: int) -> bool:
    """Two stages, for one of `num_laws` laws: p < 1e-3 / `num_laws` draws four times as many, and 1e-4 there fails.

    `p_value` draws a number of samples with the seeds of a stage, 0 or 1. All laws being right, one of them fails with
    a chance of 1e-7 / `num_laws`.
    """
    return p_value(0, num_samples) >= 1e-3 / num_laws or p_value(1, 4 * num_samples) >= 1e-4 / num_laws
