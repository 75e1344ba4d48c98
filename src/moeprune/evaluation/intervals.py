"""Intervals, tests and words for differences that were measured on a sample.

Axes: N items (windows of text, questions), G clusters (documents), D strata (domains).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL, POWER = 0.95, 0.8
FEWEST = 10
"""Fewer independent items than this carry no interval that can be trusted."""


@dataclass(frozen=True)
class Interval:
    """A number that was measured on a sample, and where it may lie.

    Attributes:
        value: the estimate.
        low, high: the interval; NaN where the sample has no spread to compute it from.
        level: in how many samples of its kind such an interval holds the truth.
        items: how many independent items it rests on: documents, windows or questions.
        method: how it was computed, in words.
    """

    value: float
    low: float
    high: float
    level: float
    items: int
    method: str

    @property
    def excludes_zero(self) -> bool:
        """Whether the sample shows a difference."""
        return self.low > 0.0 or self.high < 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON types; None for what is not finite."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {**finite, "level": self.level, "items": self.items, "method": self.method}


@dataclass(frozen=True)
class Estimate:
    """A weighted mean with its standard error.

    Attributes:
        value: sum of the items over the sum of their weights.
        error: standard error; NaN with fewer than two clusters.
        degrees: of freedom of the error.
        items: independent items, that is clusters.
        unit: what a cluster is, in the plural.
    """

    value: float
    error: float
    degrees: float
    items: int
    unit: str = "windows"

    def interval(self, level: float = LEVEL) -> Interval:
        """Student's t on the standard error."""
        half = self._quantile(1.0 - (1.0 - level) / 2.0) * self.error
        method = f"t, jackknife over {self.unit}"
        return Interval(self.value, self.value - half, self.value + half, level, self.items, method)

    def p_value(self) -> float:
        """Two-sided, of the value being 0."""
        if not math.isfinite(self.error):
            return 1.0
        if self.error == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        return float(2.0 * stats.t.sf(abs(self.value) / self.error, self.degrees))

    def smallest(self, level: float = LEVEL, power: float = POWER) -> float:
        """The smallest true difference that such a sample shows with probability ``power``.

        (t_{1-α/2} + t_power) · standard error, both at the degrees of freedom of the error.
        """
        return (self._quantile(1.0 - (1.0 - level) / 2.0) + self._quantile(power)) * self.error

    def _quantile(self, share: float) -> float:
        return float(stats.t.ppf(share, self.degrees)) if self.degrees > 0 else math.nan

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates, degrees by Welch and Satterthwaite."""
        return combined([(1.0, self), (-1.0, other)])


def estimate(
    sums_N: ArrayLike,
    weights_N: ArrayLike | None = None,
    clusters_N: ArrayLike | None = None,
    unit: str = "windows",
) -> Estimate:
    """The weighted mean of items, its error from leaving out one cluster at a time.

    r = Σs / Σw;  error² = (G-1)/G · Σ_g (r without g - r)², with G - 1 degrees of freedom. Paired
    differences are items like others: give the difference of the sums.

    Args:
        sums_N: a sum per item, for example of the difference of loss over the tokens of a window.
        weights_N: what each sum is over (tokens); 1 by default.
        clusters_N: the cluster of each item; each its own by default.
        unit: what a cluster is, in the plural.
    """
    s_N = np.asarray(sums_N, dtype=np.float64)
    w_N = np.ones_like(s_N) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    if clusters_N is not None:
        _, group_N = np.unique(np.asarray(clusters_N), return_inverse=True)
        s_N = np.bincount(group_N, s_N).astype(np.float64)
        w_N = np.bincount(group_N, w_N).astype(np.float64)
    count = len(s_N)
    total, weight = float(s_N.sum()), float(w_N.sum())
    value = total / weight if weight else math.nan
    if count < 2:
        return Estimate(value, math.nan, 0.0, count, unit)
    without_G = (total - s_N) / (weight - w_N)
    variance = (count - 1) / count * float(np.square(without_G - value).sum())
    if np.ptp(s_N / w_N) == 0.0:  # exactly alike: what is left is rounding
        variance = 0.0
    return Estimate(value, math.sqrt(variance), count - 1.0, count, unit)


def combined(parts: list[tuple[float, Estimate]]) -> Estimate:
    """Σ factor · estimate of independent parts, such as domains.

    Degrees of freedom by Satterthwaite: (Σ v)² / Σ (v² / degrees), v the variances.
    """
    value = math.fsum(factor * part.value for factor, part in parts)
    variances = [(factor * part.error) ** 2 for factor, part in parts]
    variance = math.fsum(variances)
    below = math.fsum(
        v * v / part.degrees if part.degrees else math.nan
        for v, (_, part) in zip(variances, parts, strict=True)
    )
    degrees = variance * variance / below if below else sum(part.degrees for _, part in parts)
    items = sum(part.items for _, part in parts)
    return Estimate(value, math.sqrt(variance), degrees, items, parts[0][1].unit)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are right equally often on the same questions.

    Args:
        only_first, only_second: questions that one of them alone got right.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError("counts are not negative")
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)


def proportion_difference(
    only_first: int, only_second: int, items: int, level: float = LEVEL
) -> Interval:
    """Interval for (share right of the second) - (share right of the first), paired by question.

    Adjusted Wald of Bonett and Price: one question is added to each kind of disagreement, which
    keeps the level at small counts and gives an interval of some width where none disagree.
    """
    if items < 1 or only_first + only_second > items:
        raise ValueError("more disagreements than questions")
    first, second = (only_first + 1) / (items + 2), (only_second + 1) / (items + 2)
    middle = second - first
    error = math.sqrt((first + second - middle**2) / (items + 2))
    half = float(stats.norm.ppf(1.0 - (1.0 - level) / 2.0)) * error
    value = (only_second - only_first) / items
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Interval(value, low, high, level, items, "adjusted Wald, paired by question")


def smallest_proportion_difference(
    only_first: int, only_second: int, items: int, level: float = LEVEL, power: float = POWER
) -> float:
    """The smallest difference of two shares that so many questions show; see ``smallest``."""
    first, second = (only_first + 1) / (items + 2), (only_second + 1) / (items + 2)
    z = float(stats.norm.ppf(1.0 - (1.0 - level) / 2.0) + stats.norm.ppf(power))
    return min(1.0, z * math.sqrt((first + second) / (items + 2)))


def holm(p_values: ArrayLike) -> Floats:
    """p-values adjusted for looking at several things (Holm 1979), in the order given."""
    p_D = np.asarray(p_values, dtype=np.float64)
    order_D = np.argsort(p_D, kind="stable")
    factors_D = np.arange(len(p_D), 0, -1)
    raised_D = np.minimum(1.0, np.maximum.accumulate(p_D[order_D] * factors_D))
    adjusted_D = np.empty_like(p_D)
    adjusted_D[order_D] = raised_D
    return adjusted_D


def verdict(
    interval: Interval,
    smallest: float,
    wanted: float,
    unit: str,
    worse: int = 1,
    form: str = ".3g",
    things: str = "items",
    advice: str = "",
    fewest: int = FEWEST,
) -> str:
    """What a difference means, in words.

    Args:
        interval: of the difference.
        smallest: the smallest difference that the sample could show.
        wanted: the difference that matters.
        unit: of the difference, for example ``nats per token``.
        worse: 1 if a positive difference is worse, -1 if a negative one is.
        form: how numbers are written.
        things: what the items are, in the plural.
        advice: how to get a larger sample; put at the end where it is too small.
        fewest: with fewer items nothing is concluded.
    """
    if not math.isfinite(interval.value):
        return "unknown: not all numbers are finite"
    if interval.items < fewest or (not interval.excludes_zero and not smallest <= wanted):
        shows = (
            f"can only show a difference of {smallest:{form}} {unit}"
            if math.isfinite(smallest) and smallest > 0
            else "cannot show a difference"
        )
        more = f"; {advice}" if advice else ""
        return f"too small a sample: {interval.items} {things} {shows}{more}"
    if interval.excludes_zero:
        word = "worse" if interval.value * worse > 0 else "better"
        ends = sorted((abs(interval.low), abs(interval.high)))
        between = f"{ends[0]:{form}} to {ends[1]:{form}}"
        return f"{word} by {abs(interval.value):{form}} {unit} ({between})"
    return f"no difference seen: the sample would have shown {smallest:{form}} {unit}"
