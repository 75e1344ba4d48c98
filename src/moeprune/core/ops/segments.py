"""Neurons as directions: what DERN (arXiv 2509.10377) compares, hands on and recombines.

A segment is a neuron's gate row, up row and down column side by side, each scaled to length
1 / sqrt(R), so that the segment has length 1 and its parts count alike whatever their lengths.
Axes: N neurons, R matrices (roles) of an expert, F = R * H features of a segment, C new neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ROWS = 4096


@dataclass(frozen=True)
class Segments:
    """Neurons as unit vectors, with the lengths that their parts had.

    Attributes:
        unit_NF: float32.
        length_NR: float64.
    """

    unit_NF: Tensor
    length_NR: Tensor

    def only(self, neurons: Tensor) -> Segments:
        """Some of the neurons."""
        return Segments(self.unit_NF[neurons], self.length_NR[neurons])

    @classmethod
    def cat(cls, parts: Sequence[Segments]) -> Segments:
        """One after another."""
        return cls(torch.cat([p.unit_NF for p in parts]), torch.cat([p.length_NR for p in parts]))


def unit_segments(matrices: Sequence[Tensor]) -> Segments:
    """An expert's neurons from its R matrices with one row per neuron; a zero part stays zero."""
    length_NR = torch.stack([m.double().norm(dim=1) for m in matrices], dim=1)
    scale = len(matrices) ** -0.5
    unit = [
        m.float() * (scale / n_N.clamp(min=1e-30)).float()[:, None]
        for m, n_N in zip(matrices, length_NR.T, strict=True)
    ]
    return Segments(torch.cat(unit, dim=1), length_NR)


def nearest_owner(
    segments_NF: Tensor, owners: Iterable[tuple[int, Tensor]], threshold: float
) -> Tensor:
    """Who owns the segment with the largest cosine to each of ``segments_NF``.

    Args:
        segments_NF: unit rows.
        owners: (id, unit rows of that owner); of equal cosines the first owner has it.
        threshold: a segment whose largest cosine is lower belongs to nobody.

    Returns:
        int64 [N]; -1 for nobody.
    """
    best_N = segments_NF.new_full((len(segments_NF),), -torch.inf)
    owner_N = torch.full((len(segments_NF),), -1)
    for owner, rows_IF in owners:
        for start in range(0, len(segments_NF), _ROWS):
            at = slice(start, start + _ROWS)
            cosine = (segments_NF[at] @ rows_IF.T).amax(dim=1)
            closer = cosine > best_N[at]
            best_N[at] = torch.where(closer, cosine, best_N[at])
            owner_N[at] = torch.where(closer, owner, owner_N[at])
    owner_N[best_N < threshold] = -1
    return owner_N


def equalised_factors(
    segments: Segments, weight_N: Tensor, cluster_N: Tensor, count: int
) -> Tensor:
    """What multiplies every neuron's parts, so that the sum over a cluster is its new neuron.

    Part r of new neuron c has the direction of ``sum w_n p_nr / |p_nr|`` over its members n, and
    the length ``sum w_n |p_nr| / sum w_n``. A cluster of one gives that neuron unchanged.

    Args:
        segments: the neurons.
        weight_N: positive weights.
        cluster_N: the new neuron of each, 0..count-1.
        count: C.

    Returns:
        float64 [N, R]; 0 for parts without length and for sums that cancel.
    """
    N, R = segments.length_NR.shape
    weight_N = weight_N.double()
    total_C = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster_N, weight_N)
    factor_NR = torch.zeros(N, R, dtype=torch.float64)
    width = segments.unit_NF.shape[1] // R
    for r in range(R):
        length_N = segments.length_NR[:, r]
        unit_NH = segments.unit_NF[:, r * width : (r + 1) * width] * np.sqrt(R)
        sum_CH = torch.zeros(count, width)
        sum_CH.index_add_(0, cluster_N, unit_NH * weight_N.float()[:, None])
        sum_C = sum_CH.double().norm(dim=1)
        mean_C = torch.zeros_like(total_C).index_add_(0, cluster_N, weight_N * length_N) / total_C
        scale_C = torch.where(sum_C > 1e-6 * total_C, mean_C / sum_C.clamp(min=1e-300), 0.0)
        factor_N = weight_N / length_N.clamp(min=1e-300) * scale_C[cluster_N]
        factor_NR[:, r] = torch.where(length_N > 0, factor_N, 0.0)
    alone_N = torch.bincount(cluster_N, minlength=count)[cluster_N] == 1
    factor_NR[alone_N] = 1.0
    return factor_NR
