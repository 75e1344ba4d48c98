"""What goes wrong in generated text, defined on token ids alone: loops, repetition, few words.

Axes: n generated tokens of one answer, the end token left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOOP_REPEATS = 3
LOOP_TOKENS = 16
"""A loop is at least so many repeats of its unit, and at least so many tokens long."""


@dataclass(frozen=True)
class Loop:
    """The end of a text that repeats itself.

    Attributes:
        period: tokens of the unit that is repeated.
        tokens: how long the text goes on repeating, from the first unit to the last token.
    """

    period: int
    tokens: int


def find_loop(ids: Sequence[int]) -> Loop | None:
    """The loop in which a text ends; None if it ends in none.

    A text ends in a loop of period p if its last L tokens satisfy g[t] = g[t - p] (all but the
    first p of them), with L >= 3p and L >= 16. At least three repeats of a phrase at the end is
    the definition of arXiv 1904.09751, which asks for a phrase of two tokens; here one token may
    loop as well, and the length keeps an ellipsis, a rule of dashes or a round number from
    counting. The smallest such period is returned, and the last unit may be unfinished.
    """
    array_n = np.asarray(ids, dtype=np.int64)
    n = len(array_n)
    if n < LOOP_TOKENS:
        return None
    for period in range(1, n // LOOP_REPEATS + 1):
        differs = np.flatnonzero(array_n[period:] != array_n[:-period])
        tokens = n - (int(differs[-1]) + 1 if len(differs) else 0)
        if tokens >= max(LOOP_REPEATS * period, LOOP_TOKENS):
            return Loop(period, tokens)
    return None


def distinct(ids: Sequence[int], n: int) -> float:
    """distinct-n: different n-grams over all n-grams of one text (arXiv 1510.03055).

    1 for a text of fewer than n tokens, in which nothing can be repeated.
    """
    grams = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n: the share of n-grams that stood in the text before, 1 - distinct-n.

    Source: arXiv 1908.04319, with n = 4.
    """
    return 1.0 - distinct(ids, n)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """How many tokens two answers share from their beginning; None if they are the same."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return None if len(first) == len(second) else min(len(first), len(second))
