"""MoE-Pruner (arXiv 2410.12013): zero the weights with the smallest |W| * norm of gated inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeprune.core.accumulators import Hidden, Inputs
from moeprune.core.column_norms import ColumnNormMethod


@dataclass(frozen=True)
class MoEPruner(ColumnNormMethod):
    """One-shot weight pruning inside experts, equation 9 of the paper.

    ``S_ij = |W_ij| * sqrt(sum_t (g_te X_tj)^2)`` over the tokens t routed to expert e, where X is
    the input of that matrix and g the gate that the block multiplies into the output. In every
    output row the floor(ratio * inputs) weights with the lowest S are zeroed, or n of every m
    consecutive ones (``--pattern n:m``). Nothing else changes: same shapes, same router.

    Options: ``propagate`` (``pruned``, as the text says; ``dense``, the literal Algorithm 1) and
    ``min_tokens``, see ``ColumnNormMethod``.
    """

    name: ClassVar[str] = "moe-pruner"
    summary: ClassVar[str] = (
        "zero weights inside experts by |W| x gated input norm; file and speed stay"
    )
    source: ClassVar[str] = "arXiv 2410.12013"

    def squared_norms(self, inputs: Inputs, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Sums of (g x)^2 and (g h)^2."""
        return inputs.gated_sq_EH, hidden.gated_sq_EI
