"""Greedy elimination: a hand-derived case, and a twin in plain lists."""

from __future__ import annotations

from fractions import Fraction
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprune.core.ops.elimination import Removal, closest_pair_order, removals_above, threshold

Matrix = NDArray[np.float64]

# F1, in sixteenths:        0   1   2   3     sum
#                      0 [  0  14   4   2 ]    20
#                      1 [ 14   0   6  11 ]    31
#                      2 [  4   6   0  12 ]    22
#                      3 [  2  11  12   0 ]    25
# Step 1: the largest entry is 14 at (0, 1); 20 > 31 is false, so 1 goes, for 0.
# Step 2: of {0, 2, 3} the largest is 12 at (2, 3); the rows now sum to 4 + 12 = 16 and
#         2 + 12 = 14, and 16 > 14, so 2 goes, for 3.  (The first sums, 22 and 25, would drop 3.)
# Step 3: of {0, 3} the only entry is 2; both rows sum to 2, a tie, so the higher index 3 goes.
# Threshold over all 16 entries, sorted 0 0 0 0 2 2 4 4 6 6 11 11 12 12 14 14: mean 98 / 16 = 6.125,
#         q25 at position 3.75 = 1.5, q75 at 11.25 = 11.25, so mean + tau * IQR = 6.125 + 9.75 tau.
# Without the diagonal, 12 entries: mean 98 / 12, q25 at 2.75 = 4, q75 at 8.25 = 12.
F1 = np.array([[0, 14, 4, 2], [14, 0, 6, 11], [4, 6, 0, 12], [2, 11, 12, 0]]) / 16
F1_ORDER = [Removal(1, 0, 14 / 16), Removal(2, 3, 12 / 16), Removal(3, 0, 2 / 16)]


def naive_order(matrix: list[list[float]], floor: int) -> list[Removal]:
    alive, order = list(range(len(matrix))), []
    while len(alive) > floor:
        best = None
        for i, a in enumerate(alive):
            for b in alive[i + 1 :]:
                if best is None or matrix[a][b] > matrix[best[0]][best[1]]:
                    best = (a, b)
        assert best is not None
        a, b = best
        means = [sum(Fraction(matrix[x][y]) for y in alive if y != x) for x in (a, b)]
        gone, kept = (a, b) if means[0] > means[1] else (b, a)
        order.append(Removal(gone, kept, matrix[a][b]))
        alive.remove(gone)
    return order


@st.composite
def symmetric(draw: st.DrawFn, least: int = 1) -> Matrix:
    size = draw(st.integers(least, 9))
    coarse = st.integers(-2, 4).map(lambda level: level / 4)
    fine = st.integers(0, 1 << 20).map(lambda level: level / (1 << 20))  # sums stay exact
    element = draw(st.sampled_from([coarse, fine]))
    matrix = np.zeros((size, size))
    for a in range(size):
        for b in range(a + 1, size):
            matrix[a, b] = matrix[b, a] = draw(element)
    return matrix


def test_f1_order_by_hand() -> None:
    assert closest_pair_order(F1) == F1_ORDER
    assert closest_pair_order(F1, floor=2) == F1_ORDER[:2]
    assert closest_pair_order(F1, floor=4) == closest_pair_order(F1, floor=9) == []


@pytest.mark.parametrize(("tau", "removed"), [(-1, 3), (0.25, 2), (0.75, 1), (1, 0)])
def test_f1_thresholds_by_hand(tau: float, removed: int) -> None:
    bar = threshold(F1, tau)
    assert bar == pytest.approx((6.125 + 9.75 * tau) / 16, rel=1e-14)
    assert removals_above(F1_ORDER, bar) == F1_ORDER[:removed]
    assert threshold(F1, tau, offdiagonal=True) == pytest.approx(
        (98 / 12 + 8 * tau) / 16, rel=1e-14
    )


def test_the_threshold_is_strict() -> None:
    assert removals_above(F1_ORDER, 12 / 16) == F1_ORDER[:1]
    assert removals_above(F1_ORDER, np.nextafter(12 / 16, 0)) == F1_ORDER[:2]


@settings(max_examples=150, deadline=None)
@given(symmetric(), st.integers(1, 4))
def test_order_equals_the_naive_one(matrix: Matrix, floor: int) -> None:
    order = closest_pair_order(matrix, floor)
    assert order == naive_order(matrix.tolist(), floor)
    assert len(order) == max(0, len(matrix) - floor)
    assert len({step.expert for step in order}) == len(order)
    assert all(step.expert != step.partner for step in order)


