"""SparseGPT (arXiv 2301.00774): prune weights, and let those that stay make up for them.

For a matrix W whose inputs x have the Hessian H = sum x x^T of the squared error of its outputs,
weights go column by column. Removing w_j and changing the columns behind it by
``-w_j / [G]_jj * G_j,:`` (G the inverse of H over the columns from j on) is the least increase of
the error. All these G come from one upper triangular U with U^T U = H^-1: row j of G is
``U_jj * U_j,:`` there, so the score of a weight is ``w^2 / U_jj^2``.

Axis letters: O outputs, I inputs, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeprune.core.ops.masks import lowest_excluded, prune_count

BLOCK = 128
DAMPING = 0.01


def inverse_factor(gram_II: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular U with U^T U = (H + damping * mean(diag H) * 1)^-1, [I, I].

    ``gram_II`` is sum x x^T in any unit: a factor of H changes neither choices nor updates. The
    mean is over inputs that are ever non-zero; one that never is ("dead") has the damping alone.
    float32, or float64 where the Cholesky factorisation fails in float32 or ``gram_II`` is float64.

    Raises ValueError if ``gram_II`` is not finite, or too far from positive semidefinite.
    """
    diagonal_I = gram_II.diagonal().double()
    if not bool(gram_II.isfinite().all()):
        raise ValueError("the inputs' Gram matrix is not finite")
    live_I = diagonal_I > 0
    mean = float(diagonal_I[live_I].mean()) if bool(live_I.any()) else 1.0
    for dtype in dict.fromkeys((gram_II.dtype, torch.float64)):
        # H = R R^T with R upper triangular, by the Cholesky factor of H turned round; U = R^-1
        turned_II = (gram_II.to(dtype) / mean).flip(0, 1)
        turned_II.diagonal().add_(damping)
        factor_II, failed = torch.linalg.cholesky_ex(turned_II)
        if int(failed):
            continue
        one_II = torch.eye(len(gram_II), dtype=dtype, device=gram_II.device)
        upper_II: Tensor = torch.linalg.solve_triangular(factor_II.flip(0, 1), one_II, upper=True)
        if bool(upper_II.isfinite().all()):
            return upper_II
    raise ValueError("the inputs' Gram matrix is not positive semidefinite")


def sparsegpt(
    weight_OI: Tensor,
    upper_II: Tensor,
    dead_I: Tensor,
    ratio: float | None = None,
    pattern: tuple[int, int] | None = None,
    block: int = BLOCK,
) -> Tensor:
    """The pruned and updated matrix [O, I]; the dtype is that of ``upper_II``.

    Args:
        weight_OI: the matrix.
        upper_II: of ``inverse_factor``.
        dead_I: inputs that are zero on all text. Their weights score 0 and so go first. (The source
            zeroes all of them, however many; here the number stays exact.)
        ratio: fraction pruned; in each block of columns the weights of all rows compete, as in the
            source. Exactly floor(O * I * ratio) go, ties by row, then column.
        pattern: (n, m): in each row n of every m consecutive weights.
        block: columns whose updates are made at once behind them.

    Raises ValueError unless exactly one of ``ratio`` and ``pattern`` is given.
    """
    if (ratio is None) == (pattern is None):
        raise ValueError("either a ratio or a pattern")
    left_OI = weight_OI.to(upper_II.dtype, copy=True)
    outputs, inputs = left_OI.shape
    run = 1 if pattern is None else pattern[1]
    block = max(run, block // run * run)
    gone = 0
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        upper_BB = upper_II[start:end, start:end]
        keep_OB = None
        if ratio is not None:
            count = prune_count(outputs * end, ratio) - gone
            gone += count
            scores_OB = _scores(left_OI[:, start:end], upper_BB.diagonal(), dead_I[start:end])
            keep_OB = lowest_excluded(scores_OB.reshape(1, -1), count).view_as(scores_OB)
        left_OB, dead_B = left_OI[:, start:end], dead_I[start:end]
        error_OB = _prune_block(left_OB, upper_BB, dead_B, keep_OB, pattern)
        left_OI[:, end:] -= error_OB @ upper_II[start:end, end:]
    return left_OI


def _prune_block(
    left_OB: Tensor,
    upper_BB: Tensor,
    dead_B: Tensor,
    keep_OB: Tensor | None,
    pattern: tuple[int, int] | None,
) -> Tensor:
    """Prune one block in place, column by column; the errors [O, B] that columns behind make up."""
    error_OB = torch.zeros_like(left_OB)
    columns = left_OB.shape[1]
    if pattern is not None:
        keep_OB = torch.ones_like(left_OB, dtype=torch.bool)
    assert keep_OB is not None
    for j in range(columns):
        if pattern is not None and j % pattern[1] == 0:
            part = slice(j, j + pattern[1])
            scores = _scores(left_OB[:, part], upper_BB.diagonal()[part], dead_B[part])
            keep_OB[:, part] = lowest_excluded(scores, pattern[0])
        lost_O = left_OB[:, j].masked_fill(keep_OB[:, j], 0.0)
        left_OB[:, j] -= lost_O
        error_OB[:, j] = lost_O / upper_BB[j, j]
        left_OB[:, j + 1 :] -= torch.outer(error_OB[:, j], upper_BB[j, j + 1 :])
    return error_OB


def _scores(left_OB: Tensor, diagonal_B: Tensor, dead_B: Tensor) -> Tensor:
    return (left_OB / diagonal_B).square().masked_fill(dead_B, 0.0)
