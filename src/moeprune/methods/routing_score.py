"""RS: drop the experts that the router gives the least weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeprune.core.accumulators import RouterGram, Routing
from moeprune.core.dropping import Dropper
from moeprune.core.method import Context, LayerView
from moeprune.core.ranking import Rating


@dataclass(frozen=True)
class RoutingScore(Dropper):
    """Deletes the experts with the smallest sum of router weights over the calibration tokens.

    The baseline "RS" of MoNE's experiments (arXiv 2507.00390) is ``statistic=sum-gate`` with
    ``scope=global``; other code under the name of expert dropping sums full softmax probabilities.

    Options:
        statistic: ``sum-gate`` sums the weights that the block multiplied into the outputs, so
            only selected experts count; ``sum-prob`` sums softmax(z) of the router's first output,
            whether the expert was selected or not.
        scope, floor: as for every dropper.
        normalise: as for every dropper, but off: gates are comparable between layers, and the
            source compares them as they are.
    """

    name: ClassVar[str] = "routing-score"
    summary: ClassVar[str] = "drop the experts that get the least weight from the router"
    source: ClassVar[str] = "RS in arXiv 2507.00390"
    needs: ClassVar[tuple[str, ...]] = ("routing", "router")

    normalise: bool = False
    statistic: Literal["sum-gate", "sum-prob"] = "sum-gate"

    def rate(self, view: LayerView, context: Context) -> Rating:
        """Summed weight per expert."""
        routing = view.need().part(Routing)
        if self.statistic == "sum-gate":
            weight_E = routing.gate_E
        else:
            weight_E = view.need().part(RouterGram).prob_E
        return Rating(self.statistic, weight_E.tolist(), routing.count_E.tolist())