@settings(max_examples=100, deadline=None)
@given(symmetric(least=2), st.floats(-3, 5), st.floats(-3, 5), st.booleans())
def test_smaller_tau_keeps_a_subset(matrix: Matrix, one: float, two: float, off: bool) -> None:
    order = closest_pair_order(matrix)
    similarities = [step.similarity for step in order]
    assert similarities == sorted(similarities, reverse=True)
    lax, strict = (
        removals_above(order, threshold(matrix, tau, offdiagonal=off))
        for tau in (max(one, two), min(one, two))
    )
    assert strict[: len(lax)] == lax


@settings(max_examples=60, deadline=None)
@given(symmetric(), st.floats(-2, 4))
def test_threshold_and_prefix_equal_the_loop_that_checks_every_step(
    matrix: Matrix, tau: float
) -> None:
    bar = threshold(matrix, tau)
    ordered = sorted(matrix.ravel().tolist())

    def quantile(part: float) -> float:
        rank = part * (len(ordered) - 1)
        low = int(rank)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (rank - low) * (ordered[high] - ordered[low])

    assert bar == pytest.approx(fmean(ordered) + tau * (quantile(0.75) - quantile(0.25)), abs=1e-12)
    alive, removed = list(range(len(matrix))), []
    for step in naive_order(matrix.tolist(), 1):
        current = matrix[np.ix_(alive, alive)]
        if not current[~np.eye(len(alive), dtype=bool)].max() > bar:
            break
        removed.append(step)
        alive.remove(step.expert)
    assert removals_above(closest_pair_order(matrix), bar) == removed


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 2**32 - 1))
def test_relabelling_experts_relabels_the_order(labels: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).permutation(21) + 1.0  # distinct powers: no ties at all
    matrix = np.zeros((7, 7))
    matrix[np.triu_indices(7, 1)] = 2.0**-values
    matrix += matrix.T
    relabelled = matrix[np.ix_(labels, labels)]
    original = closest_pair_order(matrix, floor=2)
    for step, other in zip(original, closest_pair_order(relabelled, floor=2), strict=True):
        assert {labels[other.expert], labels[other.partner]} == {step.expert, step.partner}
        assert labels[other.expert] == step.expert


def test_one_of_each_duplicated_pair_goes_first() -> None:
    rng = np.random.default_rng(0)
    small = rng.random((4, 4)) * 0.3
    small = small + small.T
    twice = np.kron(small, np.ones((2, 2)))
    for e in range(0, 8, 2):
        twice[e, e + 1] = twice[e + 1, e] = 1.0
    order = closest_pair_order(twice)
    assert [(s.partner, s.expert) for s in order[:4]] == [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_without_positive_entries_the_diagonal_is_still_no_pair(value: float) -> None:
    order = closest_pair_order(np.full((3, 3), value))
    assert order == [Removal(1, 0, value), Removal(2, 0, value)]


def test_the_diagonal_is_not_read_and_the_input_not_changed() -> None:
    ones = F1 + np.eye(4)
    assert closest_pair_order(ones) == F1_ORDER
    assert threshold(ones, 1.25) == threshold(F1, 1.25)
    assert np.array_equal(np.diag(ones), np.ones(4))


def test_nothing_to_remove() -> None:
    assert closest_pair_order(np.zeros((1, 1))) == closest_pair_order(np.zeros((0, 0))) == []
    assert removals_above([], 0.0) == []


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((2, 3)), "E, E"),
        (np.zeros(4), "E, E"),
        (np.array([[0, 1], [2, 0]]), "symmetric"),
        (np.array([[0, np.nan], [np.nan, 0]]), "finite"),
    ],
)
def test_malformed_matrices_are_refused(matrix: Matrix, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        closest_pair_order(matrix)
    with pytest.raises(ValueError, match=message):
        threshold(matrix, 1.0)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="floor"):
        closest_pair_order(F1, floor=0)
    with pytest.raises(ValueError, match="tau"):
        threshold(F1, np.nan)
    with pytest.raises(ValueError, match="no entries"):
        threshold(np.zeros((1, 1)), 1.0, offdiagonal=True)
    with pytest.raises(ValueError, match="increase"):
        removals_above(F1_ORDER[::-1], 0.0)
