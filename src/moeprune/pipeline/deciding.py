"""A method decides: from statistics, or walking the model and editing layer after layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moeprune.core.budget import Budget, next_multiple
from moeprune.core.method import Context, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError
from moeprune.models import data
from moeprune.models.block import LoadedBlock
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import edit_in_memory
from moeprune.models.sites import MoESite
from moeprune.models.walk import Walk
from moeprune.pipeline.calibration import observe
from moeprune.pipeline.inputs import Compute, Progress, Text, read_calibration
from moeprune.pipeline.spreading import check_agreement, plan_together
from moeprune.pipeline.views import Views


@dataclass
class Decider:
    """A method on one model; it may be asked with several budgets.

    Attributes:
        method: what decides.
        model: what it decides about.
        views: what it sees.
        context: of the run; its budget and its ``warn`` are given with each question.
        text: what a sequential method walks over; None if there is none.
        compute, progress: as in the stages.
        uniform: make every layer keep the same number.
        facts: of what was read; a sequential method's are known once it has walked.
    """

    method: Method
    model: LayeredModel
    views: Views
    context: Context
    text: Text | None
    compute: Compute
    progress: Progress
    uniform: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)

    def layers(self, budget: Budget, warn: Callable[[str], None]) -> dict[int, LayerPlan]:
        """What happens to each layer at that budget."""
        context = replace(self.context, budget=budget, warn=warn)
        if self.method.sequential:
            return self._sequentially(context)
        layers = plan_together(self.method, self.views, context, self.compute.ranks)
        return self._equalised(layers, context) if self.uniform else layers

    def _sequentially(self, context: Context) -> dict[int, LayerPlan]:
        method, model = self.method, self.model
        if self.text is None:
            raise MoepruneError(
                f"{method.name} edits each layer before it observes the next, so it walks the "
                "model",
                f"give calibration text (--data), or -o {method.unedited} with --statistics",
            )
        domains = read_calibration(model.checkpoint, self.text)
        layers: dict[int, LayerPlan] = {}
        walks: list[Walk] = []
        dense: dict[int, LayerStatistics] = {}

        def keep(site: MoESite, statistics: LayerStatistics) -> bool:
            dense[site.shape.layer] = statistics
            return False

        def visit(site: MoESite, statistics: LayerStatistics) -> bool:
            block = LoadedBlock(model, site)  # the walk has the layer in memory
            view = replace(
                self.views.view(site, statistics),
                block=lambda: block,
                again=lambda needs, limit: walks[0].observe_parts(site, needs, limit),
                dense=dense.get(site.shape.layer),
            )
            layer = method.plan_layer(view, context)
            check_agreement(layer, self.compute.ranks)
            layers[site.shape.layer] = layer
            edit_in_memory(model, site, layer)
            return True

        if method.compares:
            observe(model, domains, self.compute, method.compares, keep, self.progress)
        observe(
            model, domains, self.compute, method.observes, visit, self.progress,
            opened=walks.append,
        )  # fmt: skip
        described = {**data.describe(domains), "seed": self.text.seed}
        self.facts = {"data": described, "dtype": str(model.dtype).removeprefix("torch.")}
        return layers

    def _equalised(self, layers: dict[int, LayerPlan], context: Context) -> dict[int, LayerPlan]:
        """``layers``, or if they keep different numbers of experts, those of their mean."""
        counts = [len(layer.keep) for layer in layers.values()]
        if len(set(counts)) == 1:
            return layers
        shape = min(self.views.shapes, key=lambda shape: shape.experts)
        step = math.lcm(shape.groups, context.budget.multiple_of)
        keep = next_multiple(math.ceil(sum(counts) / len(counts)), step, shape)
        context.warn(
            f"{context.budget} keeps between {min(counts)} and {max(counts)} experts per layer; "
            f"made uniform: {keep} in every layer"
        )
        budget = Budget(keep=keep, multiple_of=context.budget.multiple_of)
        context = replace(context, budget=budget)
        return plan_together(self.method.per_layer(), self.views, context, self.compute.ranks)
