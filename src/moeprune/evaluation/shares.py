"""Shares of yes and no of two models, paired: the same questions, or the same prompts.

Two models differ on a question when one of them alone is right. Nothing else tells them apart, so
the number of such questions, not that of all, says what a sample can show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from moeprune.evaluation.intervals import FEWEST, LEVEL, POWER, Interval, verdict

Counts = NDArray[np.int64]
_METHOD = "Tango's score interval, paired by question"

FEW = 10
"""From so many expected differences on, intervals hold the truth as often as they promise."""


@dataclass(frozen=True)
class Pairs:
    """Yes or no of two models on the same items.

    Attributes:
        only_first, only_second: items on which one of them alone says yes.
        items: all.
    """

    only_first: int
    only_second: int
    items: int

    def __post_init__(self) -> None:
        if min(self.only_first, self.only_second) < 0:
            raise ValueError("counts are not negative")
        if self.items < 1 or self.differing > self.items:
            raise ValueError("more disagreements than questions")

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Pairs:
        """Counted from numbers that are 0 or 1, in the same order."""
        both = list(zip(first, second, strict=True))
        return cls(sum(a > b for a, b in both), sum(a < b for a, b in both), len(both))

    @property
    def differing(self) -> int:
        """Items on which they are not alike."""
        return self.only_first + self.only_second

    def interval(self, level: float = LEVEL) -> Interval:
        """Of (share of the second) - (share of the first): Tango's score interval.

        All d for which |z(d)| is at most the normal quantile, where with b = ``only_second``,
        c = ``only_first``, n = ``items``

            z(d) = (b - c - n·d) / √(n·(2q + d·(1 - d))),
            q = (√(B² + 8n·c·d·(1 - d)) - B) / 4n,   B = (2n - b + c)·d - b - c,

        and q is the likeliest share of c if d is the difference (Tango, Statistics in Medicine 17,
        1998). docs/evaluate.md says how often it holds the truth.
        """
        low, high = self._ends(_quantile(level))
        return Interval(self._value, low, high, level, self.items, _METHOD)

    @property
    def _value(self) -> float:
        return (self.only_second - self.only_first) / self.items

    def _ends(self, z: float) -> tuple[float, float]:
        n, square = self.items, z * z
        # where all differ one way, or none, z(d) has no variance at the estimate: these are limits
        if not self.differing:
            return -square / (n + square), square / (n + square)
        if self.only_second == n:
            return (n - square) / (n + square), 1.0
        if self.only_first == n:
            return -1.0, (square - n) / (n + square)
        low = brentq(self._outside, -1.0, self._value, args=(-z,))
        high = brentq(self._outside, self._value, 1.0, args=(z,))
        return float(low), float(high)

    def _outside(self, difference: float, z: float) -> float:
        """Numerator of z(d) plus z times its denominator: 0 at an end, and finite everywhere."""
        b, c, n = self.only_second, self.only_first, self.items
        half = (2 * n - b + c) * difference - b - c
        under = half * half + 8 * n * c * difference * (1.0 - difference)
        q = (math.sqrt(max(0.0, under)) - half) / (4 * n)
        variance = n * (2.0 * q + difference * (1.0 - difference))
        return b - c - n * difference + z * math.sqrt(max(0.0, variance))

    def p_value(self) -> float:
        """Exact McNemar test, two-sided, of both saying yes equally often."""
        if not self.differing:
            return 1.0
        return float(stats.binomtest(self.only_first, self.differing, 0.5).pvalue)

    def smallest(self, level: float = LEVEL, power: float = POWER) -> float:
        """The smallest true difference that the exact test shows with probability ``power``.

        If the models differ on as many items as here, or on as many as the difference itself takes,
        in a new sample of this size. NaN where no difference would be shown.
        """
        limit_N = _fewest_wins(self.items, level)
        share = self.differing / self.items

        def missed(difference: float) -> float:
            return power - _power(limit_N, self.items, max(share, difference), difference)

        if missed(1.0) > 0.0:
            return math.nan
        return float(brentq(missed, 0.0, 1.0, xtol=1e-9))

    def verdict(
        self, wanted: float, worse: int = 1, form: str = ".3g", things: str = "items",
        advice: str = "",
    ) -> str:  # fmt: skip
        """What the difference means, in words; see ``intervals.verdict``. Told in points.

        Interval and test do not contradict each other: a difference is one that both show. The test
        is the stricter one.
        """
        interval, smallest = self.interval().times(100.0), 100.0 * self.smallest()
        shown = self.p_value() <= 1.0 - LEVEL
        few = self.differing < FEW
        if shown or self.items < FEWEST or not (few or interval.excludes_zero):
            said = verdict(
                interval, smallest, 100.0 * wanted, "points", worse, form, things, advice
            )
            rough = f"; {self._counted(things)}, so by how much is rough"
            return said + rough if shown and few else said
        if few and not smallest <= 100.0 * wanted:
            more = f"; {advice}" if advice else ""
            return f"too small a sample: {self._counted(things)}, too few to say{more}"
        if not interval.excludes_zero:
            return verdict(interval, smallest, 100.0 * wanted, "points", worse, form, things)
        word = "worse" if interval.value * worse > 0 else "better"
        ends = sorted((abs(interval.low), abs(interval.high)))
        return (
            f"uncertain: {word} by {abs(interval.value):{form}} points in the sample "
            f"({ends[0]:{form}} to {ends[1]:{form}}), which the exact test does not show "
            f"(p = {self.p_value():.2g})"
        )

    def _counted(self, things: str) -> str:
        if not self.differing:
            return f"none of {self.items} {things} came out differently"
        return f"only {self.differing} of {self.items} {things} came out differently"


def _quantile(level: float) -> float:
    return float(stats.norm.ppf(0.5 + level / 2.0))


def _fewest_wins(items: int, level: float) -> Counts:
    """By number of differences 0 … N: how many must go one way for the exact test to show it."""
    count_N = np.arange(items + 1)
    # k or more have at most half of what is left of the level: k lies above the upper quantile
    least_N: Counts = stats.binom.isf((1.0 - level) / 2.0, count_N, 0.5).astype(np.int64) + 1
    return least_N


def _power(limit_N: Counts, items: int, share: float, difference: float) -> float:
    """Probability that the exact test shows ``difference`` if the models differ on ``share``."""
    count_N = np.arange(items + 1)
    one_way = min(1.0, 0.5 + 0.5 * difference / share) if share > 0.0 else 0.5
    shown_N = stats.binom.sf(limit_N - 1, count_N, one_way)
    return float(stats.binom.pmf(count_N, items, share) @ shown_N)
