"""Clustering against a reference that measures every pair of clusters anew."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import squareform

from moeprune.core.ops.linkage import Linkage, clusters

LINKAGES: list[Linkage] = ["average", "single", "complete"]
JOIN = {"average": np.mean, "single": np.min, "complete": np.max}


def slow(
    distance: np.ndarray, count: int, linkage: str, apart: tuple[int, ...] = ()
) -> list[list[int]]:
    found = [[i] for i in range(len(distance))]
    while len(found) > count:
        pairs = [
            (float(JOIN[linkage]([distance[i, j] for i in a for j in b])), a, b)
            for a, b in combinations(found, 2)
            if not (set(a) & set(apart) and set(b) & set(apart))
        ]
        _, a, b = min(pairs, key=lambda pair: (pair[0], pair[1][0], pair[2][0]))
        found = sorted([c for c in found if c not in (a, b)] + [sorted(a + b)])
    return found


def random_distances(size: int, seed: int, whole: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 4, (size, size)) if whole else rng.random((size, size))
    return np.triu(matrix, 1) + np.triu(matrix, 1).T.astype(float)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.data(), st.integers(0, 9999), st.sampled_from(LINKAGES))
def test_against_the_reference(size: int, data: st.DataObject, seed: int, linkage: Linkage) -> None:
    count = data.draw(st.integers(1, size))
    apart = tuple(data.draw(st.sets(st.integers(0, size - 1), max_size=count)))
    distance = random_distances(size, seed)
    assert clusters(distance, count, linkage, apart) == slow(distance, count, linkage, apart)


@pytest.mark.parametrize("linkage", ["single", "complete"])
def test_ties_break_by_index(linkage: Linkage) -> None:
    for seed in range(40):
        distance = random_distances(7, seed, whole=True)
        for count in range(1, 8):
            assert clusters(distance, count, linkage) == slow(distance, count, linkage)
    assert clusters(np.ones((5, 5)), 3) == [[0, 1, 2], [3], [4]]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_same_clusters_as_scipy(linkage: Linkage) -> None:
    distance = random_distances(30, 3)
    tree = scipy_linkage(squareform(distance), linkage)
    for count in (1, 4, 11, 30):
        labels = fcluster(tree, count, "maxclust")
        expected = sorted(sorted(np.flatnonzero(labels == one).tolist()) for one in set(labels))
        assert clusters(distance, count, linkage) == expected


def test_what_is_not_a_number_is_united_last() -> None:
    distance = random_distances(5, 0)
    distance[2] = distance[:, 2] = np.nan
    assert [2] in clusters(distance, 2)
    assert clusters(distance, 1) == [[0, 1, 2, 3, 4]]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="cannot make 0 clusters"):
        clusters(np.zeros((3, 3)), 0)
    with pytest.raises(ValueError, match="cannot make 1 clusters"):
        clusters(np.zeros((3, 3)), 1, apart=[0, 1])
    with pytest.raises(ValueError, match="symmetric"):
        clusters(np.triu(np.ones((3, 3)), 1), 1)
    with pytest.raises(ValueError, match="must be"):
        clusters(np.ones(3), 1)
