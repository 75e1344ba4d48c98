"""MoNE (arXiv 2507.00390): replace redundant experts by constant vectors ("novices")."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from moeprune.core.accumulators import Outputs, Routing
from moeprune.core.budget import experts_to_remove, lowest, next_multiple
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape


@dataclass(frozen=True)
class MoNE(Method):
    """Replaces the experts that are used least and vary least by their mean output.

    ``phi_e = |sqrt(Var[f_e])|_2 * routing_e``: the norm, over output dimensions, of the standard
    deviation of the expert's raw output on its own tokens (exact unbiased variance), times how much
    it is used. The lowest phi are replaced; the router is untouched, and a token routed to a novice
    receives gate * mean output. An expert that saw no token has phi = 0 and a zero vector.

    Options:
        routing: ``gate-mass`` is sum of gates / tokens (the authors' code), ``conditional`` the
            mean gate of the tokens routed to the expert (the paper's formula), ``count`` the
            fraction of tokens routed to it.
        scope: ``layer`` replaces the same number in every layer; ``global`` ranks all experts
            together, phi divided by its layer's mean, since outputs grow with depth; the best
            expert of a layer is replaced only if all are.
    """

    name: ClassVar[str] = "mone"
    summary: ClassVar[str] = "replace rarely used, steady experts by their mean output"
    source: ClassVar[str] = "arXiv 2507.00390"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = ("routing", "outputs")
    changes: ClassVar[str | None] = "replaces experts by constants"

    routing: Literal["gate-mass", "conditional", "count"] = "gate-mass"
    scope: Literal["layer", "global"] = "layer"

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer from its own scores."""
        # one novice vector per expert exists, so groups and top-k set no floor
        free = _ungrouped(view.shape)
        remove = experts_to_remove(context.budget, free)
        scores, counts = self._scores(view)
        _warn_of_nan(view, scores, context)
        return self._plan(view, lowest(scores, counts, remove, free), scores)

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        """Decide about all layers; with ``scope="global"`` they compete."""
        if self.scope == "layer":
            return super().plan_model(views, context)
        ranked, total = [], 0
        asked = replace(context.budget, multiple_of=1)  # layers are rounded when all is ranked
        for view in views:
            scores, counts = self._scores(view)
            _warn_of_nan(view, scores, context)
            finite = [score for score in scores if math.isfinite(score)]
            mean = sum(finite) / max(1, len(finite)) or 1.0
            total += experts_to_remove(asked, _ungrouped(view.shape))
            layer = sorted(
                (-math.inf if math.isnan(score) else score / mean, count, expert)
                for expert, (score, count) in enumerate(zip(scores, counts, strict=True))
            )
            # a checkpoint needs one expert with weights per layer: the best of each ranks last
            ranked += [(key is layer[-1], *key[:2], view.shape.layer, key[2]) for key in layer]
        ranked.sort()
        plans = {}
        for view in views:
            shape = view.shape
            order = [expert for *_, index, expert in ranked if index == shape.layer]
            kept = shape.experts - sum(index == shape.layer for *_, index, _ in ranked[:total])
            kept = next_multiple(kept, context.budget.multiple_of, shape)
            replaced = sorted(order[: shape.experts - kept])
            plans[shape.layer] = self._plan(view, replaced, self._scores(view)[0])
        return plans

    def per_layer(self) -> MoNE:
        """The same ranking with the same number from every layer."""
        return replace(self, scope="layer")

    def _scores(self, view: LayerView) -> tuple[list[float], list[int]]:
        """phi per expert, and the tokens behind it."""
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
        return (spread_E * use_E).tolist(), routing.count_E.tolist()

    def _plan(self, view: LayerView, replaced: list[int], scores: list[float]) -> LayerPlan:
        outputs = view.need().part(Outputs)
        unseen = [e for e in replaced if int(outputs.count_E[e]) == 0]
        notes: tuple[str, ...] = ()
        if unseen:
            notes = (f"experts {unseen} saw no token: their novices are zero vectors",)
        return LayerPlan(
            layer=view.shape.layer,
            experts=view.shape.experts,
            keep=tuple(e for e in range(view.shape.experts) if e not in replaced),
            replaced=tuple(replaced),
            scores={"fusion": tuple(scores)},
            novices_NH=outputs.mean_EH[replaced].float() if replaced else None,
            notes=notes,
        )


def _warn_of_nan(view: LayerView, scores: list[float], context: Context) -> None:
    unknown = [expert for expert, score in enumerate(scores) if math.isnan(score)]
    if unknown:
        context.warn(
            f"layer {view.shape.layer}: experts {unknown} gave outputs that are not finite; "
            "they are replaced first"
        )


def _ungrouped(shape: LayerShape) -> LayerShape:
    return LayerShape(shape.layer, shape.experts, shape.top_k, shape.hidden, shape.intermediate)
