"""The best constants to put in an expert's place, from sums over its tokens.

Legend: E experts, H width; f the expert's output, g its gate, v the constant.
"""

from __future__ import annotations

from torch import Tensor


def least_squares_novices(gated_EH: Tensor, gate_sq_E: Tensor) -> Tensor:
    """The v that minimises sum g^2 |f - v|^2: ``v = sum g^2 f / sum g^2``, [E, H].

    A token's output changes by g (f - v) where an expert becomes v, so that this is the constant
    with the least squared error of the block. Zero where an expert saw no token or no gate.
    """
    return gated_EH / _or_one(gate_sq_E)[:, None]


def gate_mean_novices(gate_f_EH: Tensor, gate_E: Tensor) -> Tensor:
    """The mean output weighted by the gate, ``sum g f / sum g``, [E, H]; zero without gates."""
    return gate_f_EH / _or_one(gate_E)[:, None]


def novice_error(
    novices_EH: Tensor, gate_sq_norm_sq_E: Tensor, gated_EH: Tensor, gate_sq_E: Tensor
) -> Tensor:
    """``sum g^2 |f - v|^2 = sum g^2 |f|^2 - 2 v . sum g^2 f + |v|^2 sum g^2``, [E].

    The squared error of the block's output over the calibration tokens if this expert alone
    becomes v. Never below 0: what rounding leaves of a difference of equals is cut off.
    """
    cross_E = (novices_EH * gated_EH).sum(dim=1)
    error_E = gate_sq_norm_sq_E - 2 * cross_E + novices_EH.square().sum(dim=1) * gate_sq_E
    return error_E.clamp(min=0.0)


def _or_one(sums_E: Tensor) -> Tensor:
    return sums_E.masked_fill(sums_E == 0, 1.0)
