"""What is summed while a model runs: one small class per family of sums, exactly mergeable.

Legend of the axes in tensor names: T tokens, n tokens routed to one expert, E experts, K selected
per token, H width of the block, I width inside an expert, R router outputs, S sampled tokens.

Every accumulator holds sums (or a mean with its sum of squared deviations, which merges exactly by
Chan's formula), never averages, so the way in which the text is cut into batches does not matter.
Batches are summed in float32, totals in float64. Specification: METHODS §1.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.core.accumulating import Accumulator, BlockRows, ExpertRows
from moeprune.core.accumulating import zeros as _zeros
from moeprune.core.served import Served
from moeprune.core.shapes import LayerShape

__all__ = [
    "ACCUMULATORS",
    "LIGHT",
    "SAMPLE_SIZE",
    "Accumulator",
    "BlockRows",
    "ExpertRows",
    "Hidden",
    "HiddenGram",
    "InputGram",
    "Inputs",
    "NoviceGram",
    "Outputs",
    "RouterGram",
    "Routing",
    "Served",
    "TokenSample",
]

SAMPLE_SIZE = 512


def _plain_and_squared_gate(gate_n: Tensor) -> Tensor:
    """Rows (1, g^2): one matrix product then gives the plain and the gated sum together."""
    return torch.stack((torch.ones_like(gate_n), gate_n.square()))


@dataclass
class Routing(Accumulator):
    """How often and how strongly each expert is used.

    count_E = n_e, gate_E = sum g, gate_sq_E = sum g^2 over the tokens routed to e;
    top1_E = tokens whose largest gate is e's; together_EE = tokens that selected both (i, j).
    """

    name: ClassVar[str] = "routing"
    count_E: Tensor
    top1_E: Tensor
    gate_E: Tensor
    gate_sq_E: Tensor
    together_EE: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> Routing:
        """Sums over no tokens."""
        E = shape.experts
        return cls(
            _zeros(E, device=device, dtype=torch.int64),
            _zeros(E, device=device, dtype=torch.int64),
            _zeros(E, device=device),
            _zeros(E, device=device),
            _zeros(E, E, device=device, dtype=torch.int64),
        )

    def add_block(self, rows: BlockRows) -> None:
        """Add one batch."""
        E = self.count_E.numel()
        index_TK = rows.index_TK.clamp(max=E)  # slots without an expert go to an extra class
        gate_TK = rows.gate_TK.double()
        flat = index_TK.reshape(-1)
        self.count_E += torch.bincount(flat, minlength=E + 1)[:E]
        best_T = index_TK.gather(1, gate_TK.argmax(dim=1, keepdim=True)).reshape(-1)
        self.top1_E += torch.bincount(best_T, minlength=E + 1)[:E]
        sums = gate_TK.new_zeros(2, E + 1)
        sums[0].index_add_(0, flat, gate_TK.reshape(-1))
        sums[1].index_add_(0, flat, gate_TK.reshape(-1).square())
        self.gate_E += sums[0, :E]
        self.gate_sq_E += sums[1, :E]
        hit_TE = torch.zeros(len(index_TK), E + 1, device=flat.device).scatter_(1, index_TK, 1.0)
        self.together_EE += (hit_TE.T @ hit_TE)[:E, :E].long()  # exact: counts below 2^24 a batch


@dataclass
class Inputs(Accumulator):
    """Column norms of the gate and up matrices' input: sum x^2 and sum (g x)^2, [E, H]."""

    name: ClassVar[str] = "inputs"
    sq_EH: Tensor
    gated_sq_EH: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> Inputs:
        """Sums over no tokens."""
        size = (shape.experts, shape.hidden)
        return cls(_zeros(*size, device=device), _zeros(*size, device=device))

    def add_expert(self, rows: ExpertRows) -> None:
        """Add one expert's tokens."""
        sums_2H = _plain_and_squared_gate(rows.gate_n) @ rows.x_nH.float().square()
        self.sq_EH[rows.expert] += sums_2H[0]
        self.gated_sq_EH[rows.expert] += sums_2H[1]


@dataclass
class Hidden(Accumulator):
    """The down matrix's input: sum h^2, sum (g h)^2 and sum h, [E, I]."""

    name: ClassVar[str] = "hidden"
    sq_EI: Tensor
    gated_sq_EI: Tensor
    sum_EI: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> Hidden:
        """Sums over no tokens."""
        size = (shape.experts, shape.intermediate)
        return cls(*(_zeros(*size, device=device) for _ in range(3)))

    def add_expert(self, rows: ExpertRows) -> None:
        """Add one expert's tokens."""
        h_nI = rows.h_nI.float()
        weights_2n = _plain_and_squared_gate(rows.gate_n)
        self.sum_EI[rows.expert] += (weights_2n[:1] @ h_nI)[0]
        sums_2I = weights_2n @ h_nI.square()
        self.sq_EI[rows.expert] += sums_2I[0]
        self.gated_sq_EI[rows.expert] += sums_2I[1]


