"""What a user asks for beside a ratio: a size that the result may have, experts that stay or go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moeprune.core.accumulators import Outputs
from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints, Fixed, as_json, check_honoured, together
from moeprune.core.method import Method
from moeprune.core.ops.super_experts import super_experts
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.core.targets import Target
from moeprune.errors import MoepruneError
from moeprune.models.editing import Writing
from moeprune.models.loading import LayeredModel
from moeprune.models.store import StatisticsStore
from moeprune.models.surgery import sizes_of
from moeprune.pipeline.inputs import describe_model

PROTECTION_NEEDS = Outputs.name


def accept(method: Method, budget: Budget | Target, constraints: Constraints) -> None:
    """Raise ``MoepruneError`` if ``method`` cannot do what is asked."""
    if isinstance(budget, Target):
        budget.accept(method)
    else:
        method.accept(budget)
    if constraints and not method.chooses_experts:
        raise MoepruneError(
            f"{method.name} removes no experts: --pin, --forbid and --protect-super mean nothing"
        )
    if constraints.protect_super and method.sequential:
        raise MoepruneError(
            f"{method.name} edits each layer before it observes the next, but super experts are "
            "found in statistics of the whole model",
            "leave out --protect-super, and pin them by hand (--pin)",
        )


@dataclass(frozen=True)
class FixedExperts:
    """Experts whose fate is decided before a method sees them, by layer.

    Attributes:
        pinned: stay, by the user's wish.
        forbidden: do not stay, by the user's wish.
        protected: super experts that stay.
    """

    pinned: Fixed = field(default_factory=dict)
    forbidden: Fixed = field(default_factory=dict)
    protected: Fixed = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        constraints: Constraints,
        shapes: Mapping[int, LayerShape],
        store: StatisticsStore | None,
    ) -> FixedExperts:
        """What ``constraints`` mean for a model.

        Raises:
            MoepruneError: they name what does not exist, contradict each other, or the statistics
                that show super experts are missing.
        """
        pinned, forbidden = constraints.resolve(shapes)
        protected: Fixed = {}
        if constraints.protect_super:
            if store is None:
                raise MoepruneError(
                    "super experts are found in statistics, and there are none",
                    "run moeprune calibrate first and give its output as --statistics",
                )
            protected = super_experts(
                {index: store.layer(index).part(Outputs).max_E.tolist() for index in shapes}
            )
        for layer, experts in sorted(protected.items()):
            both = sorted(experts & forbidden.get(layer, frozenset()))
            if both:
                raise MoepruneError(
                    f"layer {layer}: expert {both[0]} is forbidden, but a protected super expert",
                    "leave out --protect-super, or do not forbid it",
                )
        return cls(pinned, forbidden, protected)

    @property
    def staying(self) -> Fixed:
        """All that stay."""
        return together(self.pinned, self.protected)

    def heeded(self, layers: Mapping[int, LayerPlan], method: str) -> dict[int, LayerPlan]:
        """``layers`` with a note of what was protected in each.

        Raises:
            MoepruneError: the method did not heed them.
        """
        check_honoured(layers, self.staying, self.forbidden, method)
        return {
            index: replace(layer, notes=(*layer.notes, *self._note(index)))
            for index, layer in layers.items()
        }

    def _note(self, layer: int) -> tuple[str, ...]:
        experts = sorted(self.protected.get(layer, ()))
        return (f"experts {experts} are super experts: they stay",) if experts else ()

    def to_json(self, protect: bool) -> dict[str, Any]:
        """As it stands in a plan, beside the budget; ``protect``: whether protection was asked."""
        found = {"pinned": self.pinned, "forbidden": self.forbidden, "protected": self.protected}
        return {
            name: as_json(fixed)
            for name, fixed in found.items()
            if fixed or (protect and name == "protected")
        }


def resolve(
    target: Target,
    method: Method,
    model: LayeredModel,
    writing: Writing,
    decide: Callable[[Budget], Mapping[int, LayerPlan]],
) -> tuple[Budget, dict[str, int]]:
    """The least removal whose checkpoint fits ``target``, and what a plan says about it.

    ``decide`` makes the layers of a plan; it is asked for the budgets of a bisection, and sizes
    are those of the tensors that would be written.

    Raises:
        BudgetError: the target cannot be reached.
    """
    shapes = [site.shape for _, site in sorted(model.sites.items())]
    described = describe_model(model, "")

    def size_of(budget: Budget) -> int:
        plan = Plan(decide(budget), method.name, {}, {}, described, {}, 0)
        sizes = sizes_of(model, plan, writing)
        return sizes.parameters[1] if target.bytes is None else sizes.bytes[1]

    budget, size = target.search(method, target.candidates(method, shapes), size_of)
    name = target.option.replace("-", "_")
    return budget, {name: target.size, target.unit: size}
