"""Agglomerative clustering of a few hundred things, with ties that break by index.

Axes: N things.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Linkage = Literal["average", "single", "complete"]

_FAR = np.finfo(np.float64).max


def clusters(
    distance_NN: ArrayLike,
    count: int,
    linkage: Linkage = "average",
    apart: Collection[int] = (),
) -> list[list[int]]:
    """Unite the two closest clusters again and again until ``count`` are left.

    The distance of two clusters is the mean (``average``), the smallest (``single``) or the largest
    (``complete``) distance of their members, kept up to date by the Lance-Williams formula. A
    cluster stands at the index of its first member; of equally close pairs the first in the order
    of these indices is united. A distance that is not a number counts as infinite.

    Args:
        distance_NN: symmetric; the diagonal is not read.
        count: clusters to leave, 1..N.
        linkage: distance of clusters.
        apart: things of which no two may be in one cluster; at most ``count``.

    Returns:
        Clusters in the order of their first members, each ascending.

    Raises:
        ValueError: the matrix is not square and symmetric, or ``count`` is out of range.
    """
    current_NN = _checked(distance_NN)
    size = len(current_NN)
    if not max(1, len(set(apart))) <= count <= size:
        raise ValueError(f"{size} things, {len(set(apart))} apart, cannot make {count} clusters")
    members = {i: [i] for i in range(size)}
    alone_N = np.isin(np.arange(size), list(apart))
    allowed_NN = np.triu(np.ones((size, size), dtype=bool), 1) & ~(alone_N[:, None] & alone_N)
    while len(members) > count:
        # clusters that are infinitely far may be united in the end, those that are apart never
        candidates_NN = np.where(allowed_NN, np.minimum(current_NN, _FAR), np.inf)
        a, b = np.unravel_index(int(np.argmin(candidates_NN)), current_NN.shape)
        first, second = int(a), int(b)
        united_N = _united(
            current_NN[first],
            current_NN[second],
            len(members[first]),
            len(members[second]),
            linkage,
        )
        current_NN[first], current_NN[:, first] = united_N, united_N
        members[first] = sorted(members[first] + members.pop(second))
        allowed_NN[second], allowed_NN[:, second] = False, False
        if alone_N[second] and not alone_N[first]:
            alone_N[first] = True
            allowed_NN[first] &= ~alone_N
            allowed_NN[:, first] &= ~alone_N
    return [members[i] for i in sorted(members)]


def _united(
    a_N: NDArray[np.float64], b_N: NDArray[np.float64], size_a: int, size_b: int, linkage: Linkage
) -> NDArray[np.float64]:
    if linkage == "single":
        return np.minimum(a_N, b_N)
    if linkage == "complete":
        return np.maximum(a_N, b_N)
    return (size_a * a_N + size_b * b_N) / (size_a + size_b)


def _checked(distance_NN: ArrayLike) -> NDArray[np.float64]:
    matrix_NN = np.array(distance_NN, dtype=np.float64)
    if matrix_NN.ndim != 2 or matrix_NN.shape[0] != matrix_NN.shape[1]:
        raise ValueError(f"distances must be [N, N], got shape {matrix_NN.shape}")
    matrix_NN[np.isnan(matrix_NN)] = np.inf
    if not np.array_equal(matrix_NN, matrix_NN.T):
        raise ValueError("distances must be symmetric")
    return matrix_NN
