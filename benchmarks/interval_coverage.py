"""How often the intervals of ``moeprune evaluate`` hold the truth.

python benchmarks/interval_coverage.py [REPETITIONS [ROW]]     prints the tables of docs/evaluate.md

or the rows alone whose names hold ROW, such as "documents of one domain 1.5" or "shares".

Means by simulation; differences of paired shares exactly: every outcome and its probability.

Data are drawn as they look on the embedded model: documents of different lengths; what is lost
differs between documents, skewed to the right; windows scatter more in documents that lose more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import arguments
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moeprune.evaluation.intervals import Estimate, Interval, combined, estimate
from moeprune.evaluation.shares import Pairs

Floats = NDArray[np.float64]
Draw = tuple[Interval, float]
"""An interval, and the truth."""

TOKENS = 255.0
LOSS = 0.1  # nats per token, on average


def lost(rng: np.random.Generator, documents: int, skew: float) -> tuple[Floats, Floats]:
    """Sums by window, and the document of each: mean ``LOSS`` whatever the lengths.

    Documents have a gamma factor of mean 1 whose skewness is ``skew``, and 1 to 30 windows.
    """
    shape = 4.0 / skew**2
    windows_G = np.clip(np.round(rng.lognormal(np.log(6.0), 0.5, documents)), 1, 30).astype(int)
    factor_N = np.repeat(rng.gamma(shape, 1.0 / shape, documents), windows_G)
    cluster_N = np.repeat(np.arange(documents), windows_G)
    scatter_N = rng.standard_normal(len(factor_N)) / np.sqrt(shape)
    return TOKENS * LOSS * factor_N * (1.0 + scatter_N), cluster_N


def domain(rng: np.random.Generator, documents: int, skew: float, stream: str = "") -> Estimate:
    """One domain of such windows."""
    sums_N, cluster_N = lost(rng, documents, skew)
    return estimate(sums_N, np.full(len(sums_N), TOKENS), cluster_N, "documents", stream)


def mean_of_documents(rng: np.random.Generator, size: int, skew: float) -> Draw:
    return domain(rng, size, skew).interval(), LOSS


def mean_of_windows(rng: np.random.Generator, size: int, skew: float) -> Draw:
    """Windows that are known to be independent."""
    shape = 4.0 / skew**2
    sums_N = TOKENS * LOSS * rng.gamma(shape, 1.0 / shape, size)
    return estimate(sums_N, np.full(size, TOKENS)).interval(), LOSS


def agreement(rng: np.random.Generator, size: int, skew: float) -> Draw:
    """Nine tokens of ten agree; disagreements are gathered in some documents."""
    shape = 4.0 / skew**2
    share_G = np.minimum(1.0, 0.1 * rng.gamma(shape, 1.0 / shape, size))
    windows_G = rng.integers(1, 12, size)
    share_N = np.repeat(share_G, windows_G)
    agree_N = TOKENS - rng.binomial(int(TOKENS), share_N)
    cluster_N = np.repeat(np.arange(size), windows_G)
    return estimate(agree_N, np.full(len(agree_N), TOKENS), cluster_N).interval(), 0.9


def several(rng: np.random.Generator, size: int, skew: float, count: int = 6) -> list[Estimate]:
    return [domain(rng, size, skew, f"domain {number}") for number in range(count)]


def all_domains(rng: np.random.Generator, size: int, skew: float) -> Draw:
    parts = several(rng, size, skew)
    return combined([(1.0 / len(parts), part) for part in parts]).interval(), LOSS


def one_and_the_rest(rng: np.random.Generator, size: int, skew: float) -> Draw:
    first, *others = several(rng, size, skew)
    rest = combined([(1.0 / len(others), part) for part in others])
    return first.minus(rest).interval(), 0.0


def students_t(rng: np.random.Generator, size: int, skew: float) -> Draw:
    """Not used by the package: what the usual interval would do."""
    sums_N, cluster_N = lost(rng, size, skew)
    sums_G, tokens_G = np.bincount(cluster_N, sums_N), TOKENS * np.bincount(cluster_N)
    value, tokens = sums_N.sum() / tokens_G.sum(), tokens_G.sum()
    squares = np.square(sums_G - value * tokens_G).sum()
    error = math.sqrt(size / (size - 1) * squares) / tokens
    half = float(stats.t.ppf(0.975, size - 1)) * error
    return Interval(value, value - half, value + half, 0.95, size, "Student's t"), LOSS


def percentiles(rng: np.random.Generator, size: int, skew: float) -> Draw:
    """Not used by the package: quantiles of the resampled means."""
    found = domain(rng, size, skew)
    low, high = found.value + np.quantile(found.shift_B, [0.025, 0.975])
    return replace(found.interval(), low=float(low), high=float(high)), LOSS


def exact(first: float, second: float, size: int) -> float:
    """Probability that the interval of a difference of shares holds it.

    Over all outcomes, but for those of less than 1e-6 together.

    Args:
        first, second: shares of the questions that one of two models alone has right.
        size: questions.
    """
    held = 0.0
    for one in _likely(size, first):
        # of the other questions, how many the second alone has right
        rest, among = size - one, second / (1.0 - first) if first < 1.0 else 0.0
        chance = float(stats.binom.pmf(one, size, first))
        others = [two for two in _likely(rest, among) if _holds(one, two, size, second - first)]
        held += chance * float(stats.binom.pmf(others, rest, among).sum())
    return held


def _likely(size: int, share: float) -> range:
    low, high = stats.binom.ppf([1e-8, 1.0 - 1e-8], size, share)
    return range(max(0, int(low)), int(high) + 1)


def _holds(one: int, two: int, size: int, truth: float) -> bool:
    low, high = _ends(one, two, size)
    return low <= truth <= high


@cache
def _ends(one: int, two: int, size: int) -> tuple[float, float]:
    found = Pairs(one, two, size).interval()
    return found.low, found.high


MEANS = {
    "documents of one domain": mean_of_documents,
    "independent windows": mean_of_windows,
    "agreement, documents": agreement,
    "all of six domains": all_domains,
    "one domain minus the others": one_and_the_rest,
    "*Student's t, documents*": students_t,
    "*percentile bootstrap, documents*": percentiles,
}
SIZES, SKEWS = (6, 8, 10, 15, 25, 50), (0.5, 1.0, 1.5)
SHARES = {
    "3 % and 3 %": (0.03, 0.03),
    "5 % and 1 %": (0.05, 0.01),
    "10 % and 5 %": (0.1, 0.05),
    "20 % and 20 %": (0.2, 0.2),
}
QUESTIONS = (50, 100, 200, 500, 2000)
DIFFERING = (1, 2, 3, 5, 7, 10, 12, 15, 20, 30, 50, 100)
SPLITS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
GRID = (20, 35, 50, 100, 200, 500, 2000)


def span(differing: float, split: float, sizes: Sequence[int] = GRID) -> tuple[float, float]:
    """Least and largest coverage over numbers of questions.

    Args:
        differing: questions on which the models are expected to differ.
        split: the smaller of both models' parts of these.
        sizes: numbers of questions; those that are too few are left out.
    """
    found = [
        exact(split * differing / size, (1.0 - split) * differing / size, size)
        for size in sizes
        if differing < size
    ]
    return min(found), max(found)


def coverage(draw: Callable[[], Draw], repetitions: int) -> float:
    """Share of intervals that hold the truth."""
    held = 0
    for _ in range(repetitions):
        interval, truth = draw()
        held += interval.low <= truth <= interval.high
    return held / repetitions


def rows(repetitions: int, wanted: str = "") -> Iterator[list[str]]:
    """Lines of the two tables, those whose names hold ``wanted``."""
    yield ["mean", "skewness", *map(str, SIZES)]
    for name, kind in MEANS.items():
        for skew in SKEWS:
            if wanted not in f"{name} {skew:.1f}":
                continue
            rng = np.random.default_rng(5)
            found = [
                coverage(lambda k=kind, s=size, w=skew, r=rng: k(r, s, w), repetitions)
                for size in SIZES
            ]
            yield [name, f"{skew:.1f}", *(f"{value:.1%}" for value in found)]
    yield from of_shares(wanted)


def of_shares(wanted: str = "") -> Iterator[list[str]]:
    """Lines of the tables of differences of shares."""
    if wanted not in "difference of shares right":
        return
    yield ["difference of shares right", *map(str, QUESTIONS)]
    for name, shares in SHARES.items():
        yield [f"one alone right: {name}", *(f"{exact(*shares, size):.1%}" for size in QUESTIONS)]
    yield ["expected to differ", *(f"{split:.0%} : {1.0 - split:.0%}" for split in SPLITS)]
    for differing in DIFFERING:
        spans = (span(differing, split) for split in SPLITS)
        yield [str(differing), *(f"{least:.1%} to {most:.1%}" for least, most in spans)]


def main() -> None:
    parser = arguments.parser(__doc__)
    parser.add_argument("repetitions", type=int, nargs="?", default=5000)
    parser.add_argument("row", nargs="?", default="")
    given = parser.parse_args()
    for cells in rows(given.repetitions, given.row):
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
