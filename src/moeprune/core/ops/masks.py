"""Keep-masks of weights: which entries of an expert matrix survive unstructured or N:M pruning.

A mask is a function of a score alone, and the score of weight W[o, i] is |W[o, i]| * a[i]:
``a`` is the norm of the gated input feature for MoE-Pruner (arXiv 2410.12013, eq. 9), the norm of
the plain input feature for Wanda (arXiv 2306.11695), and 1 for magnitude pruning.

Rules common to every mask here: the comparison group is one output row (or one run of M inputs
of it, or the whole matrix), exactly the requested number of entries is pruned in every group, equal
scores are pruned in ascending column order (in a matrix: by row, then column), and a NaN score is
pruned before anything else.  A mask depends on
nothing but its arguments: not on the thread count, the device, or the batching of experts.

Axis letters: E experts, O outputs, I inputs, R rows, M the length of an N:M run.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_ENTRIES = 1 << 20
"""Upper bound of the scores held in memory at a time (one row at least)."""

MAX_RANKED_RUN = 16
"""Longest N:M run whose entries are ranked by pairwise comparison."""


def scores(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return the saliency |W| * a of every weight.

    Source: MoE-Pruner eq. 9 (arXiv 2410.12013); Wanda (arXiv 2306.11695); magnitude for ``None``.

    Shapes: ``weight`` [..., O, I]; ``scale`` [..., I], broadcast over O and, by the usual rules,
    over missing leading axes; the result has the shape of ``weight`` and is float32 (float64 for
    a float64 weight).  Both factors are cast before they are multiplied.

    Raises ValueError if ``weight`` has fewer than two axes or ``scale`` does not fit it.
    """
    dtype = _score_dtype(weight)
    magnitude = weight.to(dtype).abs()
    if scale is None:
        return magnitude
    return magnitude * _expand_scale(weight, scale).to(device=weight.device, dtype=dtype)


