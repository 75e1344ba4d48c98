"""Edits inside the experts of one layer, as data, and the matrices that they give.

An edit stores what a decision needs and no weight: a mask is a ratio with scales, a merged or
narrowed expert is a list of neurons. ``EditedExperts`` turns edits and old matrices into new ones,
and is the only place that does. Axes: E old experts, C experts that stay, H width of the block,
I width inside an expert, J the new width, N entries of a list of neurons.

Order inside one layer: neurons are mixed, then matrices that the plan brings take their place, then
ranks are cut, then weights are masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moeprune.core.ops.masks import matrix_keep_mask, nm_keep_mask, row_keep_mask
from moeprune.core.shapes import ROLES, LayerShape
from moeprune.errors import PlanError

MASK_GROUPS = ("row", "matrix")


class ExpertWeights(Protocol):
    """Read access to one layer's expert matrices."""

    def matrix(self, expert: int, role: str) -> Tensor:
        """One matrix as float32, rows = outputs, columns = inputs."""
        ...


class StoredWeights(ExpertWeights, Protocol):
    """Matrices that a plan brings along, in a file of their own."""

    @property
    def reference(self) -> Mapping[str, Any]:
        """What plan.json says about the file: name, hash, roles."""
        ...

    @property
    def roles(self) -> tuple[str, ...]:
        """The matrices that it holds, of every kept expert."""
        ...

    def shape(self, expert: int, role: str) -> tuple[int, ...]:
        """The size of one matrix."""
        ...


@dataclass(frozen=True)
class MaskEdit:
    """Zero the weights with the lowest ``|W| * scale`` inside every kept expert.

    Attributes:
        ratio: fraction of each group, or None if ``pattern`` is set.
        pattern: (n, m), n of every m consecutive weights, or None if ``ratio`` is set.
        roles: the matrices that are masked.
        scale_in_EH: scale of the gate and up matrices' input columns; None is magnitude pruning.
        scale_mid_EI: scale of the down matrix's input columns; None is magnitude pruning.
        group: weights compete within an output ``row`` or within the ``matrix``; for a ratio.
    """

    ratio: float | None
    pattern: tuple[int, int] | None
    roles: tuple[str, ...] = ROLES
    scale_in_EH: Tensor | None = None
    scale_mid_EI: Tensor | None = None
    group: str = "row"

    def scale(self, role: str, expert: int) -> Tensor | None:
        """The scale of one expert's matrix, [H] or [I]."""
        table = self.scale_mid_EI if role == "down" else self.scale_in_EH
        return None if table is None else table[expert]

    def keep(self, weight_OI: Tensor, role: str, expert: int) -> Tensor:
        """True where a weight of one expert's matrix stays."""
        scale = self.scale(role, expert)
        if self.pattern is not None:
            return nm_keep_mask(weight_OI, scale, *self.pattern)
        assert self.ratio is not None
        select = matrix_keep_mask if self.group == "matrix" else row_keep_mask
        return select(weight_OI, scale, self.ratio)

    def check(self, shape: LayerShape, where: str) -> None:
        """Raise ``PlanError`` unless it fits a layer of that shape."""
        if (self.ratio is None) == (self.pattern is None):
            raise PlanError(f"{where}: a mask has either a ratio or a pattern")
        if self.group not in MASK_GROUPS or (self.pattern and self.group != "row"):
            raise PlanError(f"{where}: weights cannot compete within {self.group!r} here")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise PlanError(f"{where}: mask ratio {self.ratio} is not in [0, 1)")
        if self.pattern is not None:
            n, m = self.pattern
            if not 0 < n < m or shape.hidden % m or shape.intermediate % m:
                raise PlanError(
                    f"{where}: pattern {n}:{m} does not fit rows of {shape.hidden} "
                    f"and {shape.intermediate}"
                )
        wrong = [role for role in self.roles if role not in shape.roles]
        if wrong:
            raise PlanError(f"{where}: this model's experts have no {wrong[0]!r} matrix")
        for table, width in (
            (self.scale_in_EH, shape.hidden),
            (self.scale_mid_EI, shape.intermediate),
        ):
            if table is not None and tuple(table.shape) != (shape.experts, width):
                raise PlanError(f"{where}: mask scales of shape {list(table.shape)}")


