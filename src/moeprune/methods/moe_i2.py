"""MoE-I2 (arXiv 2411.01016): uneven layers, subsets by evolution, lower ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moeprune.core.accumulators import Routing
from moeprune.core.allocation import Candidates, by_importance
from moeprune.core.budget import (
    experts_to_remove,
    least_kept,
    next_multiple,
    removable,
    removal_range,
)
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.ranks import shared_ranks
from moeprune.core.ops.reconstruction import Reconstruction
from moeprune.core.ops.subsets import Evolution, evolve
from moeprune.core.plan import LayerPlan
from moeprune.core.replay import NEEDS, alone, choice_of, reconstruction


@dataclass(frozen=True)
class MoEI2(Method):
    """Drops more experts where layers matter less; inside a layer a genetic search chooses.

    The importance of an expert is ``|Z - Z_e|_F``, the change of the layer's output on the sampled
    tokens if it alone goes; of a layer, the sum over its experts. What is kept is shared out in
    proportion to the layers' importance. The experts that go are the best subset that a genetic
    search meets, by the error of the layer's output.

    Options:
        scope: ``importance`` shares the budget out among layers; ``layer`` takes the same number
            from every layer, so that stock classes open the result.
        relative: divide a layer's importance by the norm of its output, since outputs grow with
            depth.
        population: subsets alive at once in the search.
        iterations: generations of the search.
        candidates: the best subsets of a layer whose errors are noted in the plan.
        rank_ratio: cut the kept experts' matrices to lower ranks, such that two factors of each
            would hold this fraction fewer weights; experts of larger importance keep higher ranks.
            The product is stored, so that neither bytes nor time fall. 0 cuts nothing.
    """

    name: ClassVar[str] = "moe-i2"
    summary: ClassVar[str] = "drop experts by layer importance and genetic search; lower ranks"
    source: ClassVar[str] = "arXiv 2411.01016"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    needs: ClassVar[tuple[str, ...]] = NEEDS

    scope: Literal["importance", "layer"] = "importance"
    relative: bool = False
    population: Annotated[int, Field(ge=2, le=100_000)] = 100
    iterations: Annotated[int, Field(ge=0, le=100_000)] = 50
    candidates: Annotated[int, Field(ge=1, le=1000)] = 3
    rank_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0

    def per_layer(self) -> MoEI2:
        """The same search with the same number from every layer."""
        return replace(self, scope="layer")

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer by itself."""
        error = reconstruction(view, context)
        remove = removable(context.budget, view.shape)
        return self._plan(view, context, error, remove)

    @property
    def competes(self) -> bool:
        """Whether layers compete; what decides about all in its own way is taken to."""
        return self.scope != "layer" or type(self).plan_model is not MoEI2.plan_model

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        """Decide about all layers; the experts run twice, as no layer's outputs are kept."""
        if self.scope == "layer":
            return super().plan_model(views, context)
        layers, remove = [], 0
        asked = replace(context.budget, multiple_of=1)  # layers are rounded when all is shared out
        for view in views:
            layers.append(self._candidate(view, context))
            remove += experts_to_remove(asked, view.shape)
        counts = by_importance(layers, remove)
        plans = {}
        for view in views:
            shape = view.shape
            step = math.lcm(shape.groups, context.budget.multiple_of)
            kept = next_multiple(shape.experts - counts[shape.layer], step, shape)
            error = reconstruction(view, replace(context, warn=lambda text: None))  # warned before
            plans[shape.layer] = self._plan(view, context, error, shape.experts - kept)
        return plans

    def _candidate(self, view: LayerView, context: Context) -> Candidates:
        shape, multiple = view.shape, context.budget.multiple_of
        error = reconstruction(view, context)
        unit = (error.output_norm() or 1.0) if self.relative else 1.0
        pinned, forbidden = context.pinned_in(shape.layer), context.forbidden_in(shape.layer)
        low, high = removal_range(
            shape, least_kept(shape, 0, multiple), multiple, pinned, forbidden
        )
        return Candidates(
            shape.layer,
            [value / unit for value in alone(error)],
            view.need().part(Routing).count_E.tolist(),
            low,
            high,
            pinned=pinned,
            forbidden=forbidden,
        )

    def _plan(
        self, view: LayerView, context: Context, error: Reconstruction, remove: int
    ) -> LayerPlan:
        shape = view.shape
        sizes = Evolution(self.population, self.iterations, self.candidates)
        choice = choice_of(view, context, remove)
        found = evolve(error.losses, choice, sizes, f"{context.seed} {shape.layer}")
        kept = tuple(e for e in range(shape.experts) if e not in found[0].dropped)
        importance = alone(error)
        errors = ", ".join(f"{one.loss:.6g}" for one in found)
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=kept,
            scores={"importance": importance},
            ranks=self._ranks(view, kept, importance),
            notes=(f"errors of the best subsets: {errors}",),
        )

    def _ranks(
        self, view: LayerView, kept: tuple[int, ...], importance: tuple[float, ...]
    ) -> dict[str, tuple[int, ...]]:
        if not self.rank_ratio:
            return {}
        shape = view.shape
        found = {}
        for role in shape.roles:
            sizes = (shape.intermediate, shape.hidden)  # the order does not matter
            shared = shared_ranks([importance[e] for e in kept], *sizes, self.rank_ratio)
            by_expert = dict(zip(kept, shared, strict=True))
            found[role] = tuple(by_expert.get(e, 1) for e in range(shape.experts))
        return found
