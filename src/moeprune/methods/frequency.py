"""Frequency: drop the experts that are selected least often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeprune.core.accumulators import Routing
from moeprune.core.dropping import Dropper
from moeprune.core.method import Context, LayerView
from moeprune.core.ranking import Rating


@dataclass(frozen=True)
class Frequency(Dropper):
    """Deletes the experts that the fewest tokens were routed to: S(0, 0, 0) of arXiv 2606.15716.

    Options:
        statistic: ``count`` is tokens routed to the expert, ``top1`` tokens whose largest gate is
            the expert's.
        scope, normalise, floor: as for every dropper. All layers count the same number of routed
            tokens, so that ``scope=importance`` is ``scope=layer`` here, but for rounding.
    """

    name: ClassVar[str] = "frequency"
    summary: ClassVar[str] = "drop the experts that are selected least often"
    source: ClassVar[str] = "S(0,0,0) of arXiv 2606.15716"
    needs: ClassVar[tuple[str, ...]] = ("routing",)

    statistic: Literal["count", "top1"] = "count"

    def rate(self, view: LayerView, context: Context) -> Rating:
        """Tokens per expert."""
        routing = view.need().part(Routing)
        count_E = routing.count_E if self.statistic == "count" else routing.top1_E
        return Rating(self.statistic, count_E.double().tolist(), routing.count_E.tolist())
