"""M-SMoE (arXiv 2310.01334): merge experts into the most used ones that the router treats alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeprune.core.accumulators import RouterGram, Routing
from moeprune.core.alignment import Align, align_groups
from moeprune.core.merging import Groups, Merger, join_most_similar, merged_plan, untouched
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.cosine import gram_cosines
from moeprune.core.plan import LayerPlan
from moeprune.core.ranking import Rating


@dataclass(frozen=True)
class MSMoE(Merger):
    """Groups experts around the most used ones and replaces each group by its weighted average.

    ``usage_e = n_e / sum n``. The experts with the highest usage are cores; every other joins the
    core with the largest ``(1 + cos(z_i, z_j)) / 2``, where z_i are the router's outputs for
    expert i over all calibration tokens. Members are put in their core's order of neurons (the
    permutation with the largest sum of inner products of gate rows, up rows and down columns) and
    averaged with their usages as weights. An expert that saw no token gives its group nothing; a
    group in which nobody saw a token is averaged equally.

    The source keeps all router rows (``router=original``) and has one ranking for all layers
    (``scope=global``), in which the most used expert of each layer counts as 1; the defaults give
    checkpoints that stock classes open.

    Options:
        align: ``core`` aligns members to their core, ``first`` all experts to expert 0 (the
            authors' code), ``none`` averages as they are (their code for Mixtral).
    """

    name: ClassVar[str] = "m-smoe"
    summary: ClassVar[str] = "merge experts into the most used, grouped by router outputs"
    source: ClassVar[str] = "arXiv 2310.01334"
    needs: ClassVar[tuple[str, ...]] = ("routing", "router")

    scope: Literal["layer", "global", "importance"] = "layer"
    normalise: bool = False
    align: Literal["core", "first", "none"] = "core"

    def rate(self, view: LayerView, context: Context) -> Rating:
        """Usages."""
        count_E = view.need().part(Routing).count_E
        usage: list[float] = (count_E.double() / count_E.sum().clamp(min=1)).tolist()
        plain = tuple(usage)
        if self.scope == "global":
            usage[usage.index(max(usage))] = 1.0  # a group in every layer
        return Rating("core_usage", usage, count_E.tolist(), {"usage": plain})

    def build(self, view: LayerView, rating: Rating, chosen: list[int]) -> LayerPlan:
        """The edit of a layer that merges ``chosen`` into the others."""
        if not chosen:
            return untouched(view.shape, rating.as_scores())
        shape = self.routed_shape(view.shape)
        count_E = view.need().part(Routing).count_E
        similarity_EE = (1 + gram_cosines(view.need().part(RouterGram).gram_EE)) / 2
        notes: tuple[str, ...] = ()
        blank = [e for e in range(shape.experts) if not similarity_EE[e, e].isfinite()]
        if blank:
            notes = (f"experts {blank}: no finite router output, their similarity is the lowest",)
        cores = [e for e in range(shape.experts) if e not in chosen]
        groups = Groups.weighted(join_most_similar(similarity_EE, cores, shape), count_E)
        how: Align = "none" if self.align == "none" else "weights"
        order = align_groups(groups, view, how, 0 if self.align == "first" else None)
        return merged_plan(view.shape, groups, order, self.router, rating.as_scores(), notes)
