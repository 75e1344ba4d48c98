"""Weight masks by ``|W| * norm of the inputs``: what Wanda and MoE-Pruner have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Hidden, Inputs, Routing
from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan, MaskEdit
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class ColumnNormMethod(Method):
    """Zeroes in every output row the weights with the lowest ``|W_ij| * norm_j``.

    A subclass says which squared norm of the inputs of each matrix; everything else is the same.
    Only tokens that are routed to an expert count for it.

    Options:
        propagate: ``pruned`` prunes a layer before the next one is observed; ``dense`` scores all
            layers from one pass through the unpruned model, so that statistics on disk are enough.
        min_tokens: an expert that saw fewer tokens has no norm worth trusting. Its gate and up
            matrices then use the norm over all routed tokens of the layer, its down matrix |W|.
    """

    budgets: ClassVar[tuple[str, ...]] = ("ratio", "pattern")
    needs: ClassVar[tuple[str, ...]] = ("routing", "inputs", "hidden")
    changes: ClassVar[str | None] = "zeroes weights"

    propagate: Literal["pruned", "dense"] = "pruned"
    min_tokens: Annotated[int, Field(ge=0)] = 16

    @property
    def sequential(self) -> bool:
        """Whether a layer must be edited before the next one is observed."""
        return self.propagate == "pruned"

    @abstractmethod
    def squared_norms(self, inputs: Inputs, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Of the inputs of gate and up [E, H], and of down [E, I]."""

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape, statistics = view.shape, view.need()
        check_pattern(context.budget, shape)
        count_E = statistics.part(Routing).count_E
        inputs, hidden = statistics.part(Inputs), statistics.part(Hidden)
        sq_EH, sq_EI = self.squared_norms(inputs, hidden)
        rare_E = count_E < self.min_tokens
        layer_norm_H = inputs.sq_EH.sum(dim=0).sqrt()
        if not bool(layer_norm_H.isfinite().all() and layer_norm_H.any()):
            layer_norm_H = torch.ones_like(layer_norm_H)  # nothing is known: magnitude
        scale_in_EH = torch.where(rare_E[:, None], layer_norm_H, sq_EH.sqrt())
        scale_mid_EI = sq_EI.sqrt().masked_fill(rare_E[:, None], 1.0)
        rare = torch.nonzero(rare_E).reshape(-1).tolist()
        notes: tuple[str, ...] = ()
        if rare:
            notes = (
                f"experts {rare} saw fewer than {self.min_tokens} tokens: scored by the layer's "
                "input norm (gate, up) and by magnitude (down)",
            )
        mask = MaskEdit(
            ratio=context.budget.ratio,
            pattern=context.budget.pattern,
            roles=shape.roles,
            scale_in_EH=scale_in_EH.float(),
            scale_mid_EI=scale_mid_EI.float(),
        )
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=tuple(range(shape.experts)),
            scores={"tokens": tuple(float(n) for n in count_E.tolist())},
            mask=mask,
            notes=notes,
        )


def check_pattern(budget: Budget, shape: LayerShape) -> None:
    """Raise ``BudgetError`` if rows of this layer cannot be cut into runs of the pattern's M."""
    pattern = budget.pattern
    if pattern and (shape.hidden % pattern[1] or shape.intermediate % pattern[1]):
        raise BudgetError(
            f"pattern {pattern[0]}:{pattern[1]} does not fit rows of {shape.hidden} and "
            f"{shape.intermediate} weights (layer {shape.layer})",
            "choose an M that divides both, or use --ratio",
        )
