"""How often the intervals of ``moeprune evaluate`` hold the truth, by simulation.

python benchmarks/interval_coverage.py [REPETITIONS [ROW]]     prints the table of docs/evaluate.md

or the rows alone whose names hold ROW, such as "documents of one domain 1.5".

Data are drawn as they look on the embedded model: documents of different lengths; what is lost
differs between documents, skewed to the right; windows scatter more in documents that lose more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moeprune.evaluation.intervals import (
    Estimate,
    Interval,
    combined,
    estimate,
    proportion_difference,
)

Floats = NDArray[np.float64]
Draw = tuple[Interval, float]
"""An interval, and the truth."""

TOKENS = 255.0
LOSS = 0.1  # nats per token, on average


def domain(rng: np.random.Generator, documents: int, skew: float, stream: str = "") -> Estimate:
    """One domain: windows in documents, mean ``LOSS`` whatever the lengths.

    Documents have a gamma factor of mean 1 whose skewness is ``skew``, and 1 to 30 windows.
    """
    shape = 4.0 / skew**2
    windows_G = np.clip(np.round(rng.lognormal(np.log(6.0), 0.5, documents)), 1, 30).astype(int)
    factor_N = np.repeat(rng.gamma(shape, 1.0 / shape, documents), windows_G)
    cluster_N = np.repeat(np.arange(documents), windows_G)
    scatter_N = rng.standard_normal(len(factor_N)) / np.sqrt(shape)
    sums_N = TOKENS * LOSS * factor_N * (1.0 + scatter_N)
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
    found = domain(rng, size, skew)
    half = float(stats.t.ppf(0.975, size - 1)) * found.error
    return replace(found.interval(), low=found.value - half, high=found.value + half), LOSS


def percentiles(rng: np.random.Generator, size: int, skew: float) -> Draw:
    """Not used by the package: quantiles of the resampled means."""
    found = domain(rng, size, skew)
    low, high = found.value + np.quantile(found.shift_B, [0.025, 0.975])
    return replace(found.interval(), low=float(low), high=float(high)), LOSS


def questions(first: float, second: float) -> Callable[[np.random.Generator, int], Draw]:
    """Two models of which each alone is right on such shares of the questions."""

    def draw(rng: np.random.Generator, size: int) -> Draw:
        one, two, _ = rng.multinomial(size, (first, second, 1.0 - first - second))
        return proportion_difference(int(one), int(two), size), second - first

    return draw


MEANS = {
    "documents of one domain": mean_of_documents,
    "independent windows": mean_of_windows,
    "agreement, documents": agreement,
    "all of six domains": all_domains,
    "one domain minus the others": one_and_the_rest,
    "*Student's t, documents*": students_t,
    "*percentile bootstrap, documents*": percentiles,
}
SHARES = {"3 % and 3 %": (0.03, 0.03), "10 % and 5 %": (0.1, 0.05), "20 % and 20 %": (0.2, 0.2)}
SIZES, SKEWS, QUESTIONS = (6, 8, 10, 15, 25, 50), (0.5, 1.0, 1.5), (50, 100, 200, 500, 2000)


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
    yield ["difference of shares right", "", *map(str, QUESTIONS)]
    for name, (first, second) in SHARES.items():
        if wanted not in f"one alone right: {name}":
            continue
        rng, draw = np.random.default_rng(5), questions(first, second)
        found = [coverage(lambda d=draw, s=size, r=rng: d(r, s), repetitions) for size in QUESTIONS]
        yield [f"one alone right: {name}", "", *(f"{value:.1%}" for value in found)]


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    for cells in rows(repetitions, "".join(sys.argv[2:3])):
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
