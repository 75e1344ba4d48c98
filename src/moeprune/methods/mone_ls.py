"""MoNE with least squares: the constant, and the choice, with the least error of the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeprune.core.accumulators import Outputs, Routing
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.novices import least_squares_novices, novice_error
from moeprune.core.ranking import Rating
from moeprune.core.replacing import Replacer


@dataclass(frozen=True)
class MoNELS(Replacer):
    """Replaces the experts whose best constant makes the smallest squared error; ours, after MoNE.

    Where an expert becomes v, a token's output changes by g (f - v). The best constant is
    ``v = sum g^2 f / sum g^2``, and its remaining error ``sum g^2 |f - v|^2`` is the score: the
    squared error of the block's output on the calibration tokens if this expert alone goes. An
    expert that saw no token has error 0 and a zero vector.

    Options:
        scope: as for mone. With ``importance`` layers keep experts in proportion to their summed
            error.
        normalise: with ``scope=global``, divide an error by the mean of its layer.
    """

    name: ClassVar[str] = "mone-ls"
    summary: ClassVar[str] = "replace experts by their best constant, those that err least"
    source: ClassVar[str] = "extends arXiv 2507.00390"
    needs: ClassVar[tuple[str, ...]] = ("routing", "outputs")

    def rate(self, view: LayerView, context: Context) -> Rating:
        """The error that each expert's best constant leaves."""
        routing, outputs = view.need().part(Routing), view.need().part(Outputs)
        novices_EH = least_squares_novices(outputs.gated_EH, routing.gate_sq_E)
        error_E = novice_error(
            novices_EH, outputs.gate_sq_norm_sq_E, outputs.gated_EH, routing.gate_sq_E
        )
        return Rating("error", error_E.tolist(), routing.count_E.tolist())

    def novices(self, view: LayerView, chosen: list[int]) -> Tensor:
        """The best constants of ``chosen``."""
        routing, outputs = view.need().part(Routing), view.need().part(Outputs)
        return least_squares_novices(outputs.gated_EH[chosen], routing.gate_sq_E[chosen])
