"""MoNE (arXiv 2507.00390): replace redundant experts by constant vectors ("novices")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moeprune.core.accumulators import Outputs, Routing
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.novices import gate_mean_novices, least_squares_novices
from moeprune.core.ranking import Rating
from moeprune.core.replacing import Replacer


@dataclass(frozen=True)
class MoNE(Replacer):
    """Replaces the experts that are used least and vary least by their mean output.

    ``phi_e = |sqrt(Var[f_e])|_2 * routing_e``: the norm, over output dimensions, of the standard
    deviation of the expert's raw output on its own tokens (exact unbiased variance), times how much
    it is used. The lowest phi are replaced; the router is untouched, and a token routed to a novice
    receives gate * mean output. An expert that saw no token has phi = 0 and a zero vector.

    Options:
        scope: ``layer`` replaces the same number in every layer; ``global`` ranks all experts
            together, and the best expert of a layer is replaced only if all are; ``importance``
            keeps experts in proportion to the layers' summed phi.
        normalise: with ``scope=global``, phi is divided by its layer's mean, since outputs grow
            with depth.
        routing: ``gate-mass`` is sum of gates / tokens (the authors' code), ``conditional`` the
            mean gate of the tokens routed to the expert (the paper's formula), ``count`` the
            fraction of tokens routed to it.
        score: ``fusion`` is phi; ``frequency`` its second factor alone, ``variance`` its first,
            the ablations of the paper.
        novice: ``mean``; ``zero`` (an ablation of the paper); ``gate-mean`` is sum g f / sum g,
            ``least-squares`` sum g^2 f / sum g^2 (ours; see also the method mone-ls).
    """

    name: ClassVar[str] = "mone"
    summary: ClassVar[str] = "replace rarely used, steady experts by their mean output"
    source: ClassVar[str] = "arXiv 2507.00390"
    needs: ClassVar[tuple[str, ...]] = ("routing", "outputs")

    routing: Literal["gate-mass", "conditional", "count"] = "gate-mass"
    score: Literal["fusion", "frequency", "variance"] = "fusion"
    novice: Literal["mean", "zero", "gate-mean", "least-squares"] = "mean"

    def rate(self, view: LayerView, context: Context) -> Rating:
        """phi per expert, or the factor of it that ``score`` names."""
        statistics = view.need()
        routing, outputs = statistics.part(Routing), statistics.part(Outputs)
        spread_E = outputs.variance_EH().sqrt().norm(dim=1)
        tokens = max(1, statistics.tokens)
        use_E: Tensor
        if self.routing == "gate-mass":
            use_E = routing.gate_E / tokens
        elif self.routing == "conditional":
            use_E = routing.gate_E / routing.count_E.clamp(min=1)
        else:
            use_E = routing.count_E.double() / tokens
        score_E = {"fusion": spread_E * use_E, "frequency": use_E, "variance": spread_E}[self.score]
        return Rating(self.score, score_E.tolist(), routing.count_E.tolist())

    def novices(self, view: LayerView, chosen: list[int]) -> Tensor:
        """The constants of ``chosen``."""
        routing, outputs = view.need().part(Routing), view.need().part(Outputs)
        if self.novice == "mean":
            return outputs.mean_EH[chosen]
        if self.novice == "zero":
            return torch.zeros_like(outputs.mean_EH[chosen])
        if self.novice == "gate-mean":
            return gate_mean_novices(outputs.gate_f_EH[chosen], routing.gate_E[chosen])
        return least_squares_novices(outputs.gated_EH[chosen], routing.gate_sq_E[chosen])
