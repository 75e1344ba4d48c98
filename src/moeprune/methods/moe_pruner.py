"""MoE-Pruner (arXiv 2410.12013): zero the weights with the smallest |W| * norm of gated inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from moeprune.core.accumulators import Hidden, Inputs, Routing
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan, MaskEdit
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class MoEPruner(Method):
    """One-shot weight pruning inside experts, equation 9 of the paper.

    ``S_ij = |W_ij| * sqrt(sum_t (g_te X_tj)^2)`` over the tokens t routed to expert e, where X is
    the input of that matrix and g the gate that the block multiplies into the output. In every
    output row the floor(ratio * inputs) weights with the lowest S are zeroed, or n of every m
    consecutive ones (``--pattern n:m``). Nothing else changes: same shapes, same router.

    Options:
        propagate: ``pruned`` prunes a layer before the next one is observed (as Wanda does and the
            text says); ``dense`` scores all layers from one pass through the unpruned model (the
            literal Algorithm 1), so that statistics on disk are enough.
        min_tokens: an expert that saw fewer tokens has no norm worth trusting. Its gate and up
            matrices then use the norm over all routed tokens of the layer, its down matrix |W|.
    """

    name: ClassVar[str] = "moe-pruner"
    summary: ClassVar[str] = "zero weights inside experts by |W| x gated input norm"
    source: ClassVar[str] = "arXiv 2410.12013"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "pattern")
    needs: ClassVar[tuple[str, ...]] = ("routing", "inputs", "hidden")
    changes: ClassVar[str | None] = "zeroes weights"

    propagate: Literal["pruned", "dense"] = "pruned"
    min_tokens: Annotated[int, Field(ge=0)] = 16

    @property
    def sequential(self) -> bool:
        """Whether a layer must be edited before the next one is observed."""
        return self.propagate == "pruned"

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape, statistics = view.shape, view.need()
        pattern = context.budget.pattern
        if pattern and (shape.hidden % pattern[1] or shape.intermediate % pattern[1]):
            raise BudgetError(
                f"pattern {pattern[0]}:{pattern[1]} does not fit rows of {shape.hidden} and "
                f"{shape.intermediate} weights (layer {shape.layer})",
                "choose an M that divides both, or use --ratio",
            )
        count_E = statistics.part(Routing).count_E
        inputs, hidden = statistics.part(Inputs), statistics.part(Hidden)
        rare_E = count_E < self.min_tokens
        layer_norm_H = inputs.sq_EH.sum(dim=0).sqrt()
        scale_in_EH = torch.where(rare_E[:, None], layer_norm_H, inputs.gated_sq_EH.sqrt())
        scale_mid_EI = hidden.gated_sq_EI.sqrt().masked_fill(rare_E[:, None], 1.0)
        rare = torch.nonzero(rare_E).reshape(-1).tolist()
        notes: tuple[str, ...] = ()
        if rare:
            notes = (
                f"experts {rare} saw fewer than {self.min_tokens} tokens: scored by the layer's "
                "input norm (gate, up) and by magnitude (down)",
            )
        mask = MaskEdit(
            ratio=context.budget.ratio,
            pattern=pattern,
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
