"""Intervals, tests and words for differences that were measured on a sample.

Axes: N items or clusters of items (windows of text, documents, questions), B resamples, D domains.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

LEVEL, POWER = 0.95, 0.8
RESAMPLES = 1999
MOST = 300
"""With more clusters than this the mean is normal, and nothing is resampled."""
FEWEST = 6
"""Fewer independent items than this carry no interval that can be trusted."""
_NO_SPREAD = 1e-9
_PLURAL = re.compile(r"s\b")
_APART = 211  # resamples; a prime that does not divide their number


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

    def times(self, factor: float) -> Interval:
        """In another unit; ``factor`` is positive."""
        value, low, high = (factor * each for each in (self.value, self.low, self.high))
        return replace(self, value=value, low=low, high=high)

    def within(self, least: float, most: float) -> Interval:
        """Without what the number can never be; an end that is not known stays so."""
        low, high = (float(np.clip(end, least, most)) for end in (self.low, self.high))
        return replace(self, low=low, high=high)

    def to_json(self) -> dict[str, Any]:
        """JSON types; None for what is not finite."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {**finite, "level": self.level, "items": self.items, "method": self.method}


@dataclass(frozen=True)
class Estimate:
    """A weighted mean, its standard error, and both again in B resamples of its clusters.

    Attributes:
        value: sum of the items over the sum of their weights.
        error: standard error, widened where clusters are few and of unequal weight; NaN with fewer
            than two clusters.
        items: independent items, that is clusters.
        unit: what a cluster is, in the plural.
        shift_B: value of each resample minus ``value``.
        error_B: standard error of each resample.
    """

    value: float
    error: float
    items: int
    unit: str
    shift_B: Floats = field(repr=False, compare=False)
    error_B: Floats = field(repr=False, compare=False)

    @cached_property
    def _t_B(self) -> Floats:
        """|t| of the resamples, ascending; infinite where a resample has no spread."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t_B = np.abs(self.shift_B) / self.error_B
        return np.sort(np.where(self.error_B > _NO_SPREAD * self.error, t_B, np.inf))

    def half(self, level: float = LEVEL) -> float:
        """Half the width of the interval; NaN if the sample cannot tell."""
        if not math.isfinite(self.error):
            return math.nan
        if self.error == 0.0:
            return 0.0
        rank = math.ceil(level * (len(self._t_B) + 1)) - 1
        t = float(self._t_B[rank])
        return t * self.error if math.isfinite(t) else math.nan

    def interval(self, level: float = LEVEL) -> Interval:
        """value ± the ``level`` quantile of |t| in the resamples, times the standard error.

        Symmetric bootstrap-t (Hall 1988): means of few skewed documents need wider intervals than
        Student's t gives; docs/evaluate.md shows how often they hold the truth.
        """
        half, method = self.half(level), f"bootstrap-t over {self.unit}"
        return Interval(self.value, self.value - half, self.value + half, level, self.items, method)

    def p_value(self) -> float:
        """Two-sided, of the value being 0; the interval and this agree on what differs."""
        if not math.isfinite(self.error):
            return 1.0
        if self.error == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        above = len(self._t_B) - np.searchsorted(self._t_B, abs(self.value) / self.error)
        return float((above + 1) / (len(self._t_B) + 1))

    def smallest(self, level: float = LEVEL, power: float = POWER) -> float:
        """The smallest true difference that such a sample shows with probability ``power``.

        Half the interval plus z_power standard errors.
        """
        return self.half(level) + float(stats.norm.ppf(power)) * self.error

    def minus(self, other: Estimate) -> Estimate:
        """The difference of two independent estimates."""
        return combined([(1.0, self), (-1.0, other)])


def estimate(
    sums_N: ArrayLike,
    weights_N: ArrayLike | None = None,
    clusters_N: ArrayLike | None = None,
    unit: str = "windows",
    stream: str = "",
) -> Estimate:
    """The weighted mean of items that come in clusters, with its error.

    r = Σs / Σw;  error² = k² · G/(G-1) · Σ_g (s_g - r·w_g)² / (Σw)², G clusters. Paired differences
    are items like others: give the difference of the sums. k is of ``_widening``.

    Args:
        sums_N: a sum per item, for example of the difference of loss over the tokens of a window.
        weights_N: what each sum is over (tokens); 1 by default.
        clusters_N: the cluster of each item; each its own by default.
        unit: what a cluster is, in the plural.
        stream: seeds the resampling; give estimates that are to be combined different ones.
    """
    s_N = np.asarray(sums_N, dtype=np.float64)
    w_N = np.ones_like(s_N) if weights_N is None else np.asarray(weights_N, dtype=np.float64)
    if clusters_N is not None:
        _, group_N = np.unique(np.asarray(clusters_N), return_inverse=True)
        s_N = np.bincount(group_N, s_N).astype(np.float64)
        w_N = np.bincount(group_N, w_N).astype(np.float64)
    count = len(s_N)
    value = float(s_N.sum() / w_N.sum()) if count else math.nan
    if count < 2 or not math.isfinite(value):
        unknown_B = np.full(RESAMPLES, math.nan)
        return Estimate(value, math.nan, count, unit, unknown_B, unknown_B)
    if np.ptp(s_N / w_N) == 0.0:  # exactly alike: what is left would be rounding
        return Estimate(value, 0.0, count, unit, np.zeros(RESAMPLES), np.zeros(RESAMPLES))
    factor = math.sqrt(count / (count - 1))
    rest_N = s_N - value * w_N
    error = factor * math.sqrt(float(np.square(rest_N).sum())) / float(w_N.sum())
    error *= _widening(w_N)
    if count > MOST:
        drawn_B = np.random.default_rng(zlib.crc32(stream.encode())).standard_normal(RESAMPLES)
        return Estimate(value, error, count, unit, drawn_B * error, np.full(RESAMPLES, error))
    columns_N5 = np.stack([w_N, rest_N, rest_N**2, rest_N * w_N, w_N**2], axis=1)
    weight_B, moved_B, rest_B, mixed_B, square_B = (_resamples(count, stream) @ columns_N5).T
    shift_B = moved_B / weight_B
    # Σ (rest - shift·w)² over each resample, multiplied out
    squares_B = rest_B - 2.0 * shift_B * mixed_B + np.square(shift_B) * square_B
    error_B = factor * np.sqrt(np.maximum(squares_B, 0.0)) / weight_B
    return Estimate(value, error, count, unit, shift_B, error_B)


def _widening(weights_N: Floats) -> float:
    """By how much unequal weights widen an interval: t(G* - 1) / t(G - 1), at least 1.

    G* = (Σw)² / Σw² clusters of equal weight tell as much as these G (Kish 1965); t(n) is the
    two-sided quantile of Student's t. The resamples alone leave intervals of few documents of
    different lengths too short where what they lose is skewed. Below ``FEWEST`` clusters the
    resamples are wide enough.
    """
    count = len(weights_N)
    if count < FEWEST or np.ptp(weights_N) == 0.0:
        return 1.0
    effective = float(weights_N.sum() ** 2 / np.square(weights_N).sum())
    few, all_ = stats.t.ppf(0.5 + LEVEL / 2.0, [max(1.0, effective - 1.0), count - 1.0])
    return float(few / all_)


@lru_cache(maxsize=16)
def _resamples(count: int, stream: str) -> Floats:
    """How often each of ``count`` clusters is in each of B resamples."""
    seeded = np.random.default_rng([zlib.crc32(stream.encode()), count])
    drawn_BN = seeded.multinomial(count, np.full(count, 1.0 / count), RESAMPLES)
    return drawn_BN.astype(np.float64)


def combined(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """Σ factor · estimate of independent parts, such as domains; errors add in squares.

    Resample by resample; parts of one stream are shifted against each other, so that what was drawn
    for one does not go together with the same draw for another.
    """
    shift_B = np.zeros(RESAMPLES)
    squares_B = np.zeros(RESAMPLES)
    for number, (factor, part) in enumerate(parts):
        shift_B += factor * np.roll(part.shift_B, number * _APART)
        squares_B += np.square(factor * np.roll(part.error_B, number * _APART))
    return Estimate(
        value=math.fsum(factor * part.value for factor, part in parts),
        error=math.sqrt(math.fsum((factor * part.error) ** 2 for factor, part in parts)),
        items=sum(part.items for _, part in parts),
        unit=_unit([part.unit for _, part in parts]),
        shift_B=shift_B,
        error_B=np.sqrt(squares_B),
    )


def _unit(units: Sequence[str]) -> str:
    distinct = sorted(set(units))
    return " and ".join(distinct)


def holm(p_values: ArrayLike) -> Floats:
    """p-values adjusted for looking at several things (Holm 1979), in the order given."""
    p_D = np.asarray(p_values, dtype=np.float64)
    order_D = np.argsort(p_D, kind="stable")
    factors_D = np.arange(len(p_D), 0, -1)
    raised_D = np.minimum(1.0, np.maximum.accumulate(p_D[order_D] * factors_D))
    adjusted_D = np.empty_like(p_D)
    adjusted_D[order_D] = raised_D
    return adjusted_D


def counted(count: int, things: str) -> str:
    """``3 questions``, ``1 question``; of ``windows of one document`` the first word changes."""
    return f"{count} {re.sub(_PLURAL, '', things, count=1) if count == 1 else things}"


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
        return f"too small a sample: {counted(interval.items, things)} {shows}{more}"
    if interval.low == interval.high == 0.0:
        return f"no difference: the same on all {interval.items} {things}"
    if interval.excludes_zero:
        word = "worse" if interval.value * worse > 0 else "better"
        ends = sorted((abs(interval.low), abs(interval.high)))
        between = f"{ends[0]:{form}} to {ends[1]:{form}}"
        return f"{word} by {abs(interval.value):{form}} {unit} ({between})"
    return f"no difference seen: the sample would have shown {smallest:{form}} {unit}"
