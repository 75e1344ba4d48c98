"""MoNE with affine novices: experts become maps of low rank, those that lose least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import NoviceGram, Outputs, Routing
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.affine_novices import AffineNovice, fit_affine
from moeprune.core.ranking import Rating
from moeprune.core.replacing import Replacer
from moeprune.errors import MoepruneError


@dataclass(frozen=True)
class MoNEAffine(Replacer):
    """Replaces the experts that an affine map of low rank imitates best; ours, after MoNE.

    f(x) is approximated by ``v + B (A x)`` with A [r, H] and B [H, r], fitted by reduced-rank least
    squares with the squared gate as weight. The score is what remains,
    ``sum g^2 |f - v - B A x|^2``: the squared error of the block's output on the calibration tokens
    if this expert alone goes. A novice takes (1 + 2 r) H values instead of an expert's 3 H I. An
    expert that saw no token has error 0 and a zero map.

    It needs second moments of inputs and outputs, 2 H^2 numbers per expert (``--collect
    routing,outputs,novice-gram``).

    Options:
        scope, normalise: as for mone-ls.
        rank: r.
        damping: added to the inputs' covariance, as a share of its mean diagonal.
    """

    name: ClassVar[str] = "mone-affine"
    summary: ClassVar[str] = "replace experts by affine maps of low rank, those that err least"
    source: ClassVar[str] = "extends arXiv 2507.00390"
    needs: ClassVar[tuple[str, ...]] = ("novice-gram", "outputs", "routing")
    changes: ClassVar[str | None] = "replaces experts by maps of low rank"

    rank: Annotated[int, Field(ge=1)] = 8
    damping: Annotated[float, Field(ge=0)] = 0.01

    def rate(self, view: LayerView, context: Context) -> Rating:
        """The error that each expert's best map leaves."""
        shape = view.shape
        if (1 + 2 * self.rank) * shape.hidden >= shape.expert_parameters or (
            self.rank > shape.hidden // 2
        ):
            raise MoepruneError(
                f"rank {self.rank} saves nothing: an expert is {shape.hidden} x "
                f"{shape.intermediate}",
                f"use -o rank={max(1, min(shape.hidden, shape.intermediate) // 8)} or less",
            )
        errors = []
        for expert in range(view.shape.experts):
            context.progress(expert, view.shape.experts, f"layer {view.shape.layer}")
            errors.append(self._fit(view, expert).error)
        return Rating("error", errors, view.need().part(Routing).count_E.tolist())

    def novices(self, view: LayerView, chosen: list[int]) -> Tensor:
        """The packed maps of ``chosen``."""
        rows = [self._fit(view, expert).packed().float() for expert in chosen]
        return torch.stack(rows) if rows else torch.zeros(0, view.shape.hidden)

    def _fit(self, view: LayerView, expert: int) -> AffineNovice:
        sums = view.need().part(NoviceGram)
        norm_sq = float(view.need().part(Outputs).gate_sq_norm_sq_E[expert])
        return fit_affine(
            sums.moments_EKK[expert], sums.cross_EHK[expert], norm_sq, self.rank, self.damping
        )
