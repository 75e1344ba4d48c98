"""STUN (arXiv 2409.06211), its first step: one expert stays of every cluster of similar experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Routing
from moeprune.core.budget import (
    experts_to_remove,
    least_kept,
    next_multiple,
    removable,
    removal_range,
)
from moeprune.core.edits import Neurons
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.clusters import Distances, clusters_of, shared_removals
from moeprune.core.plan import LayerPlan
from moeprune.core.replay import choice_of
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class STUN(Method):
    """Clusters experts by their router rows and by how often they are chosen together.

    The distance of two experts is ``|R_i - R_j| / |R|_F``, with R the router's matrix; with
    ``coactivation`` > 0 it is ``|R_i - R_j| - coactivation * a_ij / mean a``, with a_ij the number
    of tokens that choose both. Clusters grow greedily under a threshold that is searched such that
    the number of experts is met. Of each cluster the expert nearest to the mean of its members
    stays (all matrices as one vector), with its own router row. The paper's second step, weights
    set to zero by Wanda or OWL, is a second run on the result.

    Options:
        coactivation: weight of the second term; 0 looks at router rows alone.
        scope: ``layer`` takes the same number from every layer; ``global`` uses one threshold for
            all layers, as the authors' code does, so that layers keep different numbers.
        merge_max_clusters: a layer that ends with at most so many experts gets the means of the
            clusters, weights and router rows, instead of one member each. 0 never does.
    """

    name: ClassVar[str] = "stun"
    summary: ClassVar[str] = "keep one of each cluster of experts with similar router rows"
    source: ClassVar[str] = "arXiv 2409.06211"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = ("routing",)

    coactivation: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    scope: Literal["layer", "global"] = "layer"
    merge_max_clusters: Annotated[int, Field(ge=0)] = 0

    def per_layer(self) -> STUN:
        """The same clustering with the same number from every layer."""
        return replace(self, scope="layer")

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer by itself."""
        return self._plan(view, context, removable(context.budget, view.shape))

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        """Decide about all layers; with ``scope="global"`` they share one threshold."""
        if self.scope == "layer":
            return super().plan_model(views, context)
        multiple = context.budget.multiple_of
        asked = replace(context.budget, multiple_of=1)  # layers are rounded when all is shared out
        distances, most, remove, indices = [], [], 0, []
        for view in views:
            shape = view.shape
            pinned, forbidden = _fixed(shape, context)
            least = least_kept(shape, 0, multiple)
            high = removal_range(shape, least, multiple, pinned, forbidden)[1]
            distances.append(_confined(self.distances(view), shape, pinned, forbidden))
            most.append(high - len(forbidden))
            remove += experts_to_remove(asked, shape) - len(forbidden)
            indices.append(shape.layer)
        counts = shared_removals(distances, most, remove)
        if counts is None or remove < 0:
            raise BudgetError(
                f"clusters of all layers together cannot save {remove} experts "
                "(top-k, routing groups, pinned and forbidden experts)",
                "use another ratio, or -o scope=layer",
            )
        by_layer = dict(zip(indices, counts, strict=True))
        plans = {}
        for view in views:
            shape = view.shape
            gone = by_layer[shape.layer] + len(context.forbidden_in(shape.layer))
            step = math.lcm(shape.groups, multiple)
            kept = next_multiple(shape.experts - gone, step, shape)
            plans[shape.layer] = self._plan(view, context, shape.experts - kept)
        return plans

    def distances(self, view: LayerView) -> Distances:
        """Distances of the layer's experts, [E, E], float64."""
        rows_EH = view.router_rows().double()
        apart_EE = torch.cdist(rows_EH, rows_EH, compute_mode="donot_use_mm_for_euclid_dist")
        if not self.coactivation:
            return np.asarray((apart_EE / rows_EH.norm().clamp(min=1e-300)).numpy())
        together_EE = view.need().part(Routing).together_EE.double()
        off_EE = together_EE - torch.diag(together_EE.diagonal())
        E = len(off_EE)
        mean = float(off_EE.sum()) / max(1, E * (E - 1)) or 1.0
        return np.asarray((apart_EE - self.coactivation * off_EE / mean).numpy())

    def _plan(self, view: LayerView, context: Context, remove: int) -> LayerPlan:
        shape = view.shape
        choice_of(view, context, remove)  # refuses numbers that the fixed experts do not allow
        pinned, forbidden = _fixed(shape, context)
        clusters = self._clusters(view, remove, pinned, forbidden)
        merges = shape.experts - remove <= self.merge_max_clusters
        chosen = {_nearest(view, members, pinned): members for members in clusters}
        kept = tuple(sorted(chosen))
        members = [chosen[e] for e in kept]
        of = {e: float(rep) for rep, cluster in chosen.items() for e in cluster}
        scores = {"cluster": tuple(of.get(e) for e in range(shape.experts))}
        if not merges or not remove:
            return LayerPlan(shape.layer, shape.experts, kept, scores=scores)
        return LayerPlan(
            shape.layer,
            shape.experts,
            kept,
            scores=scores,
            notes=("experts are the means of their clusters",),
            neurons=_means(members, shape),
            router_CE=_router_means(members, shape),
        )

    def _clusters(
        self, view: LayerView, remove: int, pinned: frozenset[int], forbidden: frozenset[int]
    ) -> list[list[int]]:
        """Clusters inside every routing group; forbidden experts are in none."""
        shape = view.shape
        confined_EE = _confined(self.distances(view), shape, pinned, forbidden)
        found = []
        for group in range(shape.groups):
            ids = [
                e for e in range(shape.experts) if shape.group_of(e) == group and e not in forbidden
            ]
            gone = sum(shape.group_of(e) == group for e in forbidden)
            clusters = clusters_of(confined_EE[np.ix_(ids, ids)], remove // shape.groups - gone)
            if clusters is None:
                raise BudgetError(
                    f"layer {shape.layer}: no clusters save {remove} experts with these pinned",
                    "pin fewer experts",
                )
            found += [[ids[i] for i in cluster] for cluster in clusters]
        return found


def _fixed(shape: LayerShape, context: Context) -> tuple[frozenset[int], frozenset[int]]:
    return context.pinned_in(shape.layer), context.forbidden_in(shape.layer)


def _confined(
    distance_EE: Distances, shape: LayerShape, pinned: frozenset[int], forbidden: frozenset[int]
) -> Distances:
    """Distances that never unite two pinned experts, routing groups, or a forbidden expert."""
    group_E = np.array([shape.group_of(e) for e in range(shape.experts)])
    apart_EE = group_E[:, None] != group_E[None, :]
    for expert in pinned:
        apart_EE[expert, list(pinned)] = True
    for expert in forbidden:
        apart_EE[expert, :] = apart_EE[:, expert] = True
    return np.where(apart_EE, np.inf, distance_EE)


def _nearest(view: LayerView, members: Sequence[int], pinned: frozenset[int]) -> int:
    """The member nearest to the mean of all: a pinned one, or the first of equals.

    Two matrices are in memory at a time.
    """
    fixed = [e for e in members if e in pinned]
    if fixed or len(members) == 1:
        return (fixed or list(members))[0]
    if len(members) == 2:
        return min(members)  # both are equally far, and differ by rounding alone
    distance = dict.fromkeys(members, 0.0)
    for role in view.shape.roles:
        total_OI = view.weights.matrix(members[0], role).double()
        for e in members[1:]:
            total_OI += view.weights.matrix(e, role)
        for e in members:
            apart_OI = view.weights.matrix(e, role) - total_OI / len(members)
            distance[e] += float(apart_OI.square().sum())
    return min(members, key=lambda e: (distance[e], e))


def _means(members: Sequence[Sequence[int]], shape: LayerShape) -> Neurons:
    """Each new expert's neurons as the means of its members', by position."""
    width = shape.intermediate
    pairs = [(position, e) for position, cluster in enumerate(members) for e in cluster]
    table_P2 = torch.tensor(pairs).repeat_interleave(width, dim=0)
    neuron_N = torch.arange(width).repeat(len(pairs))
    index_N4 = torch.stack((table_P2[:, 0], neuron_N, table_P2[:, 1], neuron_N), dim=1)
    share_C = torch.tensor([1 / len(cluster) for cluster in members])
    factor_N3 = share_C[table_P2[:, 0], None].expand(-1, 3)
    return Neurons(width, index_N4.to(torch.int32), factor_N3.contiguous())


def _router_means(members: Sequence[Sequence[int]], shape: LayerShape) -> Tensor:
    router_CE = torch.zeros(len(members), shape.experts)
    for row, cluster in enumerate(members):
        router_CE[row, list(cluster)] = 1 / len(cluster)
    return router_CE
