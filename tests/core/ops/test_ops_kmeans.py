"""Weighted spherical k-means and the recombination of neurons against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.core.ops.kmeans import spherical_kmeans
from moeprune.core.ops.segments import (
    Segments,
    equalised_factors,
    nearest_owner,
    unit_segments,
)


def slow_kmeans(points: np.ndarray, weights: np.ndarray, count: int, iterations: int) -> list[int]:
    centres = [points[i] for i in range(count)]
    chosen: list[int] = []
    for _ in range(iterations):
        cosine = [[float(p @ c) for c in centres] for p in points]
        nearest = [row.index(max(row)) for row in cosine]
        best = [max(row) for row in cosine]
        waiting = sorted(range(len(points)), key=lambda p: (best[p], p))
        for cluster in [c for c in range(count) if c not in nearest]:
            point = next(p for p in waiting if nearest.count(nearest[p]) > 1)
            waiting.remove(point)
            nearest[point] = cluster
        if nearest == chosen:
            break
        chosen = nearest
        for c in range(count):
            total = sum(
                (w * p for p, w, n in zip(points, weights, chosen, strict=True) if n == c),
                np.zeros(points.shape[1]),
            )
            centres[c] = total / max(float(np.linalg.norm(total)), 1e-30)
    return chosen


def units(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 14), st.data(), st.integers(0, 9999), st.integers(1, 6))
def test_against_loops(points: int, data: st.DataObject, seed: int, iterations: int) -> None:
    count = data.draw(st.integers(1, points))
    rows, weights = units(points, 4, seed), torch.rand(points, dtype=torch.float64) + 0.1
    found = spherical_kmeans(rows, weights, count, iterations).tolist()
    assert found == slow_kmeans(rows.numpy(), weights.numpy(), count, iterations)
    assert sorted(set(found)) == list(range(count))


def test_centres_that_coincide_each_keep_a_point() -> None:
    rows = units(1, 4, 0).repeat(6, 1)
    found = spherical_kmeans(rows, torch.ones(6), 4).tolist()
    assert sorted(set(found)) == [0, 1, 2, 3]


def test_copies_join_their_original() -> None:
    rows = units(8, 6, 1)
    again = torch.cat((rows, rows[[3, 3, 5]]))
    assert spherical_kmeans(again, torch.ones(11), 8).tolist() == [*range(8), 3, 3, 5]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="cannot make 4 clusters"):
        spherical_kmeans(units(3, 2, 0), torch.ones(3), 4)
    with pytest.raises(ValueError, match="positive"):
        spherical_kmeans(units(3, 2, 0), torch.zeros(3), 2)


def test_segments_have_parts_of_equal_length() -> None:
    matrices = [torch.randn(5, 4) * scale for scale in (1.0, 10.0, 0.1)]
    matrices[1][2] = 0.0
    segments = unit_segments(matrices)
    assert segments.unit_NF.shape == (5, 12) and segments.length_NR.shape == (5, 3)
    for n in range(5):
        for r in range(3):
            part = segments.unit_NF[n, 4 * r : 4 * r + 4].double()
            length = float(matrices[r][n].double().norm())
            assert float(segments.length_NR[n, r]) == pytest.approx(length)
            expected = 0.0 if length == 0 else 1 / math.sqrt(3)
            assert float(part.norm()) == pytest.approx(expected, rel=1e-5)


def test_the_nearest_owner_against_loops() -> None:
    rows, owners = units(30, 5, 1), [(e, units(7, 5, 10 + e)) for e in (2, 4, 9)]
    for threshold in (-1.0, 0.5, 0.8):
        found = nearest_owner(rows, owners, threshold).tolist()
        for row, owner in zip(rows, found, strict=True):
            best = {e: max(float(row @ other) for other in own) for e, own in owners}
            e = max(best, key=lambda e: best[e])
            assert owner == (e if best[e] >= threshold else -1)
    same = [(3, rows[:4]), (1, rows[:4])]
    assert nearest_owner(rows[:4], same, 0.0).tolist() == [3] * 4  # of equals the first


def test_recombined_neurons_have_the_mean_direction_and_length() -> None:
    generator = torch.Generator().manual_seed(4)
    matrices = [torch.randn(7, 4, generator=generator) for _ in range(3)]
    segments = unit_segments(matrices)
    weight_N = torch.rand(7, generator=generator, dtype=torch.float64) + 0.1
    cluster_N = torch.tensor([0, 1, 2, 0, 0, 2, 3])
    factor = equalised_factors(segments, weight_N, cluster_N, 4)
    for c in range(4):
        members = torch.nonzero(cluster_N == c).reshape(-1).tolist()
        total = sum(float(weight_N[n]) for n in members)
        for r, matrix in enumerate(matrices):
            rows = matrix.double()
            made = sum((factor[n, r] * rows[n] for n in members), torch.zeros(4).double())
            mean = sum(float(weight_N[n] * rows[n].norm()) for n in members) / total
            way = sum((weight_N[n] * rows[n] / rows[n].norm() for n in members), torch.zeros(4))
            torch.testing.assert_close(made, mean * way / way.norm(), rtol=1e-5, atol=1e-6)
    assert factor[cluster_N == 1].tolist() == [[1.0, 1.0, 1.0]]  # alone: unchanged


def test_parts_that_cancel_or_are_empty_become_zero() -> None:
    row = torch.tensor([[1.0, 0.0]])
    segments = Segments(
        torch.cat((torch.cat((row, row), 1), torch.cat((-row, row * 0), 1))) / math.sqrt(2),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]).double(),
    )
    factor = equalised_factors(segments, torch.ones(2), torch.tensor([0, 0]), 1)
    assert factor[:, 0].tolist() == [0.0, 0.0]
    assert factor[:, 1].tolist() == pytest.approx([0.5, 0.0])  # half of the length 1 + 0
