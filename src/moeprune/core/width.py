"""How many neurons of an expert stay: a budget, a width and what kernels like."""

from __future__ import annotations

import math

from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError

_SLACK = 1e-9  # as in core.budget


def neurons_to_keep(budget: Budget, shape: LayerShape, align: int) -> int:
    """The width that ``budget`` leaves to the experts of a layer.

    A ratio is the fraction of neurons removed, rounded so that the next multiple of ``align``
    stays; ``keep`` is the width itself. All neurons stay whether or not ``align`` divides them.

    Raises:
        BudgetError: ``keep`` is no multiple of ``align``, or more than there are.
    """
    if budget.multiple_of > 1:
        raise BudgetError("--multiple-of counts experts, and none goes", "use -o align=64")
    width = shape.intermediate
    if budget.keep is not None:
        if budget.keep > width or budget.keep < 1:
            raise BudgetError(f"--keep {budget.keep}: experts have {width} neurons")
        if budget.keep % align and budget.keep != width:
            raise BudgetError(
                f"--keep {budget.keep} is no multiple of {align}",
                f"use --keep {min(math.ceil(budget.keep / align) * align, width)}, or -o align=1",
            )
        return budget.keep
    assert budget.ratio is not None, "callers accept ratio and keep only"
    kept = width - math.floor(width * budget.ratio + _SLACK)
    return min(math.ceil(max(kept, 1) / align) * align, width)


def warn_of_nothing(context: Context, shape: LayerShape, align: int) -> None:
    """Tell the user where rounding left all neurons although some should go."""
    if context.budget.ratio:
        context.warn(
            f"layer {shape.layer}: {context.budget} of {shape.intermediate} neurons, rounded to a "
            f"multiple of {align}, removes none (-o align=...)"
        )
