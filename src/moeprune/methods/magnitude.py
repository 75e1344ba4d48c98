"""Magnitude pruning: zero the smallest weights of every expert matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moeprune.core.column_norms import check_pattern
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan, MaskEdit


@dataclass(frozen=True)
class Magnitude(Method):
    """Data-free weight pruning inside experts: ``S_ij = |W_ij|``, the baseline of Wanda's code.

    The floor(ratio * entries) weights with the lowest S are zeroed, or n of every m consecutive
    ones of a row (``--pattern n:m``). Ties go by row, then column.

    Options:
        scope: weights compete within the whole ``matrix`` (the source) or within each output
            ``row`` (as in Wanda and MoE-Pruner); it means nothing to a pattern.
    """

    name: ClassVar[str] = "magnitude"
    summary: ClassVar[str] = (
        "zero the smallest weights inside experts; needs no data; file and speed stay"
    )
    source: ClassVar[str] = "baseline of arXiv 2306.11695"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "pattern")
    changes: ClassVar[str | None] = "zeroes weights"

    scope: Literal["matrix", "row"] = "matrix"

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape, budget = view.shape, context.budget
        check_pattern(budget, shape)
        group = "row" if budget.pattern else self.scope
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=tuple(range(shape.experts)),
            mask=MaskEdit(budget.ratio, budget.pattern, shape.roles, group=group),
        )
