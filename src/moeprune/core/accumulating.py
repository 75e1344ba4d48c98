"""What an accumulator is: typed sums, and the rows of tokens that it is fed.

Legend of the axes in tensor names: T tokens, n tokens routed to one expert, E experts, K selected
per token, H width of the block, I width inside an expert, R router outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from moeprune.core.shapes import LayerShape


@dataclass(frozen=True)
class ExpertRows:
    """The tokens that one batch routed to one expert; padding is not among them.

    Attributes:
        expert: e.
        x_nH: inputs of the gate and up matrices.
        gate_n: the weights that the block multiplies into the outputs, float32.
        h_nI: inputs of the down matrix, act(G x) * (U x).
        f_nH: outputs, before the gate.
    """

    expert: int
    x_nH: Tensor
    gate_n: Tensor
    h_nI: Tensor
    f_nH: Tensor


@dataclass(frozen=True)
class Origin:
    """Where the tokens of a batch come from.

    Attributes:
        token_T: their ids.
        domain_T: a key of the domain of each.
        watched_M: ids that are worth counting one by one, the same in every batch, ascending.
    """

    token_T: Tensor
    domain_T: Tensor
    watched_M: Tensor

    def of(self, real_T: Tensor) -> Origin:
        """Of some of the tokens."""
        return Origin(self.token_T[real_T], self.domain_T[real_T], self.watched_M)


@dataclass(frozen=True)
class BlockRows:
    """One batch as the MoE block saw it; padding is not among the tokens.

    Attributes:
        x_TH: inputs of the block.
        index_TK: experts selected; ids >= E are slots without an expert and count for nobody.
        gate_TK: their weights, float32.
        logits_TR: the router's first output, or None if nobody asked for it.
        key_T: one number per token, the same for the same token in every run (int64).
        origin: which tokens of which domains they are, where that is known.
    """

    x_TH: Tensor
    index_TK: Tensor
    gate_TK: Tensor
    logits_TR: Tensor | None
    key_T: Tensor
    origin: Origin | None = None


class Accumulator(ABC):
    """Typed sums over the tokens of one layer. All fields of a subclass are tensors."""

    name: ClassVar[str]
    needs_router: ClassVar[bool] = False
    sampled: ClassVar[bool] = False
    """Whether sizes that the layer's shape does not give are 0 while no token was seen."""

    @classmethod
    @abstractmethod
    def empty(cls, shape: LayerShape, device: torch.device) -> Accumulator:
        """Sums over no tokens."""

    def add_expert(self, rows: ExpertRows) -> None:  # noqa: B027  (optional hook)
        """Add the tokens of one expert in one batch."""

    def add_block(self, rows: BlockRows) -> None:  # noqa: B027  (optional hook)
        """Add one batch at the level of the block."""

    def merge(self, other: Accumulator) -> None:
        """Add the sums of ``other``, which has seen other tokens of the same layer."""
        for name, tensor in self.tensors():
            tensor.add_(getattr(other, name))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The fields and their tensors, in order of declaration."""
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            yield field.name, getattr(self, field.name)


def zeros(*sizes: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Where sums begin."""
    return torch.zeros(*sizes, dtype=dtype, device=device)
