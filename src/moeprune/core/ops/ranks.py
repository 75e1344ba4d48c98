"""Ranks of matrices that share one budget, higher where more is at stake."""

from __future__ import annotations

import math
from collections.abc import Sequence


def shared_ranks(importance: Sequence[float], outputs: int, inputs: int, ratio: float) -> list[int]:
    """The rank of one matrix of each expert, in proportion to the experts' importance.

    Two factors of rank r hold r (outputs + inputs) weights. All factors together hold at most the
    fraction 1 - ratio of the weights of the matrices. Ranks are handed out one at a time by the
    divisor method of Webster, from 1 up to min(outputs, inputs) each; ties go to the lower id.
    """
    C, most = len(importance), min(outputs, inputs)
    mean = (1 - ratio) * outputs * inputs / (outputs + inputs)
    total = min(C * most, max(C, math.floor(C * mean)))
    weights = [w if math.isfinite(w) and w > 0 else 0.0 for w in importance]
    if not any(weights):
        weights = [1.0] * C
    seats = sorted(
        (-weight / (rank - 0.5), rank, expert)
        for expert, weight in enumerate(weights)
        for rank in range(2, most + 1)
    )
    ranks = [1] * C
    for *_, expert in seats[: total - C]:
        ranks[expert] += 1
    return ranks