@dataclass
class Outputs(Accumulator):
    """The experts' outputs f (before the gate), enough for every novice and every norm score.

    mean_EH and m2_EH = sum (f - mean)^2 merge by Chan's formula; gate_f_EH = sum g f and
    gated_EH = sum g^2 f give the gate-weighted and the least-squares constant; norm_E = sum |f|,
    norm_sq_E = sum |f|^2, gate_norm_E = sum g |f|, gate_norm_sq_E = sum g |f|^2,
    gate_sq_norm_sq_E = sum g^2 |f|^2. With them sum g^2 |f - v|^2 is known for any constant v.

    max_E, the largest |f_j| over tokens and dimensions j, merges by the maximum. Absolute, since
    the sign of a hidden dimension means nothing: an outlier downwards is as large as one upwards.
    """

    name: ClassVar[str] = "outputs"
    count_E: Tensor
    mean_EH: Tensor
    m2_EH: Tensor
    gate_f_EH: Tensor
    gated_EH: Tensor
    norm_E: Tensor
    norm_sq_E: Tensor
    gate_norm_E: Tensor
    gate_norm_sq_E: Tensor
    gate_sq_norm_sq_E: Tensor
    max_E: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> Outputs:
        """Sums over no tokens."""
        E, H = shape.experts, shape.hidden
        return cls(
            _zeros(E, device=device, dtype=torch.int64),
            *(_zeros(E, H, device=device) for _ in range(4)),
            *(_zeros(E, device=device) for _ in range(6)),
        )

    def add_expert(self, rows: ExpertRows) -> None:
        """Add one expert's tokens."""
        e, n = rows.expert, len(rows.gate_n)
        f_nH = rows.f_nH.float()
        gate_n = rows.gate_n.double()
        norm_n = torch.linalg.vector_norm(f_nH, dim=1).double()
        self.norm_E[e] += norm_n.sum()
        self.norm_sq_E[e] += norm_n.square().sum()
        self.gate_norm_E[e] += (gate_n * norm_n).sum()
        self.gate_norm_sq_E[e] += (gate_n * norm_n.square()).sum()
        self.gate_sq_norm_sq_E[e] += (gate_n * norm_n).square().sum()
        powers_3n = torch.stack((torch.ones_like(rows.gate_n), rows.gate_n, rows.gate_n.square()))
        sums_3H = powers_3n @ f_nH
        self.gate_f_EH[e] += sums_3H[1]
        self.gated_EH[e] += sums_3H[2]
        mean_H = sums_3H[0] / n
        m2_H = (f_nH - mean_H).square_().sum(dim=0)
        largest = torch.linalg.vector_norm(f_nH, ord=torch.inf).double()
        self.max_E[e] = torch.maximum(self.max_E[e], largest)
        one = slice(e, e + 1)
        self._chan(one, torch.tensor([n], device=f_nH.device), mean_H.double(), m2_H.double())

    def merge(self, other: Accumulator) -> None:
        """Add the sums of ``other``; mean and deviations by Chan's formula, maxima as maxima."""
        assert isinstance(other, Outputs)
        self._chan(slice(None), other.count_E, other.mean_EH, other.m2_EH)
        self.max_E = torch.maximum(self.max_E, other.max_E)
        for name, tensor in self.tensors():
            if name not in ("count_E", "mean_EH", "m2_EH", "max_E"):
                tensor.add_(getattr(other, name))

    def _chan(self, at: slice, n_b: Tensor, mean_b: Tensor, m2_b: Tensor) -> None:
        n_a = self.count_E[at]
        total = n_a + n_b
        share = (n_b.double() / total.clamp(min=1))[:, None]
        delta = mean_b - self.mean_EH[at]
        self.m2_EH[at] += m2_b + delta.square() * (n_a[:, None] * share)
        self.mean_EH[at] += delta * share
        self.count_E[at] = total

    def variance_EH(self) -> Tensor:
        """Unbiased variance of each output dimension; 0 where fewer than two tokens were seen."""
        return self.m2_EH / (self.count_E - 1).clamp(min=1)[:, None]


@dataclass
class InputGram(Accumulator):
    """sum x x^T per expert, [E, H, H], float32: large; only for methods that ask for it."""

    name: ClassVar[str] = "input-gram"
    gram_EHH: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> InputGram:
        """Sums over no tokens."""
        size = (shape.experts, shape.hidden, shape.hidden)
        return cls(_zeros(*size, device=device, dtype=torch.float32))

    def add_expert(self, rows: ExpertRows) -> None:
        """Add one expert's tokens."""
        x_nH = rows.x_nH.float()
        self.gram_EHH[rows.expert].addmm_(x_nH.T, x_nH)


@dataclass
class HiddenGram(Accumulator):
    """sum h h^T per expert, [E, I, I], float32: large; only for methods that ask for it."""

    name: ClassVar[str] = "hidden-gram"
    gram_EII: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> HiddenGram:
        """Sums over no tokens."""
        size = (shape.experts, shape.intermediate, shape.intermediate)
        return cls(_zeros(*size, device=device, dtype=torch.float32))

    def add_expert(self, rows: ExpertRows) -> None:
        """Add one expert's tokens."""
        h_nI = rows.h_nI.float()
        self.gram_EII[rows.expert].addmm_(h_nI.T, h_nI)


