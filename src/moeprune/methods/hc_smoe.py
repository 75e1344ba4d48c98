"""HC-SMoE (arXiv 2410.08589): cluster experts by their mean outputs, then merge each cluster."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Routing, TokenSample
from moeprune.core.alignment import Align, align_groups
from moeprune.core.merging import Groups, Router, free_shape, mergeable, merged_plan, untouched
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.linkage import Linkage, clusters
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class HCSMoE(Method):
    """Hierarchical clustering of experts on what they compute, whoever the router sends to them.

    Every expert runs on every sampled token; ``o_e`` is its mean output. The two clusters of
    experts that are closest (Euclidean distance of the o_e, linked as ``linkage`` says) are united
    until the budget is met. A cluster becomes the average of its experts, weighted by how often
    each was selected; its core, whose id and router row stay, is the expert closest to the
    mean of the o_e, weighted by use. An expert that saw no token gives its cluster nothing, unless
    nobody in it saw one. With routing groups, each is clustered by itself.

    Options:
        linkage: distance of clusters: ``average``, ``single``, ``complete``.
        merge: ``frequency`` weights experts by the tokens they saw, ``average`` equally.
        align: ``none`` averages neurons as they stand (the source); ``weights``, ``activations``
            or ``both`` put them in the core's order first.
        router: ``slice`` keeps the cores' rows, ``mean`` averages the rows of a cluster;
            ``original`` (the source) keeps all rows: such checkpoints need the code that travels
            with them.
        floor: never keep fewer experts than this, nor, unless the router stays whole, than top-k.
    """

    name: ClassVar[str] = "hc-smoe"
    summary: ClassVar[str] = "merge clusters of experts with similar mean outputs"
    source: ClassVar[str] = "arXiv 2410.08589"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = ("routing", "sample")
    changes: ClassVar[str | None] = "merges experts"

    linkage: Linkage = "average"
    merge: Literal["frequency", "average"] = "frequency"
    align: Align = "none"
    router: Router = "slice"
    floor: Annotated[int, Field(ge=0)] = 0

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape = free_shape(view.shape, self.router)
        keep = shape.experts - mergeable(context.budget, shape, self.floor)
        count_E = view.need().part(Routing).count_E
        scores = {"tokens": tuple(map(float, count_E.tolist()))}
        if keep == shape.experts:
            return untouched(view.shape, scores)
        mean_EH = self._mean_outputs(view, context)
        core_of = self._core_of(mean_EH, count_E.cpu(), keep, shape, context)
        use_E = count_E if self.merge == "frequency" else torch.ones_like(count_E)
        groups = Groups.weighted(core_of, use_E)
        order = align_groups(groups, view, self.align)
        return merged_plan(view.shape, groups, order, self.router, scores)

    def _mean_outputs(self, view: LayerView, context: Context) -> Tensor:
        """Mean output of every expert over the sampled tokens, float64 [E, H]."""
        key = (self.name, view.shape.layer)
        if key not in context.memo:
            x_SH, block = view.need().part(TokenSample).x_SH, view.need_block()
            experts = range(view.shape.experts)
            mean_EH = torch.stack([block.outputs(e, x_SH).double().mean(dim=0) for e in experts])
            context.memo[key] = mean_EH.cpu()
        found: Tensor = context.memo[key]
        bad = torch.nonzero(~torch.isfinite(found).all(dim=1)).reshape(-1).tolist()
        if bad:
            context.warn(
                f"layer {view.shape.layer}: experts {bad} gave outputs that are not finite on "
                "the sampled tokens: they are clustered last"
            )
        return found

    def _core_of(
        self,
        mean_EH: Tensor,
        count_E: Tensor,
        keep: int,
        shape: LayerShape,
        context: Context,
    ) -> list[int]:
        """For each expert the core of its cluster, ``keep`` cores in all."""
        pinned, forbidden = context.pinned_in(shape.layer), context.forbidden_in(shape.layer)
        distance_EE = torch.cdist(mean_EH, mean_EH, compute_mode="donot_use_mm_for_euclid_dist")
        distance_EE = torch.nan_to_num((distance_EE + distance_EE.T) / 2, nan=torch.inf)
        core_of = [-1] * shape.experts
        for group in range(shape.groups):
            own = [e for e in range(shape.experts) if shape.group_of(e) == group]
            free = [e for e in own if e not in forbidden]
            fixed = [free.index(e) for e in free if e in pinned]
            _check(len(free), len(fixed), keep // shape.groups, shape)
            near = distance_EE[free][:, free].numpy()
            found = clusters(near, keep // shape.groups, self.linkage, fixed)
            named = [[free[i] for i in cluster] for cluster in found]
            for cluster in named:
                core = _central(cluster, mean_EH, count_E, pinned)
                for e in cluster:
                    core_of[e] = core
            for e in sorted(set(own) & set(forbidden)):
                core_of[e] = core_of[self._closest(e, named, distance_EE)]
        return core_of

    def _closest(self, expert: int, named: list[list[int]], distance_EE: Tensor) -> int:
        """A member of the cluster to which an expert that cannot be a core is closest."""
        far = []
        for cluster in named:
            to = distance_EE[expert, cluster]
            joined = {"average": to.mean(), "single": to.min(), "complete": to.max()}
            far.append(float(joined[self.linkage]))
        return named[far.index(min(far))][0]


def _central(cluster: list[int], mean_EH: Tensor, count_E: Tensor, pinned: Collection[int]) -> int:
    """The pinned expert of a cluster, or the one closest to its mean, weighted by use.

    Of equals the first: of two experts that are used equally, both are as close.
    """
    for e in cluster:
        if e in pinned:
            return e
    use_c = count_E[cluster].double()
    use_c = use_c if bool(use_c.any()) else torch.ones_like(use_c)
    centre_H = (use_c[:, None] * mean_EH[cluster]).sum(dim=0) / use_c.sum()
    far_c = torch.nan_to_num((mean_EH[cluster] - centre_H).norm(dim=1), nan=torch.inf)
    near_c = far_c <= far_c.min() * (1 + 1e-9)
    return cluster[int(near_c.double().numpy().argmax())]


def _check(free: int, pinned: int, keep: int, shape: LayerShape) -> None:
    if not pinned <= keep <= free:
        what = f"{pinned} are pinned or protected" if keep < pinned else f"only {free} may"
        raise BudgetError(
            f"layer {shape.layer}: {keep} experts are to stay"
            + (" in a routing group" if shape.groups > 1 else "")
            + f", but {what}",
            "change the budget, or pin and forbid fewer experts",
        )
