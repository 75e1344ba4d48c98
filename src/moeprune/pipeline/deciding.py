"""A method decides: from statistics, or walking the model and editing layer after layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moeprune.core.budget import Budget, next_multiple
from moeprune.core.method import Context, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError
from moeprune.models import data
from moeprune.models.block import LoadedBlock
from moeprune.models.kept_statistics import KeptStatistics
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import edit_in_memory
from moeprune.models.sites import MoESite
from moeprune.models.walk import Walk
from moeprune.models.walk_state import WalkStates
from moeprune.pipeline.calibration import observe
from moeprune.pipeline.inputs import Compute, Progress, Text, read_calibration
from moeprune.pipeline.kept_plan import KeptLayers
from moeprune.pipeline.spreading import check_agreement, plan_together
from moeprune.pipeline.views import Views
from moeprune.work import WorkFolder


def _nothing(shape: LayerShape) -> None:
    """What is known of the unedited model by a method that does not compare."""


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
        folder: where what was decided is kept; None keeps nothing.
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
    folder: WorkFolder | None = None

    @cached_property
    def domains(self) -> list[data.Domain]:
        """What a sequential method walks over."""
        if self.text is None:
            raise MoepruneError(
                f"{self.method.name} edits each layer before it observes the next, so it walks the "
                "model",
                f"give calibration text (--data), or -o {self.method.unedited} with --statistics",
            )
        return read_calibration(self.model.checkpoint, self.text)

    def layers(self, budget: Budget, warn: Callable[[str], None]) -> dict[int, LayerPlan]:
        """What happens to each layer at that budget."""
        context = replace(self.context, budget=budget, warn=warn)
        if self.method.sequential:
            return self._sequentially(context)
        ranks = self.compute.ranks
        kept = KeptLayers(self.folder, self.model, budget, ranks)
        layers = plan_together(self.method, self.views, context, ranks, kept)
        return self._equalised(layers, context) if self.uniform else layers

    def _sequentially(self, context: Context) -> dict[int, LayerPlan]:
        method, model, domains = self.method, self.model, self.domains
        kept = KeptLayers(self.folder, model, context.budget, self.compute.ranks)
        states, layers, said = kept.resume()
        walks: list[Walk] = []
        dense: Callable[[LayerShape], LayerStatistics | None] = _nothing

        def visit(site: MoESite, statistics: LayerStatistics) -> bool:
            block = LoadedBlock(model, site)  # the walk has the layer in memory
            view = replace(
                self.views.view(site, statistics),
                block=lambda: block,
                again=lambda needs, limit: walks[0].observe_parts(site, needs, limit),
                dense=dense(site.shape),
            )
            warnings: list[str] = []
            layer = method.plan_layer(view, replace(context, warn=warnings.append))
            check_agreement(layer, self.compute.ranks)
            layers[site.shape.layer] = layer
            kept.save(layer, warnings)
            said.extend(warnings)
            edit_in_memory(model, site, layer)
            return True

        if states is None or not states.finished:
            if method.compares:
                dense = self._unedited()
            observe(
                model, domains, self.compute, method.observes, visit, self.progress,
                opened=walks.append, states=states,
            )  # fmt: skip
        for text in said:
            context.warn(text)
        assert self.text is not None  # or there were no domains
        described = {**data.describe(domains), "seed": self.text.seed}
        self.facts = {"data": described, "dtype": str(model.dtype).removeprefix("torch.")}
        return layers

    def _unedited(self) -> Callable[[LayerShape], LayerStatistics]:
        """What a sequential method wants to know of the model as it was.

        All layers of it are in memory only where there is no folder for them.
        """
        model, found = self.model, dict[int, LayerStatistics]()
        kept = states = None
        if self.folder is not None:
            kept = KeptStatistics(self.folder, "unedited")
            states = WalkStates(self.folder, model, "unedited-walk", ranks=self.compute.ranks)
            has = kept.has
            states.resume(lambda i: i not in model.sites or has(i), "the walk before planning")

        def visit(site: MoESite, statistics: LayerStatistics) -> bool:
            if kept is None:
                found[site.shape.layer] = statistics
            else:
                kept.save(statistics)
            return False

        if states is None or not states.finished:
            observe(
                model, self.domains, self.compute, self.method.compares, visit, self.progress,
                states=states,
            )  # fmt: skip
        if states is not None:
            states.clear()

        def load(shape: LayerShape) -> LayerStatistics:
            return found[shape.layer] if kept is None else kept.load(shape, model.device)

        return load

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
