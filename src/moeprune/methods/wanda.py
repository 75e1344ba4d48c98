"""Wanda (arXiv 2306.11695): zero the weights with the smallest |W| * norm of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moeprune.core.accumulators import Hidden, Inputs
from moeprune.core.column_norms import ColumnNormMethod


@dataclass(frozen=True)
class Wanda(ColumnNormMethod):
    """One-shot weight pruning inside experts; MoE-Pruner without the gates.

    ``S_ij = |W_ij| * sqrt(sum_t X_tj^2)`` over the tokens t routed to the expert, X the input of
    that matrix. In every output row the floor(ratio * inputs) weights with the lowest S are zeroed,
    or n of every m consecutive ones (``--pattern n:m``). The source averages over sequences first,
    which changes no order.

    Options: ``propagate`` and ``min_tokens``, see ``ColumnNormMethod``.
    """

    name: ClassVar[str] = "wanda"
    summary: ClassVar[str] = "zero weights inside experts by |W| x input norm; file and speed stay"
    source: ClassVar[str] = "arXiv 2306.11695"

    def squared_norms(self, inputs: Inputs, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """Sums of x^2 and h^2."""
        return inputs.sq_EH, hidden.sq_EI