@dataclass
class NoviceGram(Accumulator):
    """Second moments weighted by g^2, with which any affine map of x is fitted to f.

    moments_EKK = sum g^2 [1, x] [1, x]^T and cross_EHK = sum g^2 f [1, x]^T, K = H + 1, float32:
    large; only for methods that ask for it.
    """

    name: ClassVar[str] = "novice-gram"
    moments_EKK: Tensor
    cross_EHK: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> NoviceGram:
        """Sums over no tokens."""
        E, H, K = shape.experts, shape.hidden, shape.hidden + 1
        return cls(
            _zeros(E, K, K, device=device, dtype=torch.float32),
            _zeros(E, H, K, device=device, dtype=torch.float32),
        )

    def add_expert(self, rows: ExpertRows) -> None:
        """Add one expert's tokens."""
        gate_n1 = rows.gate_n.float()[:, None]
        gx_nK = torch.cat((gate_n1, gate_n1 * rows.x_nH.float()), dim=1)
        self.moments_EKK[rows.expert].addmm_(gx_nK.T, gx_nK)
        self.cross_EHK[rows.expert].addmm_((gate_n1 * rows.f_nH.float()).T, gx_nK)


@dataclass
class RouterGram(Accumulator):
    """Sum z and sum z z^T of the router's first output z, over its first E columns.

    prob_E = sum softmax(z), over all the router's outputs, whether the expert was selected or not.
    Most routers return logits first; the few that return probabilities are what they are, and
    what is computed from them is of probabilities.
    """

    name: ClassVar[str] = "router"
    needs_router: ClassVar[bool] = True
    sum_E: Tensor
    gram_EE: Tensor
    prob_E: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> RouterGram:
        """Sums over no tokens."""
        E = shape.experts
        return cls(_zeros(E, device=device), _zeros(E, E, device=device), _zeros(E, device=device))

    def add_block(self, rows: BlockRows) -> None:
        """Add one batch."""
        if rows.logits_TR is None:
            return
        E = self.sum_E.numel()
        z_TR = rows.logits_TR.double()
        self.prob_E += z_TR.softmax(dim=1).sum(dim=0)[:E]
        z_TE = z_TR[:, :E]
        self.sum_E += z_TE.sum(dim=0)
        self.gram_EE += z_TE.T @ z_TE


@dataclass
class TokenSample(Accumulator):
    """A bounded sample of what the block saw: the S tokens with the smallest keys.

    Keys are pseudo-random and belong to the token, not to the run, so the sample does not depend on
    batches, their order or the number of processes, and it is the same tokens in every layer.
    x_SH are inputs of the block, z_SR the router's first output (R = 0 where it has none),
    index_SK and gate_SK what the block chose.
    """

    name: ClassVar[str] = "sample"
    needs_router: ClassVar[bool] = True
    sampled: ClassVar[bool] = True
    key_S: Tensor
    x_SH: Tensor
    z_SR: Tensor
    index_SK: Tensor
    gate_SK: Tensor

    @classmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> TokenSample:
        """A sample of no tokens."""
        float32 = torch.float32
        return cls(
            _zeros(0, device=device, dtype=torch.int64),
            _zeros(0, shape.hidden, device=device, dtype=float32),
            _zeros(0, 0, device=device, dtype=float32),
            _zeros(0, 0, device=device, dtype=torch.int64),
            _zeros(0, 0, device=device, dtype=float32),
        )

    def add_block(self, rows: BlockRows) -> None:
        """Add one batch."""
        smallest = torch.argsort(rows.key_T, stable=True)[:SAMPLE_SIZE]
        z_TR = rows.x_TH[:, :0] if rows.logits_TR is None else rows.logits_TR
        self.merge(
            TokenSample(
                rows.key_T[smallest],
                rows.x_TH[smallest].float(),
                z_TR[smallest].float(),
                rows.index_TK[smallest],
                rows.gate_TK[smallest],
            )
        )

    def merge(self, other: Accumulator) -> None:
        """Keep the smallest keys of both."""
        assert isinstance(other, TokenSample)
        # a sample of no tokens does not know how many columns there are
        filled = [dict(part.tensors()) for part in (self, other) if len(part.key_S)]
        if not filled:
            return
        both = {name: torch.cat([part[name] for part in filled]) for name in filled[0]}
        smallest = torch.argsort(both["key_S"], stable=True)[:SAMPLE_SIZE]
        for name, tensor in both.items():
            setattr(self, name, tensor[smallest])


ACCUMULATORS: dict[str, type[Accumulator]] = {
    kind.name: kind
    for kind in (
        Routing, Inputs, Hidden, Outputs, RouterGram, TokenSample, InputGram, HiddenGram,
        NoviceGram, Served,
    )
}  # fmt: skip

LIGHT = ("routing", "inputs", "hidden", "outputs", "router", "sample", "served")
"""Everything but the Gram matrices: what a calibration collects unless told otherwise."""
