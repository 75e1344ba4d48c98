"""Methods that put something small in the place of the experts with the lowest scores."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from moeprune.core.budget import Budget, experts_to_remove
from moeprune.core.method import LayerView
from moeprune.core.plan import LayerPlan
from moeprune.core.ranking import Ranking, Rating
from moeprune.core.shapes import LayerShape


@dataclass(frozen=True)
class Replacer(Ranking):
    """Base of the methods that replace experts by constants ("novices"), arXiv 2507.00390.

    The router stays and selects among all experts, so neither top-k nor routing groups set a floor.
    Where layers compete, one expert of each stays unless all go: a checkpoint needs one with
    weights in every layer.
    """

    changes: ClassVar[str | None] = "replaces experts by constants"
    gone: ClassVar[str] = "replaced"
    may_empty: ClassVar[bool] = True

    @abstractmethod
    def novices(self, view: LayerView, chosen: list[int]) -> Tensor:
        """The constants of ``chosen``, [chosen, H]."""

    def build(self, view: LayerView, rating: Rating, chosen: list[int]) -> LayerPlan:
        """The edit of a layer that replaces ``chosen``."""
        values_NH = self.novices(view, chosen).float()
        broken_N = ~values_NH.isfinite().all(dim=1)
        values_NH[broken_N] = 0.0
        unseen = [expert for expert in chosen if not rating.counts[expert]]
        broken = [chosen[row] for row in broken_N.nonzero().reshape(-1).tolist()]
        notes = tuple(
            f"experts {experts} {why}: their novices are zero vectors"
            for experts, why in (
                (unseen, "saw no token"),
                (broken, "gave outputs that are not finite"),
            )
            if experts
        )
        return LayerPlan(
            layer=view.shape.layer,
            experts=view.shape.experts,
            keep=tuple(e for e in range(view.shape.experts) if e not in chosen),
            replaced=tuple(chosen),
            scores=rating.as_scores(),
            novices_NH=values_NH if chosen else None,
            notes=notes,
        )

    def routed_shape(self, shape: LayerShape) -> LayerShape:
        """No groups: every expert keeps its place in the router."""
        return replace(shape, groups=1, top_groups=1)

    def least(self, shape: LayerShape, multiple_of: int) -> int:
        """One expert with weights."""
        return 1

    def quota(self, shape: LayerShape, budget: Budget) -> int:
        """How many experts are replaced in every layer."""
        return experts_to_remove(budget, shape)
