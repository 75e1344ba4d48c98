"""Uniform slimming: every expert keeps its J best neurons, and the file gets smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Hidden, Routing
from moeprune.core.edits import Neurons
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.ops.neurons import column_energy, magnitude, survivors, top
from moeprune.core.plan import LayerPlan
from moeprune.core.width import neurons_to_keep, warn_of_nothing


@dataclass(frozen=True)
class Slim(Method):
    """Keeps the same number of neurons in every expert of every layer, those with the best scores.

    The result is a stock checkpoint with narrower experts. ``--ratio`` is the fraction of neurons
    that go, rounded so that a multiple of ``align`` stays; ``--keep`` is the new width. Equal
    scores go by magnitude, then the later neuron first.

    Options:
        score: ``magnitude`` |g_j| |u_j| |d_j|, norms of the neuron's weights, needs no data;
            ``activation`` sum h_j^2 * |d_j|^2 over the expert's tokens; ``gated`` the same with the
            gate, sum (g h_j)^2 * |d_j|^2; ``survivors`` the weights that are not zero: the way
            from a checkpoint whose weights were masked to a smaller one.
        align: the new width is a multiple of this, as kernels and quantisation blocks like it.
        min_tokens: an expert that saw fewer tokens is scored by magnitude.
    """

    name: ClassVar[str] = "slim"
    summary: ClassVar[str] = "narrow all experts to their best neurons"
    source: ClassVar[str] = "structured pruning by norms, arXiv 1608.08710"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")
    keeps: ClassVar[str] = "neurons"
    needs: ClassVar[tuple[str, ...]] = ("routing", "hidden")
    changes: ClassVar[str | None] = "rebuilds experts"

    score: Literal["magnitude", "activation", "gated", "survivors"] = "gated"
    align: Annotated[int, Field(ge=1)] = 32
    min_tokens: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if self.score in ("magnitude", "survivors"):
            object.__setattr__(self, "needs", ())  # nothing has to be observed

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        """Decide about one layer."""
        shape = view.shape
        width = neurons_to_keep(context.budget, shape, self.align)
        every = tuple(range(shape.experts))
        if width == shape.intermediate:
            warn_of_nothing(context, shape, self.align)
            return LayerPlan(shape.layer, shape.experts, every)
        score_EI, size_EI, notes = self._scores(view)
        if bool(score_EI.isnan().any()):
            context.warn(f"layer {shape.layer}: some scores are not numbers; they rank lowest")
        chosen_EJ = top(score_EI, width, size_EI)
        kept_E = score_EI.nan_to_num(0.0).gather(1, chosen_EJ).sum(dim=1)
        whole_E = score_EI.nan_to_num(0.0).sum(dim=1)
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=every,
            scores={"share kept": tuple((kept_E / whole_E.clamp(min=1e-300)).tolist())},
            notes=notes,
            neurons=Neurons.of_rows(chosen_EJ, every),
        )

    def _scores(self, view: LayerView) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """The scores, the magnitudes that decide between equal ones, and notes."""
        shape = view.shape
        sizes, energies, counts = [], [], []
        for expert in range(shape.experts):
            matrices = {role: view.weights.matrix(expert, role) for role in shape.roles}
            sizes.append(magnitude(matrices))
            energies.append(column_energy(matrices["down"]))
            counts.append(survivors(matrices))
        size_EI = torch.stack(sizes)
        if not self.needs:
            score_EI = size_EI if self.score == "magnitude" else torch.stack(counts)
            return score_EI, size_EI, ()
        statistics = view.need()
        hidden = statistics.part(Hidden)
        sq_EI = hidden.sq_EI if self.score == "activation" else hidden.gated_sq_EI
        score_EI = sq_EI.double() * torch.stack(energies)
        rare_E = statistics.part(Routing).count_E < self.min_tokens
        score_EI = torch.where(rare_E[:, None], size_EI, score_EI)
        rare = torch.nonzero(rare_E).reshape(-1).tolist()
        few = f"experts {rare} saw fewer than {self.min_tokens} tokens: scored by magnitude"
        return score_EI, size_EI, (few,) if rare else ()
