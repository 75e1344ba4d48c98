"""REAM (arXiv 2604.04356): merge the least salient experts into the most salient ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Outputs, RouterGram, Routing, TokenSample
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
from moeprune.core.ops.cosine import gram_cosines, output_cosines
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape


@dataclass(frozen=True)
class REAM(Method):
    """Experts with the highest saliency absorb the others; later layers see what came of it.

    ``saliency_e = mean g |f_e(x)|`` over the tokens routed to e (REAP, arXiv 2510.13999). The
    experts with the highest are cores. Similarity is the mean over sampled tokens of the cosine of
    two experts' outputs, every expert run on every token, plus the cosine of the router's outputs
    for them over all tokens. In order of saliency each core absorbs the most similar experts that
    are still free, until its group has ``group_size``; so most groups are a core alone. A group
    becomes the average of its experts, weighted by saliency, in the core's order of neurons. An
    expert that saw no token has saliency 0 and gives its group nothing.

    Options:
        propagate: ``merged`` merges a layer before the next one is observed; ``dense`` decides
            about all layers from one pass, so that statistics on disk are enough.
        similarity: ``outputs+router``, or one of both.
        grouping: ``absorb`` as above; ``nearest`` lets each expert join the most similar core.
        group_size: the most experts in a group, for ``absorb``.
        align: ``both`` compares neurons by weights and by activations, ``weights`` and
            ``activations`` by one, ``none`` averages them as they stand.
        router: ``slice`` keeps the cores' rows, ``mean`` averages the rows of a group,
            ``original`` keeps all rows: such checkpoints need the code that travels with them.
        floor: never keep fewer experts than this, nor, unless the router stays whole, than top-k.
    """

    name: ClassVar[str] = "ream"
    summary: ClassVar[str] = "merge experts into those with the highest gate x output norm"
    source: ClassVar[str] = "arXiv 2604.04356"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = ("routing", "outputs", "router", "sample")
    changes: ClassVar[str | None] = "merges experts"

    propagate: Literal["merged", "dense"] = "merged"
    similarity: Literal["outputs+router", "outputs", "router"] = "outputs+router"
    grouping: Literal["absorb", "nearest"] = "absorb"
    group_size: Annotated[int, Field(ge=2)] = 16
    align: Align = "both"
    router: Router = "slice"
    floor: Annotated[int, Field(ge=0)] = 0

    @property
    def sequential(self) -> bool:
        """Whether a layer must be edited before the next one is observed."""
        return self.propagate == "merged"

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape = free_shape(view.shape, self.router)
        keep = experts_kept(context.budget, view.shape, self.router, self.floor)
        outputs = view.need().part(Outputs)
        counts: list[int] = view.need().part(Routing).count_E.tolist()
        saliency_E = (outputs.gate_norm_E / outputs.count_E.clamp(min=1)).cpu()
        saliency: list[float] = saliency_E.tolist()
        bad = [e for e, s in enumerate(saliency) if math.isnan(s)]
        if bad:
            context.warn(
                f"layer {shape.layer}: experts {bad} gave outputs that are not finite: they are "
                "absorbed first and give their groups nothing"
            )
        pinned, forbidden = protected(context, shape.layer)
        cores = choose_cores(saliency, counts, keep, shape, pinned, forbidden)
        core_of: Sequence[int] = range(shape.experts)
        if len(cores) < shape.experts:
            core_of = self._join(self._similarity(view, context), cores, saliency, shape)
        groups = Groups.weighted(core_of, saliency_E)
        order = align_groups(groups, view, self.align)
        return merged_plan(view.shape, groups, order, self.router, {"saliency": saliency})

    def _similarity(self, view: LayerView, context: Context) -> Tensor:
        """Similarity of experts, float64 [E, E]; not a number where outputs are not finite."""
        key, E = (self.name, view.shape.layer), view.shape.experts
        total_EE = torch.zeros(E, E, dtype=torch.float64)
        if "router" in self.similarity:
            cosine_EE = gram_cosines(view.need().part(RouterGram).gram_EE).cpu()
            total_EE += torch.nan_to_num(cosine_EE, nan=0.0)  # a router without output says nothing
        if "outputs" in self.similarity:
            # in a walk every plan sees other tokens
            known = None if self.sequential else context.memo.get(key)
            if known is None:
                x_SH = view.need().part(TokenSample).x_SH
                known = output_cosines(view.need_block().outputs, E, x_SH)
                context.memo[key] = known
            total_EE += known
        return total_EE

    def _join(
        self, similarity_EE: Tensor, cores: list[int], saliency: list[float], shape: LayerShape
    ) -> tuple[int, ...]:
        nearest = join_most_similar(similarity_EE, cores, shape)
        if self.grouping == "nearest":
            return nearest
        core_of = list(nearest)  # who is left when all groups are full joins the most similar core
        free = [e for e in range(shape.experts) if e not in cores]
        similarity = torch.nan_to_num(similarity_EE, nan=-torch.inf).tolist()
        for core in sorted(cores, key=lambda c: (-_number(saliency[c]), c)):
            near = [e for e in free if shape.group_of(e) == shape.group_of(core)]
            near.sort(key=lambda e, row=similarity[core]: (-row[e], e))  # type: ignore[misc]
            for e in near[: self.group_size - 1]:
                core_of[e] = core
                free.remove(e)
        return tuple(core_of)


def _number(value: float) -> float:
    return -math.inf if math.isnan(value) else value