@dataclass(frozen=True)
class Neurons:
    """Rebuild every expert that stays from neurons of the old ones.

    A neuron is a row of the gate matrix, the same row of the up matrix and the same column of the
    down matrix. Merging is a weighted sum of aligned neurons of several experts, narrowing a list
    of one's own, and both are this edit. A new neuron without an entry is zero.

    Attributes:
        width: J, the neurons of every new expert.
        index_N4: int32, each entry (new expert as its position in ``keep``, its neuron, old expert,
            its neuron).
        factor_N3: float32, what multiplies the entry's gate row, up row and down column.
    """

    width: int
    index_N4: Tensor
    factor_N3: Tensor

    @classmethod
    def of_rows(cls, chosen_CJ: Tensor, keep: tuple[int, ...]) -> Neurons:
        """Narrowing: the neurons ``chosen_CJ`` of each kept expert, in that order."""
        C, J = chosen_CJ.shape
        position = torch.arange(C).repeat_interleave(J)
        neuron = torch.arange(J).repeat(C)
        expert = torch.tensor(keep).repeat_interleave(J)
        index = torch.stack((position, neuron, expert, chosen_CJ.reshape(-1).cpu()), dim=1)
        return cls(J, index.to(torch.int32), torch.ones(C * J, 3))

    @classmethod
    def of_lists(cls, chosen: Sequence[Tensor], keep: tuple[int, ...], width: int) -> Neurons:
        """Narrowing to different numbers: those of each kept expert come first, zeros behind."""
        parts = [
            torch.stack(
                (
                    torch.full_like(ids, position),
                    torch.arange(len(ids)),
                    torch.full_like(ids, expert),
                    ids,
                ),
                dim=1,
            )
            for position, (expert, ids) in enumerate(zip(keep, chosen, strict=True))
        ]
        index = torch.cat(parts)
        return cls(width, index.to(torch.int32), torch.ones(len(index), 3))

    def matrix(self, position: int, role: str, old: ExpertWeights) -> Tensor:
        """One new matrix, float32."""
        index_N4 = self.index_N4[self.index_N4[:, 0] == position].long()
        factor_N = self.factor_N3[self.index_N4[:, 0] == position, ROLES.index(role)]
        if self._is_copy(index_N4, factor_N):  # bit for bit: a sum would lose the sign of zeros
            whole = old.matrix(int(index_N4[0, 2]), role)
            if whole.shape[whole.ndim - 1 if role == "down" else 0] == self.width:
                return whole
        made: Tensor | None = None
        for expert in sorted(set(index_N4[:, 2].tolist())):  # one old matrix in memory at a time
            own = index_N4[:, 2] == expert
            source_IH = old.matrix(expert, role)
            source_IH = source_IH.T if role == "down" else source_IH
            if made is None:
                made = source_IH.new_zeros(self.width, source_IH.shape[1])
            rows_nH = source_IH[index_N4[own, 3]] * factor_N[own, None].to(source_IH)
            made.index_add_(0, index_N4[own, 1], rows_nH)
        if made is None:
            raise PlanError(f"the new expert {position} has no neurons")
        return made.T.contiguous() if role == "down" else made

    def _is_copy(self, index_N4: Tensor, factor_N: Tensor) -> bool:
        """Whether the entries of a new expert are neurons 0..J-1 of one old expert, unchanged."""
        if len(index_N4) != self.width or not bool((factor_N == 1).all()):
            return False
        own = torch.arange(self.width)
        return bool(
            (index_N4[:, 2] == index_N4[0, 2]).all()
            and torch.equal(index_N4[:, 1], own)
            and torch.equal(index_N4[:, 3], own)
        )

    def shares(self, position: int) -> dict[int, float]:
        """How much of one new expert each old one is, by the down factors of its entries; sum 1.

        It is the weight of what belongs to no neuron, such as a bias of the output.
        """
        own = self.index_N4[:, 0] == position
        expert_N, factor_N = self.index_N4[own, 2].tolist(), self.factor_N3[own, 2].tolist()
        total: dict[int, float] = {}
        for expert, factor in zip(expert_N, factor_N, strict=True):
            total[expert] = total.get(expert, 0.0) + abs(factor)
        whole = sum(total.values())
        return {expert: part / whole if whole else 0.0 for expert, part in sorted(total.items())}

    def check(self, kept: int, shape: LayerShape, where: str) -> None:
        """Raise ``PlanError`` unless it fits a layer of that shape with ``kept`` experts left."""
        index, factor = self.index_N4, self.factor_N3
        if index.ndim != 2 or index.shape[1] != 4 or tuple(factor.shape) != (len(index), 3):
            raise PlanError(f"{where}: bad list of neurons, {list(index.shape)}")
        if not 0 < self.width <= shape.intermediate:
            raise PlanError(
                f"{where}: width {self.width} of experts that have {shape.intermediate} neurons"
            )
        limits = torch.tensor([kept, self.width, shape.experts, shape.intermediate])
        if bool((index < 0).any()) or bool((index.long() >= limits).any()):
            raise PlanError(f"{where}: the list of neurons names one that does not exist")
        if len(set(index[:, 0].tolist())) != kept:
            raise PlanError(f"{where}: the list of neurons leaves an expert empty")


@dataclass(frozen=True)
class EditedExperts:
    """The matrices of the experts that stay, as a plan's layer makes them.

    Attributes:
        old: the matrices before.
        keep: ids of the experts that stay.
        neurons: how they are rebuilt; None if they are not.
        stored: matrices that take their place; None if there are none.
        ranks: by role, the rank to which each old expert's matrix is cut; empty cuts none.
        mask: weights that are zeroed; None if none are.
    """

    old: ExpertWeights
    keep: tuple[int, ...]
    neurons: Neurons | None = None
    stored: StoredWeights | None = None
    ranks: Mapping[str, tuple[int, ...]] | None = None
    mask: MaskEdit | None = None

    def matrix(self, expert: int, role: str) -> Tensor:
        """One matrix of an expert in ``keep``, by its old id, as float32."""
        if self.stored is not None and role in self.stored.roles:
            weight = self.stored.matrix(expert, role)
        elif self.neurons is not None:
            weight = self.neurons.matrix(self.keep.index(expert), role, self.old)
        else:
            weight = self.old.matrix(expert, role)
        if self.ranks and role in self.ranks:
            weight = cut_rank(weight, self.ranks[role][expert])
        if self.mask is not None and role in self.mask.roles:
            weight = weight.masked_fill(~self.mask.keep(weight, role, expert), 0.0)
        return weight


def cut_rank(weight_OI: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank in the Frobenius norm (Eckart-Young), float32."""
    if rank >= min(weight_OI.shape):
        return weight_OI
    u, s, vh = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    cut_OI: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return cut_OI.float()
