"""Scores of an expert's neurons, and which of them stay.

A neuron is a row of the gate matrix, the same row of the up matrix and the same column of the down
matrix. Axes: E experts, H width of the block, I neurons, J those that stay. Higher scores stay;
equal ones by the lower index, and a score that is not a number is the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeprune.errors import BudgetError


def magnitude(matrices: Mapping[str, Tensor]) -> Tensor:
    """``|g_j| |u_j| |d_j|``, float64 [I]; without a gate matrix ``|u_j| |d_j|``.

    What a neuron adds to the output is bounded by it for inputs and activations of fixed size, and
    it stays the same if one of the factors is scaled and another by the inverse.
    """
    score_I: Tensor = matrices["down"].double().norm(dim=0)
    for role in ("gate", "up"):
        if role in matrices:
            score_I = score_I * matrices[role].double().norm(dim=1)
    return score_I


def survivors(matrices: Mapping[str, Tensor]) -> Tensor:
    """Weights of each neuron that are not zero, over all matrices, float64 [I]."""
    count_I = torch.zeros(matrices["down"].shape[1], dtype=torch.float64)
    for role, matrix in matrices.items():
        count_I += (matrix != 0).sum(dim=0 if role == "down" else 1)
    return count_I


def column_energy(down_HI: Tensor) -> Tensor:
    """``|D_:j|^2``, float64 [I]."""
    return down_HI.double().square().sum(dim=0)


def fluctuation(sum_EI: Tensor, sq_EI: Tensor, count_E: Tensor) -> Tensor:
    """Sample variance of each channel over an expert's tokens, float64 [E, I] (arXiv 2312.11983).

    ``(sum h^2 - n mean^2) / (n - 1)``; not less than zero, and zero for fewer than two tokens.
    """
    n_E1 = count_E.double()[:, None]
    mean_EI = sum_EI.double() / n_E1.clamp(min=1)
    spread_EI = (sq_EI.double() - n_E1 * mean_EI.square()).clamp(min=0)
    return spread_EI / (n_E1 - 1).clamp(min=1)


def standardised(score_EI: Tensor) -> Tensor:
    """Each expert's scores minus their mean, over their standard deviation; zero where it is.

    Scores that are not finite become NaN and do not count.
    """
    known_EI = score_EI.masked_fill(~score_EI.isfinite(), math.nan)
    centred_EI = known_EI - known_EI.nanmean(dim=1, keepdim=True)
    deviation_E1 = centred_EI.square().nanmean(dim=1, keepdim=True).sqrt()
    equal_EI = (deviation_E1 <= 0) & ~known_EI.isnan()
    return (centred_EI / deviation_E1.clamp(min=1e-300)).masked_fill(equal_EI, 0.0)


def top(score_EI: Tensor, J: int, tie_EI: Tensor | None = None) -> Tensor:
    """The J highest neurons of each expert, ascending, int64 [E, J].

    ``tie_EI`` decides between equal scores, before the index does.
    """
    order_EI = torch.arange(score_EI.shape[1]).expand(score_EI.shape)
    for key_EI in (tie_EI, score_EI):  # the last sort counts most, and sorts keep earlier orders
        if key_EI is None:
            continue
        known_EI = key_EI.double().masked_fill(key_EI.isnan(), -math.inf)
        again_EI = known_EI.gather(1, order_EI).argsort(dim=1, descending=True, stable=True)
        order_EI = order_EI.gather(1, again_EI)
    return order_EI[:, :J].sort(dim=1).values


def above_threshold(score_LEI: Sequence[Tensor], remove: int) -> list[Tensor]:
    """Which channels stay when the ``remove`` lowest of all layers go, bool [E, I] per layer.

    The best channel of every expert stays whatever its score, so that no expert is empty; as many
    others go in its place. Of equal scores the first goes.

    Raises:
        BudgetError: fewer than one per expert would stay.
    """
    left = sum(score_EI.numel() for score_EI in score_LEI) - remove
    if left < (experts := sum(len(score_EI) for score_EI in score_LEI)):
        raise BudgetError(
            f"{left} neurons would stay for {experts} experts, and each needs one",
            "use a smaller ratio",
        )
    flat = torch.cat([score_EI.reshape(-1) for score_EI in score_LEI]).double()
    flat = flat.masked_fill(flat.isnan(), -math.inf)
    best, start = [], 0
    for score_EI in score_LEI:
        E, width = score_EI.shape
        known_EI = score_EI.double().masked_fill(score_EI.isnan(), -math.inf)
        best.append(known_EI.argmax(dim=1) + torch.arange(E) * width + start)
        start += E * width
    flat[torch.cat(best)] = math.inf
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.argsort(stable=True)[:remove]] = False
    found, start = [], 0
    for score_EI in score_LEI:
        found.append(keep[start : start + score_EI.numel()].view(score_EI.shape))
        start += score_EI.numel()
    return found
