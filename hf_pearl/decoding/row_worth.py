"""What a token of each row is worth: the row that ends last decides when a call does."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .policy import Cycles
from .request import Request


def row_worths(requests: Sequence[Request], cycles: Cycles) -> dict[int, float]:
    """By how much a token shortens the call, for each row; 1.0 on average.

    A cycle over `n` rows takes `a + b n`. A token that need not be waited for saves the row's own `b` in any case, and
    the `a` of a whole cycle if it is the row that ends last. Which one that will be is uncertain: where a cycle yields
    `y` tokens, all but one by chance (geometrically distributed, a variance of `y (y - 1)`), the tokens of those cycles
    that `m` more tokens take vary by `sqrt(m (y - 1))`.

    Parameters
    ----------
    requests : sequence of Request
        The rows.
    cycles : Cycles
        What cycles of so many rows take and yield.
    """
    num_rows = len(requests)
    times = cycles.times
    if num_rows < 2 or not times.is_known:
        return {request.request_id: 1.0 for request in requests}
    per_row = times.per_token
    per_cycle = max(0.0, times.seconds(num_rows) - num_rows * per_row)
    left = [request.room + 1 for request in requests]
    longest = max(left)
    spread = max(1.0, math.sqrt(longest * (cycles.tokens_per_row - 1.0)))
    weights = [math.exp((each - longest) / spread) for each in left]
    average = per_row + per_cycle / num_rows
    if average <= 0.0:
        return {request.request_id: 1.0 for request in requests}
    share = per_cycle / sum(weights)
    return {
        request.request_id: (per_row + share * weight) / average
        for request, weight in zip(requests, weights, strict=True)
    }
