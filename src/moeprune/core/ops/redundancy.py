"""How alike the experts of a layer are: their weights against chance, and their outputs.

Axes: E experts, H width of the block, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moeprune.core.ops.cosine import gram_cosines, output_cosines
from moeprune.core.ops.nmi import noise_floor, pairwise_nmi

_SHUFFLED = 8
"""Pairs of matrices, one of them shuffled, whose NMI is what chance gives."""

SLACK = 1.1
"""The NMI of unrelated matrices varies by a few percent from pair to pair."""


@dataclass(frozen=True)
class WeightRedundancy:
    """Normalised mutual information (NMI) of index-aligned weights, mean over the matrices.

    Attributes:
        experts: how many were compared, each with each.
        median, largest: over pairs.
        closest: the pair with the largest.
        floor: the largest NMI of pairs of which one matrix was shuffled: unrelated by construction.
        above: the share of pairs above the floor by more than a tenth.
    """

    experts: int
    median: float
    largest: float
    closest: tuple[int, int]
    floor: float
    above: float


def weight_redundancy(
    matrix: Callable[[int, str], Tensor], experts: Sequence[int], roles: Sequence[str], seed: int
) -> WeightRedundancy | None:
    """NMI of every pair of ``experts`` (arXiv 2604.10603) against the NMI of unrelated weights.

    NMI sees only entries at the same place: two experts that compute the same with their neurons in
    another order count as unrelated.

    Args:
        matrix: reads one matrix of an expert.
        experts: which to compare.
        roles: the matrices, which count alike.
        seed: of the shuffles.

    Returns:
        None with fewer than two experts, or where weights are not finite.
    """
    if len(experts) < 2:
        return None
    count = len(experts)
    total_EE, floors = np.zeros((count, count)), np.zeros(min(_SHUFFLED, count - 1))
    try:
        for role in roles:
            total_EE += pairwise_nmi(matrix(e, role).numpy() for e in experts) / len(roles)
            for i in range(len(floors)):
                a, b = (matrix(e, role).numpy() for e in (experts[i], experts[i + 1]))
                floors[i] += noise_floor(a.ravel(), b.ravel(), seed + i) / len(roles)
    except ValueError:
        return None
    rows, columns = np.triu_indices(count, 1)
    pairs, floor = total_EE[rows, columns], float(floors.max())
    best = int(pairs.argmax())
    return WeightRedundancy(
        count,
        float(np.median(pairs)),
        float(pairs.max()),
        (int(experts[rows[best]]), int(experts[columns[best]])),
        floor,
        float((pairs > SLACK * floor).mean()),
    )


@dataclass(frozen=True)
class OutputSimilarity:
    """Cosines of the outputs of pairs of experts.

    Attributes:
        mean_median, mean_largest: of the experts' mean outputs, each over its own tokens.
        token_median, token_largest: on the same sampled tokens, mean over them; None without any.
    """

    mean_median: float
    mean_largest: float
    token_median: float | None = None
    token_largest: float | None = None


def output_similarity(
    mean_EH: Tensor, outputs: Callable[[int, Tensor], Tensor] | None, x_SH: Tensor | None
) -> OutputSimilarity | None:
    """How alike the outputs of a layer's experts are; None with fewer than two that saw tokens.

    Args:
        mean_EH: mean outputs; rows of zeros are experts that saw no token, and are left out.
        outputs: an expert's output [S, H] for inputs [S, H].
        x_SH: inputs of the block.
    """
    usable_EH = mean_EH[mean_EH.isfinite().all(dim=1) & mean_EH.any(dim=1)]
    if len(usable_EH) < 2:
        return None
    means = _pairs(gram_cosines(usable_EH @ usable_EH.T))
    if outputs is None or x_SH is None or not len(x_SH):
        return OutputSimilarity(float(means.median()), float(means.max()))
    tokens = _pairs(output_cosines(outputs, len(mean_EH), x_SH))
    found = (means.median(), means.max(), tokens.median(), tokens.max())
    return OutputSimilarity(*map(float, found)) if bool(tokens.isfinite().all()) else None


def _pairs(cosine_EE: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(len(cosine_EE), len(cosine_EE), 1)
    return cosine_EE[rows, columns]