def prune_count(inputs: int, ratio: float) -> int:
    """Return floor(inputs * ratio), the number of weights pruned in a row of ``inputs`` entries.

    Source: MoE-Pruner algorithm 1 and Wanda, which truncate d_in * p.  A product that lies less
    than 1e-6 below an integer counts as that integer, so that 0.29 of 100 is 29 although the
    floating-point product is 28.999999999999996, and a third of 3 is 1.

    Raises ValueError unless 0 <= ratio <= 1.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    return min(inputs, math.floor(inputs * ratio + 1e-6))


def row_keep_mask(weight: Tensor, scale: Tensor | None, ratio: float) -> Tensor:
    """Return the mask that prunes the ``prune_count(I, ratio)`` lowest scores of every row.

    Source: MoE-Pruner algorithm 1 (arXiv 2410.12013), Wanda (arXiv 2306.11695).

    Shapes: ``weight`` [..., O, I]; ``scale`` [..., I] or None (see :func:`scores`); the result is
    bool, shaped like ``weight``, False where a weight is to be zeroed.

    Raises ValueError for a ratio outside [0, 1] or shapes that do not fit.
    """
    count = prune_count(_inputs(weight), ratio)
    return _mask_by_chunks(weight, scale, lambda chunk_RI: lowest_excluded(chunk_RI, count))


def matrix_keep_mask(weight: Tensor, scale: Tensor | None, ratio: float) -> Tensor:
    """Return the mask that prunes the ``prune_count(O * I, ratio)`` lowest scores of each matrix.

    Source: magnitude pruning as the Wanda reference code has it, one threshold per matrix. There
    everything up to the sorted value at position int(O * I * ratio) goes, which is one entry more
    than asked for, and with ties any number more; here the number is exact.

    Shapes and errors as for :func:`row_keep_mask`. The scores of one matrix are in memory at once.
    """
    inputs = _inputs(weight)
    outputs = int(weight.shape[-2])
    count = prune_count(outputs * inputs, ratio)

    def keep(chunk_RI: Tensor) -> Tensor:
        return lowest_excluded(chunk_RI.reshape(1, -1), count).reshape(chunk_RI.shape)

    return _mask_by_chunks(weight, scale, keep, rows=outputs)


def nm_keep_mask(weight: Tensor, scale: Tensor | None, n: int, m: int) -> Tensor:
    """Return the mask that prunes the ``n`` lowest scores of every aligned run of ``m`` inputs.

    ``n`` is the number PRUNED: n=2, m=4 zeroes two of each four consecutive inputs of a row.
    Source: the semi-structured mode of MoE-Pruner (arXiv 2410.12013) and Wanda (arXiv 2306.11695).

    Shapes: as for :func:`row_keep_mask`; I must be a multiple of ``m``.

    Raises ValueError unless m >= 1, 0 <= n <= m and I % m == 0, or if the shapes do not fit.
    """
    inputs = _inputs(weight)
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"need m >= 1 and 0 <= n <= m, got n={n}, m={m}")
    if inputs % m:
        raise ValueError(f"{inputs} inputs per row cannot be split into runs of {m}")

    def keep(chunk_RI: Tensor) -> Tensor:
        runs_RM = chunk_RI.reshape(-1, m)
        select = lowest_ranks_excluded if m <= MAX_RANKED_RUN else lowest_excluded
        return select(runs_RM, n).reshape(chunk_RI.shape)

    return _mask_by_chunks(weight, scale, keep)


def _score_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _inputs(weight: Tensor) -> int:
    if weight.ndim < 2:
        raise ValueError(f"weight must be [..., O, I], got shape {tuple(weight.shape)}")
    return int(weight.shape[-1])


def _expand_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """View ``scale`` [..., I] as [..., 1, I] with the leading axes of ``weight``."""
    inputs = _inputs(weight)
    target = (*weight.shape[:-2], inputs)
    if scale.ndim < 1 or scale.shape[-1] != inputs or scale.ndim > len(target):
        raise ValueError(f"scale {tuple(scale.shape)} does not fit weight {tuple(weight.shape)}")
    try:
        return scale.expand(target).unsqueeze(-2)
    except RuntimeError as error:
        message = f"scale {tuple(scale.shape)} does not fit weight {tuple(weight.shape)}"
        raise ValueError(message) from error


def _mask_by_chunks(
    weight: Tensor, scale: Tensor | None, keep: Callable[[Tensor], Tensor], rows: int = 0
) -> Tensor:
    """Apply ``keep`` (scores [R, I] -> bool [R, I]) to groups of rows of one matrix.

    ``rows`` of them at a time; 0 takes as many as ``CHUNK_ENTRIES`` allows.
    """
    outputs, inputs = int(weight.shape[-2]), _inputs(weight)
    mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    scale_EI = None if scale is None else _expand_scale(weight, scale.detach()).reshape(-1, inputs)
    if not weight.numel():
        return mask
    weight_EOI = weight.detach().reshape(-1, outputs, inputs)
    mask_EOI = mask.view(-1, outputs, inputs)
    rows = rows or max(1, CHUNK_ENTRIES // inputs)
    for expert in range(len(weight_EOI)):
        scale_I = None if scale_EI is None else scale_EI[expert]
        for start in range(0, outputs, rows):
            part = slice(start, start + rows)
            mask_EOI[expert, part] = keep(scores(weight_EOI[expert, part], scale_I))
    return mask


def _nan_first(scores_RI: Tensor) -> Tensor:
    return scores_RI.masked_fill_(scores_RI.isnan(), -math.inf)


def lowest_excluded(scores_RI: Tensor, count: int) -> Tensor:
    """True but for the ``count`` lowest scores of each row; NaN in ``scores_RI`` becomes -inf.

    Select by the count-th smallest value of a row, then settle ties at it by column order.
    """
    inputs = scores_RI.shape[-1]
    if count in (0, inputs):
        return torch.full_like(scores_RI, count == 0, dtype=torch.bool)
    scores_RI = _nan_first(scores_RI)
    cut_R1 = scores_RI.kthvalue(count, dim=-1, keepdim=True).values
    keep_RI = scores_RI > cut_R1
    tied_R = (keep_RI.sum(dim=-1) != inputs - count).nonzero().squeeze(-1)
    if tied_R.numel():
        below = scores_RI[tied_R] < cut_R1[tied_R]
        at_cut = scores_RI[tied_R] == cut_R1[tied_R]
        pruned_at_cut = count - below.sum(dim=-1, keepdim=True)
        keep_RI[tied_R] |= at_cut & (at_cut.cumsum(dim=-1) > pruned_at_cut)
    return keep_RI


def lowest_ranks_excluded(scores_RM: Tensor, count: int) -> Tensor:
    """The same selection for short rows: count who precedes whom in (score, column) order.

    It takes M * (M - 1) / 2 vectorised comparisons, which beats a selection per row for small M.
    """
    columns = _nan_first(scores_RM).unbind(-1)
    rank_RM = torch.zeros(scores_RM.shape, dtype=torch.int16, device=scores_RM.device)
    ranks = rank_RM.unbind(-1)
    for right in range(len(columns)):
        for left in range(right):
            left_first = columns[left] <= columns[right]
            ranks[right].add_(left_first)
            ranks[left].add_(left_first.logical_not_())
    return rank_RM >= count
