"""Clusters of similar experts, grown pair by pair under a threshold (STUN, arXiv 2409.06211)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Distances = NDArray[np.float64]


def agglomerate(distance_EE: Distances, threshold: float, most: int) -> list[list[int]]:
    """Clusters of ids, each ascending, in order of their first ids.

    Pairs are taken by increasing distance, ties by ids, while the distance is at most
    ``threshold``. The clusters of i and j unite if every member of j's is within the threshold of i
    and every member of i's within the threshold of j; otherwise the pair is passed over. It stops
    when ``most`` unions are made, so that E - most clusters are left. Pairs at an infinite distance
    never unite, not even through others.
    """
    E = len(distance_EE)
    cluster = [[e] for e in range(E)]
    rows, columns = np.triu_indices(E, 1)
    values = distance_EE[rows, columns]
    near = np.flatnonzero(values <= threshold)
    unions = 0
    for pair in near[np.lexsort((columns[near], rows[near], values[near]))]:
        if unions == most:
            break
        i, j = int(rows[pair]), int(columns[pair])
        one, other = cluster[i], cluster[j]
        if one is other:
            continue
        apart = np.isinf(distance_EE[np.ix_(one, other)]).any()
        if apart or max(distance_EE[i, other].max(), distance_EE[j, one].max()) > threshold:
            continue
        united = sorted(one + other)
        for member in united:
            cluster[member] = united
        unions += 1
    return [cluster[e] for e in range(E) if cluster[e][0] == e]


def unions_at(distance_EE: Distances, threshold: float, most: int) -> int:
    """How many experts are saved at a threshold: E minus the number of clusters."""
    return len(distance_EE) - len(agglomerate(distance_EE, threshold, most))


def clusters_of(distance_EE: Distances, remove: int) -> list[list[int]] | None:
    """Clusters at the least threshold, found by bisection, that unites ``remove`` times.

    None if no threshold does, because too many pairs are at an infinite distance.
    """
    E = len(distance_EE)
    if not remove:
        return [[e] for e in range(E)]
    values = _thresholds([distance_EE])
    if not len(values) or unions_at(distance_EE, values[-1], remove) < remove:
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if unions_at(distance_EE, values[middle], remove) >= remove:
            high = middle
        else:
            low = middle + 1
    return agglomerate(distance_EE, values[high], remove)


def shared_removals(layers: list[Distances], most: list[int], remove: int) -> list[int] | None:
    """How many experts each layer saves if one threshold, found by bisection, decides for all.

    The least threshold at which ``remove`` are saved in all; layers that save more than there is
    left to save stop early, the last ones first. None if ``most`` of each layer are too few.
    """
    values = _thresholds(layers)

    def saved(threshold: float) -> list[int]:
        pairs = zip(layers, most, strict=True)
        return [unions_at(distance_EE, threshold, limit) for distance_EE, limit in pairs]

    if not remove:
        return [0] * len(layers)
    if not len(values) or sum(saved(values[-1])) < remove:
        return None
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(saved(values[middle])) >= remove:
            high = middle
        else:
            low = middle + 1
    counts = saved(values[high])
    for index in reversed(range(len(counts))):
        before = unions_at(layers[index], values[high - 1], most[index]) if high else 0
        surplus = sum(counts) - remove
        counts[index] -= max(0, min(surplus, counts[index] - before))
    for index in reversed(range(len(counts))):
        counts[index] -= min(sum(counts) - remove, counts[index])
    return counts


def _thresholds(layers: list[Distances]) -> Distances:
    """All finite distances between two experts of a layer, ascending."""
    pairs = [d[np.triu_indices(len(d), 1)] for d in layers]
    values = np.unique(np.concatenate(pairs)) if pairs else np.empty(0)
    return values[np.isfinite(values)]
