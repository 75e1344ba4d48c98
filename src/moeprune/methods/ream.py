"""REAM (arXiv 2604.04356): merge the least salient experts into the most salient ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Outputs, RouterGram, Routing, TokenSample
from moeprune.core.alignment import Align, align_groups
from moeprune.core.budget import Budget
from moeprune.core.merging import Groups, Merger, join_most_similar, merged_plan, untouched
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.cosine import gram_cosines, output_cosines
from moeprune.core.plan import LayerPlan
from moeprune.core.ranking import Rating
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class REAM(Merger):
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
    """

    name: ClassVar[str] = "ream"
    summary: ClassVar[str] = "merge experts into those with the highest gate x output norm"
    source: ClassVar[str] = "arXiv 2604.04356"
    needs: ClassVar[tuple[str, ...]] = ("routing", "outputs", "router", "sample")

    propagate: Literal["merged", "dense"] = "merged"
    similarity: Literal["outputs+router", "outputs", "router"] = "outputs+router"
    grouping: Literal["absorb", "nearest"] = "absorb"
    group_size: Annotated[int, Field(ge=2)] = 16
    align: Align = "both"

    @property
    def sequential(self) -> bool:
        """Whether a layer must be edited before the next one is observed."""
        return self.propagate == "merged"

    def accept(self, budget: Budget) -> None:
        """Raise ``BudgetError`` if this method does not understand ``budget``."""
        if self.sequential and self.scope != "layer":
            raise BudgetError(
                f"{self.name} merges a layer before it sees the next: they cannot compete",
                "use -o propagate=dense, or -o scope=layer",
            )
        super().accept(budget)

    def rate(self, view: LayerView, context: Context) -> Rating:
        """Saliencies; 0 for experts that saw no token."""
        outputs, counts = view.need().part(Outputs), view.need().part(Routing).count_E
        saliency_E = outputs.gate_norm_E / outputs.count_E.clamp(min=1)
        return Rating("saliency", saliency_E.tolist(), counts.tolist())

    def build(self, view: LayerView, rating: Rating, chosen: list[int]) -> LayerPlan:
        """The edit of a layer in which ``chosen`` are absorbed by the others."""
        if not chosen:
            return untouched(view.shape, rating.as_scores())
        shape = self.routed_shape(view.shape)
        core_of = self._join(self._similarity(view), chosen, rating.scores, shape)
        groups = Groups.weighted(core_of, torch.tensor(rating.scores))
        order = align_groups(groups, view, self.align)
        return merged_plan(view.shape, groups, order, self.router, rating.as_scores())

    def _similarity(self, view: LayerView) -> Tensor:
        """Similarity of experts, float64 [E, E]; not a number where outputs are not finite."""
        E = view.shape.experts
        total_EE = torch.zeros(E, E, dtype=torch.float64)
        if "router" in self.similarity:
            cosine_EE = gram_cosines(view.need().part(RouterGram).gram_EE).cpu()
            total_EE += torch.nan_to_num(cosine_EE, nan=0.0)  # a router without output says nothing
        if "outputs" in self.similarity:
            x_SH = view.need().part(TokenSample).x_SH
            total_EE += output_cosines(view.need_block().outputs, E, x_SH)
        return total_EE

    def _join(
        self, similarity_EE: Tensor, chosen: list[int], saliency: list[float], shape: LayerShape
    ) -> tuple[int, ...]:
        cores = [e for e in range(shape.experts) if e not in chosen]
        nearest = join_most_similar(similarity_EE, cores, shape)
        if self.grouping == "nearest":
            return nearest
        core_of = list(nearest)  # who is left when all groups are full joins the most similar core
        free = list(chosen)
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
