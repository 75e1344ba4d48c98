"""Angular layer dropping (arXiv 2403.17887): leave out the layers that turn the stream least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.residual import NAME, Residual
from moeprune.errors import BudgetError

_SLACK = 1e-9  # as for experts: 0.29 * 100 means 29


@dataclass(frozen=True)
class Angular(Method):
    """Drops n consecutive decoder layers, dense or not.

    ``d(l) = mean of arccos(cos(x^(l), x^(l+n))) / pi``, x^(l) the residual stream before layer l;
    layers l .. l+n-1 go for the l with the lowest d, of equals the first. ``--ratio`` counts
    layers, rounded down; ``--keep`` is the number of layers that stay.

    Options:
        tokens: ``last`` looks at the last token of every sequence (the source), ``all`` at a
            sample of all tokens.
        last_layer: whether the last layer may go as well; the source ends before it.
    """

    name: ClassVar[str] = "angular"
    summary: ClassVar[str] = "drop whole layers that turn the residual stream least"
    source: ClassVar[str] = "arXiv 2403.17887"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    keeps: ClassVar[str] = "layers"
    needs: ClassVar[tuple[str, ...]] = (NAME,)

    tokens: Literal["last", "all"] = "last"
    last_layer: bool = False

    def accept(self, budget: Budget) -> None:
        """Raise ``BudgetError`` for what counts experts."""
        super().accept(budget)
        if budget.multiple_of > 1:
            raise BudgetError("angular removes no experts: --multiple-of means nothing to it")

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """All experts stay."""
        E = view.shape.experts
        return LayerPlan(view.shape.layer, E, tuple(range(E)))

    def plan_depth(self, residual: Residual, context: Context) -> tuple[int, ...]:
        """The layers that go."""
        n = self._removed(residual.layers, context.budget)
        if n == 0:
            return ()
        distances = self.distances(residual, n)
        known = [(d, start) for start, d in enumerate(distances) if not math.isnan(d)]
        if len(known) < len(distances):
            context.warn("the residual stream is not finite at some layers: they stay")
        if not known:
            raise BudgetError("the residual stream is not finite anywhere", "try --dtype float32")
        best, start = min(known)
        end = start + n - 1
        context.warn(
            f"layers {start}..{end} turn the residual stream by {best:.4f} of pi, the least of "
            f"{len(distances)} runs of {n} (the most: {max(known)[0]:.4f})"
        )
        return tuple(range(start, start + n))

    def distances(self, residual: Residual, n: int) -> list[float]:
        """d(l) for every l from which n layers can go."""
        mean_DD = residual.mean_DD(self.tokens == "last")
        ends = residual.layers - n + self.last_layer
        return [float(mean_DD[start, start + n]) for start in range(ends)]

    def _removed(self, layers: int, budget: Budget) -> int:
        keep = budget.keep
        if keep is None:
            assert budget.ratio is not None
            keep = layers - math.floor(layers * budget.ratio + _SLACK)
        if not 1 <= keep <= layers:
            raise BudgetError(
                f"--keep {keep}: the model has {layers} decoder layers",
                f"for {self.name}, --keep is the number of layers that stay: 1 to {layers}",
            )
        return layers - keep
