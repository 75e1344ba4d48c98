"""Clusters of experts against the words of the source, in plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeprune.core.ops.clusters import Distances, agglomerate, clusters_of, shared_removals
from moeprune.core.ops.ranks import shared_ranks


def distances(experts: int, seed: int) -> Distances:
    points = np.random.default_rng(seed).normal(size=(experts, 3))
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=2))


def slow(distance: Distances, threshold: float, most: int) -> list[list[int]]:
    """Repeatedly the closest pair that is neither united nor forbidden."""
    clusters = [{e} for e in range(len(distance))]
    forbidden: set[tuple[int, int]] = set()
    while len(distance) - len(clusters) < most:
        best = None
        for i in range(len(distance)):
            for j in range(i + 1, len(distance)):
                together = any({i, j} <= cluster for cluster in clusters)
                if together or (i, j) in forbidden or distance[i, j] > threshold:
                    continue
                if best is None or distance[i, j] < distance[best]:
                    best = (i, j)
        if best is None:
            break
        one, other = (set(next(x for x in clusters if v in x)) for v in best)
        near = all(distance[best[0], m] <= threshold for m in other)
        near = near and all(distance[best[1], m] <= threshold for m in one)
        if near:
            clusters = [c for c in clusters if c not in (one, other)] + [one | other]
        else:
            forbidden.add(best)
    return sorted(sorted(cluster) for cluster in clusters)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.integers(1, 9), st.floats(0.0, 4.0), st.integers(0, 9))
def test_clusters_grow_as_the_source_says(
    seed: int, experts: int, threshold: float, most: int
) -> None:
    distance = distances(experts, seed)
    assert agglomerate(distance, threshold, most) == slow(distance, threshold, most)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.integers(1, 10), st.data())
def test_the_number_is_exact(seed: int, experts: int, data: st.DataObject) -> None:
    remove = data.draw(st.integers(0, experts - 1))
    clusters = clusters_of(distances(experts, seed), remove)
    assert clusters is not None
    assert len(clusters) == experts - remove
    assert sorted(e for cluster in clusters for e in cluster) == list(range(experts))


def test_no_smaller_threshold_gives_the_number() -> None:
    distance = distances(9, 3)
    clusters = clusters_of(distance, 4)
    assert clusters is not None
    values = sorted(set(distance[np.triu_indices(9, 1)]))
    first = next(v for v in values if len(agglomerate(distance, v, 4)) == 5)
    assert clusters == agglomerate(distance, first, 4)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.integers(0, 500), st.integers(0, 7))
def test_other_names_give_the_same_clusters(order: list[int], seed: int, remove: int) -> None:
    distance = distances(8, seed)
    plain = clusters_of(distance, remove)
    renamed = clusters_of(distance[np.ix_(order, order)], remove)
    assert plain is not None and renamed is not None
    assert sorted(sorted(order[i] for i in c) for c in renamed) == sorted(plain)


def test_ties_break_by_ids() -> None:
    assert clusters_of(np.ones((4, 4)), 1) == [[0, 1], [2], [3]]


def test_pairs_that_must_stay_apart_do() -> None:
    distance = distances(6, 1)
    distance[0, 1] = distance[1, 0] = math.inf
    clusters = clusters_of(distance, 4)
    assert clusters is not None
    assert not any({0, 1} <= set(cluster) for cluster in clusters)
    assert clusters_of(distance, 5) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 500), st.data())
def test_one_threshold_for_all_layers_saves_the_exact_number(
    seed: int, data: st.DataObject
) -> None:
    layers = [distances(7, seed), 2 * distances(7, seed + 1), distances(7, seed + 2)]
    most = [5, 4, 5]
    remove = data.draw(st.integers(0, 14))
    counts = shared_removals(layers, most, remove)
    assert counts is not None and sum(counts) == remove
    assert all(0 <= count <= limit for count, limit in zip(counts, most, strict=True))
    assert shared_removals(layers, most, 15) is None


def test_closer_layers_save_more() -> None:
    counts = shared_removals([distances(8, 1), 100 * distances(8, 1)], [7, 7], 6)
    assert counts == [6, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0, 0.99),
)
def test_ranks_stay_in_their_bounds_and_budget(
    importance: list[float], outputs: int, inputs: int, ratio: float
) -> None:
    ranks = shared_ranks(importance, outputs, inputs, ratio)
    assert len(ranks) == len(importance)
    assert all(1 <= rank <= min(outputs, inputs) for rank in ranks)
    room = (1 - ratio) * outputs * inputs * len(ranks)
    assert sum(ranks) * (outputs + inputs) <= room + 1e-6 or sum(ranks) == len(ranks)
    by_importance = sorted(zip(importance, ranks, strict=True), key=lambda pair: (pair[0], pair[1]))
    assert [rank for _, rank in by_importance] == sorted(ranks)


@pytest.mark.parametrize("importance", [[0.0, 0.0], [math.nan, math.inf]])
def test_ranks_without_importance_are_equal(importance: list[float]) -> None:
    ranks = shared_ranks(importance, 8, 8, 0.5)
    assert ranks == [2, 2]
