"""The best affine map of low rank in an expert's place: f(x) ~ v + B A x.

Weighted reduced-rank regression (Izenman 1975) with the squared gate as the weight of a token: the
rank-r map with the least squared error of the block's output, from second moments alone.

Legend: H width of the block, K = H + 1 with a leading 1 for the constant, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDING = 1e-6


@dataclass(frozen=True)
class AffineNovice:
    """One fitted map.

    Attributes:
        v_H: the constant.
        a_rH: from the input to r numbers.
        b_Hr: from there to the output; its columns are orthonormal (or zero).
        error: sum g^2 |f - v - B A x|^2 over the tokens behind the moments.
    """

    v_H: Tensor
    a_rH: Tensor
    b_Hr: Tensor
    error: float

    def packed(self) -> Tensor:
        """v, then the rows of A, then the columns of B: one vector of (1 + 2 r) H values."""
        return torch.cat((self.v_H[None], self.a_rH, self.b_Hr.T)).reshape(-1)


def fit_affine(
    moments_KK: Tensor, cross_HK: Tensor, norm_sq: float, rank: int, damping: float
) -> AffineNovice:
    """The map of rank ``rank`` for one expert.

    With all sums weighted by g^2 and centred by the weighted means, C_xx = cov(x, x) and
    C_fx = cov(f, x): ``W = C_fx (C_xx + d I)^-1`` is the damped least-squares map, with
    d = damping * mean(diag C_xx), and ``B A = U U^T W`` its best rank-r part, U the first
    eigenvectors of ``W C_fx^T``. ``v = mean(f) - B A mean(x)``. Damping matters where an expert saw
    fewer tokens than dimensions. The error is exact for the damped map, and never larger than that
    of the best constant.

    Args:
        moments_KK: sum g^2 [1, x] [1, x]^T.
        cross_HK: sum g^2 f [1, x]^T.
        norm_sq: sum g^2 |f|^2.
        rank: r, at most H.
        damping: at least 0.

    Returns:
        All zero where no token (or no gate) was seen; all zero with error NaN where a sum is not
        finite.
    """
    H = len(cross_HK)
    zero = AffineNovice(torch.zeros(H), torch.zeros(rank, H), torch.zeros(H, rank), 0.0)
    if not (bool(moments_KK.isfinite().all()) and bool(cross_HK.isfinite().all())):
        return AffineNovice(zero.v_H, zero.a_rH, zero.b_Hr, float("nan"))
    moments_KK, cross_HK = moments_KK.double(), cross_HK.double()
    weight = float(moments_KK[0, 0])
    if weight <= 0:
        return zero
    x_H, f_H = moments_KK[0, 1:] / weight, cross_HK[:, 0] / weight
    xx_HH = moments_KK[1:, 1:] - weight * torch.outer(x_H, x_H)
    fx_HH = cross_HK[:, 1:] - weight * torch.outer(f_H, x_H)
    constant = norm_sq - weight * float(f_H.square().sum())
    scale = float(xx_HH.diagonal().mean())
    # the moments are summed in float32: what is below their rounding is no variance
    noise = _ROUNDING * float(moments_KK.diagonal()[1:].mean())
    if scale <= noise:  # one token, or always the same
        return AffineNovice(f_H, zero.a_rH, zero.b_Hr, max(0.0, constant))
    # the noise keeps the matrix invertible where tokens span less than H dimensions
    damped_HH = xx_HH + (damping * scale + noise) * torch.eye(H, dtype=torch.float64)
    map_HH = torch.linalg.solve(damped_HH, fx_HH.T).T
    gain_HH = map_HH @ fx_HH.T
    _, vectors_HH = torch.linalg.eigh((gain_HH + gain_HH.T) / 2)
    b_Hr = vectors_HH[:, -rank:].flip(1)
    # of a vector and its negative the one whose largest entry is positive
    largest_r = b_Hr.gather(0, b_Hr.abs().argmax(dim=0, keepdim=True))
    b_Hr = b_Hr * largest_r.sign()
    a_rH = b_Hr.T @ map_HH
    error = constant - 2 * float((a_rH * (b_Hr.T @ fx_HH)).sum())
    error += float((a_rH @ xx_HH * a_rH).sum())
    return AffineNovice(f_H - b_Hr @ (a_rH @ x_H), a_rH, b_Hr, max(0.0, error))
