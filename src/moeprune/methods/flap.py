"""FLAP (arXiv 2312.11983) for experts: channels that hardly fluctuate go, their mean may stay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Hidden, Routing
from moeprune.core.edits import Neurons
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.neurons import (
    above_threshold,
    column_energy,
    fluctuation,
    standardised,
    top,
)
from moeprune.core.plan import LayerPlan
from moeprune.core.width import neurons_to_keep, warn_of_nothing
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class FLAP(Method):
    """Removes the neurons whose activations fluctuate least, weighed by what the output sees.

    ``s_j = Var[h_j] * |D_:j|^2`` over the tokens of the expert, h the down matrix's input, the
    variance that of a sample, ``(sum h^2 - n mean^2) / (n - 1)``. A removed neuron with a constant
    activation m_j is made good by adding ``sum_j m_j D_:j`` to the expert's output. An expert with
    fewer than two tokens has no variance: its channels are scored by ``|D_:j|^2`` and nothing is
    added.

    Options:
        structure: ``uniform`` keeps the same number in every expert; ``global`` is the source: the
            scores are standardised inside each expert, and one threshold holds for all. Its
            experts have different widths, which no stock class knows: all get the width of the
            widest, with zeros (counted in the table of sizes).
        bias: ``none``, or ``mean`` to add the removed channels' mean output; the result then
            opens with trust_remote_code or moeprune.
        align: the new width is a multiple of this.
    """

    name: ClassVar[str] = "flap"
    summary: ClassVar[str] = "narrow experts by how little a channel fluctuates"
    source: ClassVar[str] = "arXiv 2312.11983"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    keeps: ClassVar[str] = "neurons"
    needs: ClassVar[tuple[str, ...]] = ("routing", "hidden")
    changes: ClassVar[str | None] = "rebuilds experts"

    structure: Literal["uniform", "global"] = "uniform"
    bias: Literal["none", "mean"] = "none"
    align: Annotated[int, Field(ge=1)] = 32

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer from its own scores."""
        shape = view.shape
        width = neurons_to_keep(context.budget, shape, self.align)
        keep_EI = torch.ones(shape.experts, shape.intermediate, dtype=torch.bool)
        if width == shape.intermediate:
            warn_of_nothing(context, shape, self.align)
        else:
            chosen_EJ = top(_scores(view, context), width)
            keep_EI = torch.zeros_like(keep_EI).scatter_(1, chosen_EJ, True)
        return self._plan(view, keep_EI, width)

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        """Decide about all layers; with ``structure="global"`` all channels compete."""
        if self.structure == "uniform":
            return super().plan_model(views, context)
        scores: list[Tensor] = []
        remove = step = 0
        for view in views:
            shape, budget = view.shape, context.budget
            scores.append(standardised(_scores(view, context)))
            if budget.keep is not None:
                each = shape.intermediate - neurons_to_keep(budget, shape, 1)
                remove += each * shape.experts
            else:
                neurons_to_keep(budget, shape, 1)  # refuses what counts experts
                assert budget.ratio is not None
                whole = shape.experts * shape.intermediate
                remove += math.floor(whole * budget.ratio + 1e-9)
            step = max(step, shape.intermediate)
        if len({score_EI.shape[1] for score_EI in scores}) > 1:
            raise BudgetError(
                "its layers have experts of different widths, and the result would have one",
                "use -o structure=uniform",
            )
        keeps = above_threshold(scores, remove)
        widest = max(int(keep_EI.sum(dim=1).max()) for keep_EI in keeps)
        width = min(math.ceil(widest / self.align) * self.align, step)
        return {
            view.shape.layer: self._plan(view, keep_EI, width)
            for view, keep_EI in zip(views, keeps, strict=True)
        }

    def per_layer(self) -> FLAP:
        """The same number from every expert."""
        return FLAP("uniform", self.bias, self.align)

    def _plan(self, view: LayerView, keep_EI: Tensor, width: int) -> LayerPlan:
        shape = view.shape
        every = tuple(range(shape.experts))
        if bool(keep_EI.all()):
            return LayerPlan(shape.layer, shape.experts, every)
        count_E = view.need().part(Routing).count_E
        dead = torch.nonzero(count_E < 2).reshape(-1).tolist()
        few = f"experts {dead} saw fewer than two tokens: scored by their down matrices"
        chosen = [torch.nonzero(keep_I).reshape(-1) for keep_I in keep_EI]
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=every,
            scores={"neurons": tuple(float(len(ids)) for ids in chosen)},
            notes=(few,) if dead else (),
            neurons=Neurons.of_lists(chosen, every, width),
            offsets_CH=_offsets(view, keep_EI) if self.bias == "mean" else None,
        )


def _scores(view: LayerView, context: Context) -> Tensor:
    """s_j of every expert, float64 [E, I]."""
    statistics, shape = view.need(), view.shape
    hidden, count_E = statistics.part(Hidden), statistics.part(Routing).count_E
    energy_EI = torch.stack(
        [column_energy(view.weights.matrix(e, "down")) for e in range(shape.experts)]
    )
    spread_EI = fluctuation(hidden.sum_EI, hidden.sq_EI, count_E)
    score_EI = torch.where((count_E < 2)[:, None], energy_EI, spread_EI * energy_EI)
    if bool(score_EI.isnan().any()):
        context.warn(f"layer {shape.layer}: some scores are not numbers; they rank lowest")
    return score_EI


def _offsets(view: LayerView, keep_EI: Tensor) -> Tensor:
    """``sum of m_j D_:j`` over the channels that go, float32 [E, H]."""
    statistics = view.need()
    sum_EI, count_E = statistics.part(Hidden).sum_EI, statistics.part(Routing).count_E
    mean_EI = sum_EI.double() / count_E.double().clamp(min=1)[:, None]
    gone_EI = mean_EI.masked_fill(keep_EI | (count_E < 2)[:, None], 0.0)
    rows = [view.weights.matrix(e, "down").double() @ gone_EI[e] for e in range(len(gone_EI))]
    return torch.stack(rows).float()
