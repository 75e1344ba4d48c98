"""Greedy removal of redundant experts from a matrix of pairwise similarities.

Source: MoEITS (arXiv 2604.10603).  The closest pair of surviving experts is found, and of the two
the one that is on average more similar to all survivors is removed; then again.  The order
depends on the matrix alone.  How far to follow it is a separate question, answered either by a
count of survivors or by a threshold, so that a stricter answer always extends a laxer one.

Axis letters: E experts, S survivors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Removal:
    """One step of the elimination.

    ``expert`` is removed because of ``partner``, which survives the step; both are indices of the
    original matrix.  ``similarity`` is their entry, the largest between any two survivors.
    """

    expert: int
    partner: int
    similarity: float


def closest_pair_order(
    similarity_EE: ArrayLike,
    floor: int = 1,
    groups: int = 1,
    pinned: Collection[int] = (),
    forbidden: Collection[int] = (),
) -> list[Removal]:
    """Return the removals, in order, that leave ``floor`` experts.

    With ``groups`` > 1 (consecutive runs of equal length) ``floor / groups`` remain in each:
    once a group has come down to that, its experts stay; of a pair with one of them the other goes,
    and pairs of two such experts are passed over.  ``pinned`` experts stay by the same rule.
    ``forbidden`` ones are gone before the first step and are no removals.  These rules are ours;
    the source has neither groups nor exceptions.

    Each step takes the largest entry (a, b) with a != b of the matrix of the survivors, the first
    in row-major order among equal ones, so a < b.  With c the row means of that same matrix, a is
    removed if c_a > c_b, else b.  Source: MoEITS (arXiv 2604.10603).

    The diagonal is never a pair, whatever the other entries, and its values are not read.  Row
    means are compared as exactly rounded row sums: every row has the same number of entries, so
    it makes no difference whether a zero diagonal is averaged in (the authors do), and rows with
    the same entries in another order tie, as duplicates of an expert must.

    Shape: ``similarity_EE`` [E, E], symmetric.  The list has max(0, E - floor) entries, less those
    of forbidden experts, and ends before that when all who are left are pinned.

    Raises ValueError if the matrix is not square, symmetric and finite, if floor < 1, or if E or
    floor is not a multiple of ``groups``.
    """
    matrix_EE = _checked(similarity_EE)
    if floor < 1:
        raise ValueError(f"floor must be at least 1, got {floor}")
    if len(matrix_EE) % groups or floor % groups:
        raise ValueError(f"{len(matrix_EE)} experts, {floor} to keep: not multiples of {groups}")
    everyone = np.arange(len(matrix_EE))
    group_E = everyone * groups // max(1, len(matrix_EE))
    pinned_E = np.isin(everyone, list(pinned))
    alive = everyone[~np.isin(everyone, list(forbidden))]
    order: list[Removal] = []
    while len(alive) > floor:
        current_SS = matrix_EE[np.ix_(alive, alive)]
        group_S = group_E[alive]
        stays_S = np.bincount(group_S, minlength=groups)[group_S] <= floor // groups
        stays_S |= pinned_E[alive]
        if stays_S.all():
            break
        a, b = _closest_pair(np.where(stays_S[:, None] & stays_S, -np.inf, current_SS))
        a_is_central = math.fsum(current_SS[a]) > math.fsum(current_SS[b])
        gone, kept = (a, b) if (a_is_central and not stays_S[a]) or stays_S[b] else (b, a)
        order.append(Removal(int(alive[gone]), int(alive[kept]), float(current_SS[a, b])))
        alive = np.delete(alive, gone)
    return order


def threshold(similarity_EE: ArrayLike, tau: float, *, offdiagonal: bool = False) -> float:
    """Return mean + tau * IQR of the similarities, the bar above which a pair is too close.

    IQR = q75 - q25 by linear interpolation.  Source: MoEITS (arXiv 2604.10603).  By default over
    all E^2 entries with a zero diagonal, as the authors do; ``offdiagonal=True`` uses i != j only.
    It is meant to be computed once, on the full matrix.

    Raises ValueError if the matrix is not square, symmetric and finite, if it holds no entry to
    average (E = 0, or E = 1 with ``offdiagonal``), or if tau is not finite.
    """
    matrix_EE = _checked(similarity_EE)
    if not np.isfinite(tau):
        raise ValueError(f"tau must be finite, got {tau}")
    entries = matrix_EE[~np.eye(len(matrix_EE), dtype=bool)] if offdiagonal else matrix_EE.ravel()
    if not entries.size:
        raise ValueError(f"no entries to average for {len(matrix_EE)} experts")
    lower, upper = np.quantile(entries, [0.25, 0.75])
    return float(entries.mean() + tau * (upper - lower))


def removals_above(order: Sequence[Removal], bar: float) -> list[Removal]:
    """Return the removals made while the closest pair is strictly more similar than ``bar``.

    They are a prefix of ``order``: deleting a row and its column never raises the largest entry,
    so similarities along the order do not increase.  Hence a lower bar keeps a subset of what a
    higher bar keeps.  Source: MoEITS (arXiv 2604.10603), its loop condition.

    Raises ValueError if similarities increase along ``order`` (then no elimination made it).
    """
    if any(later.similarity > step.similarity for step, later in pairwise(order)):
        raise ValueError("similarities increase along the order of removal")
    return [step for step in order if step.similarity > bar]


def _checked(similarity_EE: ArrayLike) -> NDArray[np.float64]:
    """A float64 copy with a zero diagonal."""
    matrix_EE = np.array(similarity_EE, dtype=np.float64)
    if matrix_EE.ndim != 2 or matrix_EE.shape[0] != matrix_EE.shape[1]:
        raise ValueError(f"similarities must be [E, E], got shape {matrix_EE.shape}")
    np.fill_diagonal(matrix_EE, 0.0)
    if not np.isfinite(matrix_EE).all():
        raise ValueError("similarities must be finite")
    if not np.array_equal(matrix_EE, matrix_EE.T):
        raise ValueError("similarities must be symmetric")
    return matrix_EE


def _closest_pair(current_SS: NDArray[np.float64]) -> tuple[int, int]:
    """First arg-max in row-major order off the diagonal; by symmetry it lies above it."""
    upper_SS = np.where(np.tri(len(current_SS), dtype=bool), -np.inf, current_SS)
    a, b = np.unravel_index(int(np.argmax(upper_SS)), upper_SS.shape)
    return int(a), int(b)
