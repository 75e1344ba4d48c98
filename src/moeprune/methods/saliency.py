"""The saliency family S(b, alpha, beta) of arXiv 2606.15716, and its members that have a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from moeprune.core.accumulators import Outputs, Routing
from moeprune.core.dropping import Dropper
from moeprune.core.method import Context, LayerView
from moeprune.core.ranking import Rating
from moeprune.core.statistics import LayerStatistics


@dataclass(frozen=True)
class SaliencyFamily(Dropper):
    """Deletes the experts with the lowest ``S = (1 / n_e^b) sum_t g_te^alpha |f_e(x_t)|^beta``.

    The sum is over the n_e tokens routed to expert e; g is the block's own gate and f the output
    before the gate. An expert without tokens has S = 0.
    """

    needs: ClassVar[tuple[str, ...]] = ("routing", "outputs")
    member: ClassVar[tuple[int, int, int]]

    def exponents(self) -> tuple[int, int, int]:
        """(b, alpha, beta)."""
        return self.member

    def rate(self, view: LayerView, context: Context) -> Rating:
        """S per expert."""
        b, alpha, beta = self.exponents()
        count_E = view.need().part(Routing).count_E
        score_E = _sum(view.need(), alpha, beta)
        if b:
            score_E = score_E / count_E.clamp(min=1)
        return Rating(self.name, score_E.tolist(), count_E.tolist())


def _sum(statistics: LayerStatistics, alpha: int, beta: int) -> Tensor:
    """sum_t g^alpha |f|^beta per expert, float64."""
    if beta == 0:
        routing = statistics.part(Routing)
        return routing.gate_E if alpha else routing.count_E.double()
    outputs = statistics.part(Outputs)
    if beta == 1:
        return outputs.gate_norm_E if alpha else outputs.norm_E
    return outputs.gate_norm_sq_E if alpha else outputs.norm_sq_E


@dataclass(frozen=True)
class Saliency(SaliencyFamily):
    """Any member of the family ``S = (1 / n_e^b) sum_t g_te^alpha |f_e(x_t)|^beta``.

    Options:
        b: 1 takes the mean over the expert's tokens, 0 the sum.
        alpha: exponent of the gate.
        beta: exponent of the output's norm.
        scope, normalise, floor: as for every dropper.
    """

    name: ClassVar[str] = "saliency"
    summary: ClassVar[str] = "drop experts by any S(b, alpha, beta): mean or sum of g^a |f|^b"
    source: ClassVar[str] = "arXiv 2606.15716"

    b: Literal[0, 1] = 1
    alpha: Literal[0, 1] = 1
    beta: Literal[0, 1, 2] = 1

    def exponents(self) -> tuple[int, int, int]:
        """(b, alpha, beta)."""
        return self.b, self.alpha, self.beta


@dataclass(frozen=True)
class EAN(SaliencyFamily):
    """Deletes the experts with the smallest summed output norm, S(0, 0, 1)."""

    name: ClassVar[str] = "ean"
    summary: ClassVar[str] = "drop the experts with the smallest summed output norm"
    source: ClassVar[str] = "S(0,0,1) of arXiv 2606.15716"
    member: ClassVar[tuple[int, int, int]] = (0, 0, 1)


@dataclass(frozen=True)
class WeightedFrequency(SaliencyFamily):
    """Deletes the experts with the smallest summed gate, S(0, 1, 0)."""

    name: ClassVar[str] = "weighted-frequency"
    summary: ClassVar[str] = "drop the experts with the smallest summed gate"
    source: ClassVar[str] = "S(0,1,0) of arXiv 2606.15716"
    needs: ClassVar[tuple[str, ...]] = ("routing",)
    member: ClassVar[tuple[int, int, int]] = (0, 1, 0)


@dataclass(frozen=True)
class REAP(SaliencyFamily):
    """Deletes the experts with the smallest mean gated output norm, S(1, 1, 1).

    The gate is the one the block used. The authors divide by the sum of the selected gates even
    where the model does not; that changes a token's share, so no sum over tokens can express it.
    """

    name: ClassVar[str] = "reap"
    summary: ClassVar[str] = "drop the experts with the smallest mean gated output norm"
    source: ClassVar[str] = "arXiv 2510.13999"
    member: ClassVar[tuple[int, int, int]] = (1, 1, 1)


@dataclass(frozen=True)
class MAN(SaliencyFamily):
    """Deletes the experts with the smallest mean output norm, S(1, 0, 1)."""

    name: ClassVar[str] = "man"
    summary: ClassVar[str] = "drop the experts with the smallest mean output norm"
    source: ClassVar[str] = "arXiv 2606.15716"
    member: ClassVar[tuple[int, int, int]] = (1, 0, 1)


@dataclass(frozen=True)
class MSAN(SaliencyFamily):
    """Deletes the experts with the smallest mean squared output norm, S(1, 0, 2)."""

    name: ClassVar[str] = "msan"
    summary: ClassVar[str] = "drop the experts with the smallest mean squared output norm"
    source: ClassVar[str] = "arXiv 2606.15716"
    member: ClassVar[tuple[int, int, int]] = (1, 0, 2)
