"""Weighted spherical k-means on the rows of a matrix.

Axes: P points, C clusters, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROWS = 1024  # points whose cosines with all centres are in memory at once


def spherical_kmeans(
    points_PF: Tensor, weight_P: Tensor, count: int, iterations: int = 10
) -> Tensor:
    """Cluster directions so that the weighted sum of cosines to the cluster's centre is large.

    The first ``count`` points are the first centres, so nothing is random. In each of the
    iterations a point goes to the centre with the largest cosine (of equals the first), and a
    centre becomes the direction of the weighted sum of its points. A centre without points takes
    the point that is farthest from its own centre and not alone there (of equals the first). It
    stops early when no point moves.

    Args:
        points_PF: unit rows.
        weight_P: positive weights.
        count: C, at most P.
        iterations: at most this many.

    Returns:
        int64 [P]: the cluster of every point; none of them is empty.

    Raises:
        ValueError: fewer points than clusters, or a weight that is not positive.
    """
    if not 0 < count <= len(points_PF):
        raise ValueError(f"{len(points_PF)} points cannot make {count} clusters")
    if not bool((weight_P > 0).all()):
        raise ValueError("weights must be positive")
    weight_P = weight_P.to(points_PF)
    centres_CF = points_PF[:count].clone()
    chosen_P = torch.full((len(points_PF),), -1)
    for _ in range(iterations):
        cosine_P, nearest_P = _nearest(points_PF, centres_CF)
        _fill_empty(nearest_P, cosine_P, count)
        if torch.equal(nearest_P, chosen_P):
            break
        chosen_P = nearest_P
        centres_CF = torch.zeros_like(centres_CF)
        centres_CF.index_add_(0, chosen_P, points_PF * weight_P[:, None])
        centres_CF = torch.nn.functional.normalize(centres_CF, dim=1, eps=1e-30)
    return chosen_P


def _nearest(points_PF: Tensor, centres_CF: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each point, and the first centre that has it."""
    values, indices = [], []
    for start in range(0, len(points_PF), _ROWS):
        cosine_RC = points_PF[start : start + _ROWS] @ centres_CF.T
        first_R = torch.from_numpy(np.argmax(cosine_RC.numpy(), axis=1))  # torch names no order
        values.append(cosine_RC.gather(1, first_R[:, None])[:, 0])
        indices.append(first_R)
    return torch.cat(values), torch.cat(indices)


def _fill_empty(nearest_P: Tensor, cosine_P: Tensor, count: int) -> None:
    size_C = torch.bincount(nearest_P, minlength=count)
    empty = torch.nonzero(size_C == 0).reshape(-1).tolist()
    if not empty:
        return
    order = torch.argsort(cosine_P, stable=True).tolist()
    for cluster in empty:
        point = next(p for p in order if size_C[nearest_P[p]] > 1)
        size_C[nearest_P[point]] -= 1
        size_C[cluster] += 1
        nearest_P[point] = cluster
        order.remove(point)
