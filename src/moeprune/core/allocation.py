"""How many experts each layer loses when the layers share one budget.

Both rules give, for one set of scores, counts that only grow with the number to remove, so plans
for increasing ratios are nested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.errors import BudgetError


@dataclass(frozen=True)
class Candidates:
    """One layer in the competition.

    Attributes:
        layer: its index.
        scores: per expert; NaN ranks lowest.
        counts: tokens per expert, for ties.
        low: experts that it loses at least.
        high: experts that it loses at most.
        soft: experts beyond ``high`` that may go once all other layers are at their ``high``.
        pinned: experts that stay.
        forbidden: experts that go.
    """

    layer: int
    scores: Sequence[float]
    counts: Sequence[int]
    low: int
    high: int
    soft: int = 0
    pinned: frozenset[int] = frozenset()
    forbidden: frozenset[int] = frozenset()

    @property
    def mean(self) -> float:
        """Mean of the finite scores; 1 where there is none, or where it is 0."""
        finite = [score for score in self.scores if math.isfinite(score)]
        return sum(finite) / max(1, len(finite)) or 1.0


def by_score(layers: Sequence[Candidates], remove: int, normalise: bool) -> dict[int, int]:
    """Experts to remove per layer if the ``remove`` lowest scores of the model go.

    With ``normalise`` a score is divided by the mean of its layer first, since norms of outputs
    grow with depth. Ties break by tokens, layer and expert.

    Raises:
        BudgetError: the bounds of the layers do not allow that number.
    """
    check_total(layers, remove)
    ranked = []
    for one in layers:
        unit = one.mean if normalise else 1.0
        order = sorted(
            (
                2 * (e in one.pinned) - (e in one.forbidden),
                -math.inf if math.isnan(score) else score / unit,
                count,
                e,
            )
            for e, (score, count) in enumerate(zip(one.scores, one.counts, strict=True))
        )
        for place, (_, *key) in enumerate(order[: one.high + one.soft]):
            ranked.append(((place >= one.low) + (place >= one.high), *key[:2], one.layer, key[2]))
    ranked.sort()
    chosen = [index for *_, index, _ in ranked[:remove]]
    return {one.layer: chosen.count(one.layer) for one in layers}


def by_importance(layers: Sequence[Candidates], remove: int) -> dict[int, int]:
    """Experts to remove per layer if layers keep experts in proportion to their importance.

    The importance of a layer is its share of the model's summed scores. What is kept is handed out
    one expert at a time by the divisor method of Webster and Sainte-Lague, within the layers'
    bounds: unlike rounding of quotas it never takes one back when there are more to hand out.

    Raises:
        BudgetError: the bounds of the layers do not allow that number.
    """
    check_total(layers, remove)
    sizes = {one.layer: len(one.scores) for one in layers}
    weights = {one.layer: sum(s for s in one.scores if math.isfinite(s)) for one in layers}
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1.0)
    kept = {one.layer: sizes[one.layer] - one.high - one.soft for one in layers}
    seats = []
    for one in layers:
        E, index = sizes[one.layer], one.layer
        for seat in range(kept[index] + 1, E - one.low + 1):
            # a soft seat comes before all others: no layer is emptied for another's sake
            seats.append((seat > E - one.high, -weights[index] / (seat - 0.5), index))
    seats.sort()
    for *_, index in seats[: sum(sizes.values()) - remove - sum(kept.values())]:
        kept[index] += 1
    return {index: size - kept[index] for index, size in sizes.items()}


def check_total(layers: Sequence[Candidates], remove: int) -> None:
    """Raise ``BudgetError`` unless the layers' bounds allow ``remove`` experts in all."""
    total = sum(len(one.scores) for one in layers)
    least = sum(one.low for one in layers)
    most = sum(one.high + one.soft for one in layers)
    if remove > most:
        raise BudgetError(
            f"{remove} of {total} experts would go from all layers together, but only {most} can "
            "(top-k, floors, groups and pinned experts)",
            f"use a ratio of {math.floor(1e4 * most / max(1, total)) / 1e4:g} or less",
        )
    if remove < least:
        raise BudgetError(
            f"{remove} of {total} experts would go from all layers together, but at least {least} "
            "must (forbidden experts, --multiple-of)",
            f"use a ratio of {math.ceil(1e4 * least / max(1, total)) / 1e4:g} or more",
        )
