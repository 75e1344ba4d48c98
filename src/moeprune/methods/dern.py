"""DERN (arXiv 2509.10377): drop experts, hand their neurons to the experts that stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from moeprune.core.accumulators import Hidden, Routing
from moeprune.core.alignment import rows_per_neuron
from moeprune.core.dropping import Dropper
from moeprune.core.edits import Neurons
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.kmeans import spherical_kmeans
from moeprune.core.ops.segments import Segments, equalised_factors, nearest_owner, unit_segments
from moeprune.core.plan import LayerPlan
from moeprune.core.ranking import Rating
from moeprune.core.shapes import ROLES

_BYTES = 1 << 28  # segments of dropped experts that are in memory together


@dataclass(frozen=True)
class DERN(Dropper):
    """Drops experts by router statistics and recombines their neurons with those that stay.

    A segment is one neuron of a dropped expert: its gate row, up row and down column, each scaled
    to length 1. It goes to the kept expert that owns the neuron with the most similar segment
    (cosine), if that cosine reaches ``threshold``. A kept expert with I neurons of its own and some
    that it was given is reduced to I again by weighted spherical k-means that starts from its own
    neurons. Each of a new neuron's three parts has the direction of the weighted sum of its
    members' unit parts and the weighted mean of their lengths. Experts that are given nothing stay
    as they are.

    Options:
        criterion: experts with the lowest ``gate-mass`` (sum of gates) or token ``count`` go.
        weights: of a neuron in the k-means: ``contribution`` is the norm of what it gave to the
            block's output on the calibration text, sqrt(sum (g h)^2) |down column|; ``usage`` the
            gate mass of its expert; ``equal``. Neurons of weight 0 are not handed on.
        threshold: segments whose best cosine is lower are dropped with their expert.
        iterations: of the k-means, at most.
        router: ``slice`` keeps the rows of kept experts; ``add`` adds to each the rows of dropped
            experts, times the fraction of their neurons that it was given.
    """

    name: ClassVar[str] = "dern"
    summary: ClassVar[str] = "drop experts and merge their neurons into those that stay"
    source: ClassVar[str] = "arXiv 2509.10377"
    needs: ClassVar[tuple[str, ...]] = ("routing", "hidden")
    changes: ClassVar[str | None] = "merges experts"

    criterion: Literal["gate-mass", "count"] = "gate-mass"
    weights: Literal["contribution", "usage", "equal"] = "contribution"
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.0
    iterations: Annotated[int, Field(ge=1, le=1000)] = 10
    router: Literal["slice", "add"] = "slice"

    def rate(self, view: LayerView, context: Context) -> Rating:
        """How much the router uses each expert."""
        routing = view.need().part(Routing)
        counts: list[int] = routing.count_E.tolist()
        if self.criterion == "count":
            return Rating("count", list(map(float, counts)), counts)
        return Rating("gate_mass", routing.gate_E.tolist(), counts)

    def build(self, view: LayerView, rating: Rating, chosen: list[int]) -> LayerPlan:
        """The edit of a layer that takes ``chosen`` apart."""
        shape = view.shape
        kept = [e for e in range(shape.experts) if e not in chosen]
        weight_EI = self._weights(view)
        owner_EI = self._owners(view, kept, chosen, weight_EI)
        moved_EI = owner_EI >= 0
        moved = bool(moved_EI.any())
        given_E = torch.bincount(owner_EI[moved_EI], minlength=shape.experts)
        return LayerPlan(
            layer=shape.layer,
            experts=shape.experts,
            keep=tuple(kept),
            scores={
                **rating.as_scores(),
                "neurons_received": tuple(map(float, given_E.tolist())),
                "neurons_handed_on": tuple(map(float, moved_EI.sum(dim=1).tolist())),
            },
            neurons=self._neurons(view, kept, owner_EI, weight_EI) if moved else None,
            router_CE=self._router(kept, owner_EI) if moved else None,
        )

    def _weights(self, view: LayerView) -> Tensor:
        """The importance of every neuron, float64 [E, I]; 0 where it is not a number."""
        shape, statistics = view.shape, view.need()
        weight_EI = torch.ones(shape.experts, shape.intermediate, dtype=torch.float64)
        if self.weights == "usage":
            weight_EI *= statistics.part(Routing).gate_E.cpu()[:, None]
        elif self.weights == "contribution":
            for e in range(shape.experts):
                weight_EI[e] = view.weights.matrix(e, "down").double().norm(dim=0)
            weight_EI *= statistics.part(Hidden).gated_sq_EI.cpu().sqrt()
        return torch.nan_to_num(weight_EI, nan=0.0, posinf=0.0).clamp(min=0)

    def _owners(
        self, view: LayerView, kept: list[int], gone: list[int], weight_EI: Tensor
    ) -> Tensor:
        """The kept expert that is given each neuron of a dropped one, int64 [E, I]; -1 if none."""
        shape = view.shape
        owner_EI = torch.full((shape.experts, shape.intermediate), -1)
        step = max(1, _BYTES // (4 * shape.expert_parameters))
        for group in range(shape.groups):
            own = [e for e in kept if shape.group_of(e) == group]
            lost = [e for e in gone if shape.group_of(e) == group]
            for start in range(0, len(lost), step):
                some = lost[start : start + step]
                segments = torch.cat([self._segments(view, e).unit_NF for e in some])
                owners = ((e, self._segments(view, e).unit_NF) for e in own)
                found_N = nearest_owner(segments, owners, self.threshold)
                owner_EI[some] = found_N.reshape(len(some), -1)
        owner_EI[weight_EI == 0] = -1
        return owner_EI

    def _neurons(
        self, view: LayerView, kept: list[int], owner_EI: Tensor, weight_EI: Tensor
    ) -> Neurons:
        index, factor = [], []
        for position, expert in enumerate(kept):
            mine_I = torch.arange(view.shape.intermediate)
            source_N2 = torch.stack((torch.full_like(mine_I, expert), mine_I), dim=1)
            source_N2 = torch.cat((source_N2, torch.nonzero(owner_EI == expert)))
            if len(source_N2) == len(mine_I):
                cluster_N, factor_N3 = mine_I, torch.ones(len(mine_I), 3)
            else:
                cluster_N, factor_N3 = self._reduced(view, source_N2, weight_EI)
            where_N = torch.full_like(cluster_N, position)
            index.append(torch.cat((where_N[:, None], cluster_N[:, None], source_N2), dim=1))
            factor.append(factor_N3)
        return Neurons(
            view.shape.intermediate, torch.cat(index).to(torch.int32), torch.cat(factor).float()
        )

    def _reduced(
        self, view: LayerView, source_N2: Tensor, weight_EI: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The new neuron of each listed one, [N], and the factors of its three parts, [N, 3]."""
        parts = []
        for e in dict.fromkeys(source_N2[:, 0].tolist()):
            segments = self._segments(view, e)
            parts.append(segments.only(source_N2[source_N2[:, 0] == e, 1]))
        segments = Segments.cat(parts)
        weight_N = weight_EI[source_N2[:, 0], source_N2[:, 1]]
        # a neuron that did nothing still has a place where it is alone
        weight_N = weight_N.clamp(min=float(weight_N.max()) * 1e-9 or 1.0)
        count = view.shape.intermediate
        cluster_N = spherical_kmeans(segments.unit_NF, weight_N, count, self.iterations)
        factor_NR = equalised_factors(segments, weight_N, cluster_N, count)
        factor_N3 = torch.ones(len(source_N2), 3, dtype=torch.float64)
        for column, role in enumerate(view.shape.roles):
            factor_N3[:, ROLES.index(role)] = factor_NR[:, column]
        return cluster_N, factor_N3

    def _segments(self, view: LayerView, expert: int) -> Segments:
        return unit_segments(rows_per_neuron(view.weights, expert, view.shape.roles))

    def _router(self, kept: list[int], owner_EI: Tensor) -> Tensor | None:
        if self.router == "slice":
            return None
        rows_CE = torch.zeros(len(kept), len(owner_EI), dtype=torch.float64)
        for position, expert in enumerate(kept):
            rows_CE[position] = (owner_EI == expert).double().mean(dim=1)
            rows_CE[position, expert] = 1.0
        return rows_CE.float()
