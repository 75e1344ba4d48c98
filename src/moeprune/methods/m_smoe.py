"""M-SMoE (arXiv 2310.01334): merge experts into the most used ones that the router treats alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import RouterGram, Routing
from moeprune.core.budget import least_kept, next_multiple
from moeprune.core.merging import (
    Align,
    Groups,
    Router,
    align_groups,
    choose_cores,
    experts_kept,
    free_shape,
    join_most_similar,
    merged_plan,
    protected,
)
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.cosine import gram_cosines
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape


@dataclass(frozen=True)
class MSMoE(Method):
    """Groups experts around the most used ones and replaces each group by its weighted average.

    ``usage_e = n_e / sum n``. The experts with the highest usage are cores; every other joins the
    core with the largest ``(1 + cos(z_i, z_j)) / 2``, where z_i are the router's outputs for
    expert i over all calibration tokens. Members are put in their core's order of neurons (the
    permutation with the largest sum of inner products of gate rows, up rows and down columns) and
    averaged with their usages as weights. An expert that saw no token gives its group nothing; a
    group in which nobody saw a token is averaged equally.

    Options:
        scope: ``layer`` leaves the same number of groups in every layer; ``global`` ranks the
            usages of all layers together, the most used expert of each layer counting as 1.
        router: ``slice`` keeps the cores' rows, ``mean`` averages the rows of a group by usage;
            ``original`` (the source) keeps all rows, so that members still collect tokens for
            their group: such checkpoints need the code that travels with them.
        align: ``core`` aligns members to their core, ``first`` all experts to expert 0 (the
            authors' code), ``none`` averages as they are (their code for Mixtral).
        floor: never keep fewer experts than this, nor, unless the router stays whole, than top-k.
    """

    name: ClassVar[str] = "m-smoe"
    summary: ClassVar[str] = "merge experts into the most used, grouped by router outputs"
    source: ClassVar[str] = "arXiv 2310.01334"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = ("routing", "router")
    changes: ClassVar[str | None] = "merges experts"

    scope: Literal["layer", "global"] = "layer"
    router: Router = "slice"
    align: Literal["core", "first", "none"] = "core"
    floor: Annotated[int, Field(ge=0)] = 0

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        keep = experts_kept(context.budget, view.shape, self.router, self.floor)
        return self._plan(view, context, keep)

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        """Decide about all layers; with ``scope="global"`` they compete for the groups."""
        if self.scope == "layer":
            return super().plan_model(views, context)
        plain = replace(context.budget, multiple_of=1)  # layers are rounded when all is ranked
        total, free, ranked = 0, 0, []
        least: dict[int, int] = {}
        for view in views:
            shape, layer = view.shape, view.shape.layer
            total += experts_kept(plain, shape, self.router, self.floor)
            least[layer] = least_kept(free_shape(shape, self.router), max(1, self.floor))
            usage = _usage(view.need().part(Routing).count_E)
            order = sorted(range(shape.experts), key=lambda e: (-usage[e], e))
            usage[order[0]] = 1.0
            ranked += [(usage[e], -layer, -e) for e in order[least[layer] :]]
        free = total - sum(least.values())
        for _, layer, _ in sorted(ranked, reverse=True)[: max(0, free)]:
            least[-layer] += 1
        return {
            view.shape.layer: self._plan(
                view, context, self._rounded(least[view.shape.layer], view.shape, context)
            )
            for view in views
        }

    def per_layer(self) -> Method:
        """The same number of groups in every layer."""
        return replace(self, scope="layer")

    def _rounded(self, keep: int, shape: LayerShape, context: Context) -> int:
        groups = free_shape(shape, self.router).groups
        step = torch.tensor([groups, context.budget.multiple_of])
        return next_multiple(keep, int(torch.lcm(step[0], step[1])), shape)

    def _plan(self, view: LayerView, context: Context, keep: int) -> LayerPlan:
        shape = free_shape(view.shape, self.router)
        count_E = view.need().part(Routing).count_E
        counts: list[int] = count_E.tolist()
        usage = _usage(count_E)
        pinned, forbidden = protected(context, shape.layer)
        cores = choose_cores(usage, counts, keep, shape, pinned, forbidden)
        similarity_EE = (1 + gram_cosines(view.need().part(RouterGram).gram_EE)) / 2
        if len(cores) < shape.experts and not bool(torch.isfinite(similarity_EE).all()):
            context.warn(
                f"layer {shape.layer}: the router gave no output, or no finite one, for some "
                "experts: they join the first core"
            )
        groups = Groups.weighted(join_most_similar(similarity_EE, cores, shape), count_E)
        how: Align = "none" if self.align == "none" else "weights"
        order = align_groups(groups, view, how, 0 if self.align == "first" else None)
        return merged_plan(view.shape, groups, order, self.router, {"usage": usage})


def _usage(count_E: Tensor) -> list[float]:
    """Share of the routed slots that each expert served."""
    usage: list[float] = (count_E.double() / count_E.sum().clamp(min=1)).tolist()
    return usage
