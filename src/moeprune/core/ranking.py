"""Methods that give every expert one score and take away the lowest: what they have in common.

A subclass says how an expert is scored (``rate``) and what becomes of the chosen (``build``). This
module chooses: exact numbers, floors, routing groups, multiples, pinned and forbidden experts, NaN,
and layers that compete. One set of scores gives nested plans for increasing ratios.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from moeprune.core.allocation import Candidates, by_importance, by_score
from moeprune.core.budget import (
    Budget,
    experts_to_remove,
    lowest,
    next_multiple,
    removal_range,
)
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class Rating:
    """The scores of one layer's experts.

    Attributes:
        name: what the score is called in a plan.
        scores: one per expert; the lowest go. NaN where outputs were not finite.
        counts: tokens behind each score; of equal scores the one with fewer tokens goes.
        more: other scores that a reader of the plan may want.
    """

    name: str
    scores: list[float]
    counts: list[int]
    more: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    def as_scores(self) -> dict[str, tuple[float | None, ...]]:
        """As they stand in a plan."""
        return {self.name: tuple(self.scores), **self.more}


@dataclass(frozen=True)
class Ranking(Method):
    """Base of the methods that rank experts by one score.

    Options:
        scope: ``layer`` takes the same number from every layer. ``global`` takes the lowest scores
            of the whole model. ``importance`` shares out what is kept in proportion to the layers'
            summed scores, and ranks inside a layer.
        normalise: with ``scope=global``, divide a score by the mean of its layer.
    """

    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    gone: ClassVar[str] = "dropped"
    may_empty: ClassVar[bool] = False

    scope: Literal["layer", "global", "importance"] = "layer"
    normalise: bool = True

    @abstractmethod
    def rate(self, view: LayerView, context: Context) -> Rating:
        """The scores of a layer's experts."""

    @abstractmethod
    def build(self, view: LayerView, rating: Rating, chosen: list[int]) -> LayerPlan:
        """The edit of a layer that takes ``chosen`` (ascending) away."""

    def routed_shape(self, shape: LayerShape) -> LayerShape:
        """The shape as far as its router restricts the choice."""
        return shape

    @abstractmethod
    def least(self, shape: LayerShape, multiple_of: int) -> int:
        """The fewest experts that stay in a layer that competes with others.

        With ``may_empty`` they go as well once no other layer has more than its fewest.
        """

    @abstractmethod
    def quota(self, shape: LayerShape, budget: Budget) -> int:
        """How many experts go from a layer with ``scope=layer``."""

    def accept(self, budget: Budget) -> None:
        """Raise ``BudgetError`` if this method does not understand ``budget``."""
        if budget.kind == "total" and self.scope != "layer":
            return
        super().accept(budget)

    def per_layer(self) -> Ranking:
        """The same ranking with the same number from every layer."""
        return replace(self, scope="layer")

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer from its own scores."""
        rating = self._rated(view, context)
        shape = self.routed_shape(view.shape)
        remove = self.quota(shape, context.budget)
        return self.build(view, rating, self._chosen(rating, remove, shape, context))

    @property
    def competes(self) -> bool:
        """Whether layers compete; what decides about all in its own way is taken to."""
        return self.scope != "layer" or type(self).plan_model is not Ranking.plan_model

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        """Decide about all layers; unless ``scope="layer"`` they compete."""
        if self.scope == "layer":
            return super().plan_model(views, context)
        ratings: dict[int, Rating] = {}
        layers, shapes = [], {}
        for view in views:
            shape = self.routed_shape(view.shape)
            rating = self._rated(view, context)
            ratings[shape.layer], shapes[shape.layer] = rating, shape
            layers.append(self._candidates(shape, rating, context))
        remove = self._total(shapes.values(), context.budget)
        if self.scope == "global":
            counts = by_score(layers, remove, self.normalise)
        else:
            counts = by_importance(layers, remove)
        plans = {}
        for view in views:
            index = view.shape.layer
            shape = shapes[index]
            kept = next_multiple(shape.experts - counts[index], self._step(shape, context), shape)
            chosen = self._chosen(ratings[index], shape.experts - kept, shape, context)
            plans[index] = self.build(view, ratings[index], chosen)
        return plans

    def _rated(self, view: LayerView, context: Context) -> Rating:
        rating = self.rate(view, context)
        unknown = [expert for expert, score in enumerate(rating.scores) if not math.isfinite(score)]
        if unknown:
            context.warn(
                f"layer {view.shape.layer}: experts {unknown} gave outputs that are not finite; "
                f"they are {self.gone} first"
            )
            scores = [score if math.isfinite(score) else math.nan for score in rating.scores]
            rating = replace(rating, scores=scores)
        return rating

    def _candidates(self, shape: LayerShape, rating: Rating, context: Context) -> Candidates:
        pinned, forbidden = context.pinned_in(shape.layer), context.forbidden_in(shape.layer)
        multiple = context.budget.multiple_of
        least = self.least(shape, multiple)
        low, high = removal_range(shape, least, multiple, pinned, forbidden)
        soft = shape.experts - high if self.may_empty and not pinned else 0
        return Candidates(
            shape.layer, rating.scores, rating.counts, low, high, soft, pinned, forbidden
        )

    @staticmethod
    def _total(shapes: Iterable[LayerShape], budget: Budget) -> int:
        """Experts to remove from all layers together."""
        shapes = list(shapes)
        if budget.total is None:
            asked = replace(budget, multiple_of=1)  # layers are rounded when all is ranked
            return sum(experts_to_remove(asked, shape) for shape in shapes)
        every = sum(shape.experts for shape in shapes)
        if not 0 <= budget.total <= every:
            raise BudgetError(f"{budget.total} of {every} experts cannot be kept")
        return every - budget.total

    @staticmethod
    def _step(shape: LayerShape, context: Context) -> int:
        return math.lcm(shape.groups, context.budget.multiple_of)

    @staticmethod
    def _chosen(rating: Rating, remove: int, shape: LayerShape, context: Context) -> list[int]:
        return lowest(
            rating.scores,
            rating.counts,
            remove,
            shape,
            context.pinned_in(shape.layer),
            context.forbidden_in(shape.layer),
        )
