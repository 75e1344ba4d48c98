"""Intervals against formulas written out here, and against how often they hold the truth."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moeprune.evaluation.intervals import (
    FEWEST,
    MOST,
    Interval,
    combined,
    counted,
    estimate,
    holm,
    verdict,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import interval_coverage


def test_mean_and_error_of_clusters() -> None:
    sums, weights, cluster = [3.0, 1.0, 5.0, 2.0], [2.0, 1.0, 2.0, 1.0], [7, 7, 1, 4]
    found = estimate(sums, weights, cluster)
    by_cluster = [(4.0, 3.0), (5.0, 2.0), (2.0, 1.0)]
    mean = 11.0 / 6.0
    squares = sum((s - mean * w) ** 2 for s, w in by_cluster)
    assert (found.value, found.items) == (pytest.approx(mean), 3)
    assert found.error == pytest.approx(math.sqrt(3 / 2 * squares) / 6.0)


def test_error_of_equal_items_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(size=40)
    found = estimate(values)
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    student = stats.t.ppf(0.975, 39) * found.error
    assert found.half() == pytest.approx(student, rel=0.1)


def test_resampling_is_the_bootstrap_written_out() -> None:
    """Two resamples that are drawn again here, item by item."""
    rng = np.random.default_rng(3)
    sums, weights = rng.gamma(2.0, size=12), rng.integers(1, 5, 12).astype(float)
    found = estimate(sums, weights, stream="x")
    from moeprune.evaluation.intervals import _resamples

    for number in (0, 17):
        items = np.repeat(np.arange(12), _resamples(12, "x")[number].astype(int))
        assert len(items) == 12
        s, w = sums[items], weights[items]
        mean = s.sum() / w.sum()
        error = math.sqrt(12 / 11 * ((s - mean * w) ** 2).sum()) / w.sum()
        assert found.value + found.shift_B[number] == pytest.approx(mean)
        assert found.error_B[number] == pytest.approx(error)


def test_unequal_documents_count_as_fewer() -> None:
    """Six documents of which one is half of the text tell as much as three and a third."""
    sums, weights = [1.0, 2.0, 3.0, 5.0, 4.0, 9.0], [1.0, 1.0, 1.0, 1.0, 1.0, 5.0]
    mean = 24.0 / 10.0
    plain = math.sqrt(6 / 5 * sum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True)))
    effective = 10.0**2 / (5 * 1.0 + 5.0**2)
    wider = stats.t.ppf(0.975, effective - 1) / stats.t.ppf(0.975, 5)
    assert estimate(sums, weights).error == pytest.approx(wider * plain / 10.0)
    assert estimate(sums).error == pytest.approx(np.std(sums, ddof=1) / math.sqrt(6))


def test_same_numbers_every_time() -> None:
    sums = np.random.default_rng(1).gamma(2.0, size=15)
    first, second = estimate(sums, stream="a").interval(), estimate(sums, stream="a").interval()
    assert first == second
    assert estimate(sums, stream="b").interval() != first


def test_many_clusters_are_normal() -> None:
    sums = np.random.default_rng(2).normal(size=MOST + 1)
    found = estimate(sums)
    assert found.half() == pytest.approx(1.96 * found.error, rel=0.1)


def test_no_spread_and_too_few() -> None:
    alike = estimate([2.0, 4.0], [1.0, 2.0])
    assert (alike.interval().low, alike.interval().high) == (2.0, 2.0)
    alone = estimate([2.0]).interval()
    assert alone.to_json()["low"] is None and alone.value == 2.0
    assert estimate([2.0]).p_value() == 1.0
    assert estimate([1.0, math.nan]).interval().to_json()["value"] is None


def test_an_interval_leaves_out_what_cannot_be() -> None:
    found = Interval(0.01, -0.02, 0.04, 0.95, 9, "").within(0.0, math.inf)
    assert (found.value, found.low, found.high) == (0.01, 0.0, 0.04)
    assert math.isnan(Interval(0.01, math.nan, math.nan, 0.95, 1, "").within(0.0, 1.0).low)


def test_differences_add_in_squares() -> None:
    rng = np.random.default_rng(4)
    one, two = (estimate(rng.normal(size=30), stream=name) for name in "ab")
    gap = one.minus(two)
    assert gap.value == pytest.approx(one.value - two.value)
    assert gap.error == pytest.approx(math.hypot(one.error, two.error))
    far = combined([(1.0, one), (0.0, two)])
    assert far.half() == pytest.approx(one.half())


@pytest.mark.parametrize("size", [30, MOST + 1])
def test_parts_are_independent_even_of_one_stream(size: int) -> None:
    """The spread of a sum of ten is √10 times that of one, not ten times."""
    rng = np.random.default_rng(9)
    parts = [estimate(rng.normal(size=size)) for _ in range(10)]
    total = combined([(1.0, part) for part in parts])
    assert total.half() == pytest.approx(1.96 * total.error, rel=0.08)
    assert total.shift_B.std() == pytest.approx(total.error, rel=0.1)


def test_p_value_agrees_with_the_interval() -> None:
    rng = np.random.default_rng(6)
    for shift in np.linspace(0.0, 1.0, 21):
        found = estimate(rng.normal(size=12) + shift)
        assert (found.p_value() <= 0.05) == found.interval().excludes_zero


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("value", "half", "items", "smallest", "says"),
    [
        (0.3, 0.1, 40, 0.15, "worse by 0.3 nats (0.2 to 0.4)"),
        (-0.3, 0.1, 40, 0.15, "better by 0.3 nats (0.2 to 0.4)"),
        (0.001, 0.005, 40, 0.01, "no difference seen: the sample would have shown 0.01 nats"),
        (0.01, 0.05, 40, 0.07, "too small a sample: 40 items can only show a difference of 0.07"),
        (0.3, 0.1, FEWEST - 1, 0.15, f"too small a sample: {FEWEST - 1} items can only show"),
        (0.0, 0.0, 40, 0.0, "no difference: the same on all 40 items"),
        (0.0, 0.0, FEWEST - 1, 0.0, "too small a sample: 5 items cannot show a difference"),
        (0.3, math.nan, 1, math.nan, "too small a sample: 1 item cannot show a difference; more"),
        (math.nan, math.nan, 40, math.nan, "unknown"),
    ],
)
def test_verdicts(value: float, half: float, items: int, smallest: float, says: str) -> None:
    interval = Interval(value, value - half, value + half, 0.95, items, "")
    assert verdict(interval, smallest, 0.02, "nats", advice="more").startswith(says)


def test_one_of_them_is_not_told_in_the_plural() -> None:
    assert counted(1, "windows of one document") == "1 window of one document"
    assert counted(2, "questions") == "2 questions"


def test_smallest_difference_is_shown_four_times_in_five() -> None:
    rng = np.random.default_rng(8)
    smallest = float(np.median([estimate(rng.normal(size=20)).smallest() for _ in range(40)]))
    shown = [estimate(rng.normal(size=20) + smallest).interval().low > 0 for _ in range(400)]
    assert 0.74 < np.mean(shown) < 0.86


@pytest.mark.parametrize("kind", ["documents of one domain", "one domain minus the others"])
def test_intervals_hold_the_truth(kind: str) -> None:
    """A small version of the table in docs/evaluate.md; its limits are three standard errors."""
    rng, draw = np.random.default_rng(11), interval_coverage.MEANS[kind]
    held = interval_coverage.coverage(lambda: draw(rng, 12, 1.0), 500)
    assert 0.93 - 0.01 <= held <= 0.97 + 0.01
