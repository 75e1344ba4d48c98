"""Methods that delete the experts with the lowest scores, and their router rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from moeprune.core.budget import Budget, least_kept, removable
from moeprune.core.method import LayerView
from moeprune.core.plan import LayerPlan
from moeprune.core.ranking import Ranking, Rating
from moeprune.core.shapes import LayerShape


@dataclass(frozen=True)
class Dropper(Ranking):
    """Base of the methods that delete experts by one score; a subclass says how it is computed.

    Options:
        floor: never keep fewer experts in a layer than this, nor fewer than top-k.
    """

    floor: Annotated[int, Field(ge=0)] = 0

    def build(self, view: LayerView, rating: Rating, chosen: list[int]) -> LayerPlan:
        """The edit of a layer that deletes ``chosen``."""
        E = view.shape.experts
        return LayerPlan(
            layer=view.shape.layer,
            experts=E,
            keep=tuple(e for e in range(E) if e not in chosen),
            scores=rating.as_scores(),
        )

    def least(self, shape: LayerShape, multiple_of: int) -> int:
        """What the router needs, and the user's floor."""
        return least_kept(shape, self.floor, multiple_of)

    def quota(self, shape: LayerShape, budget: Budget) -> int:
        """How many experts go from every layer.

        Raises:
            BudgetError: fewer would remain than the router needs.
        """
        return removable(budget, shape, self.floor)
