"""The sizes of one MoE layer, as every part of the package speaks of them."""

from __future__ import annotations

from dataclasses import dataclass

ROLES = ("gate", "up", "down")
"""The matrices of a gated expert: f(x) = down(act(gate x) * up x)."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer.

    Attributes:
        layer: index of the decoder layer.
        experts: E, routed experts.
        top_k: K, experts selected per token.
        hidden: H, width of an expert's input and output.
        intermediate: I, width inside an expert.
        groups: routing groups (``n_group``); 1 where routing is not limited to groups.
        top_groups: groups that a token may choose from (``topk_group``).
        roles: the expert's matrices that exist; ``("up", "down")`` where there is no gate.
    """

    layer: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    groups: int = 1
    top_groups: int = 1
    roles: tuple[str, ...] = ROLES

    def group_of(self, expert: int) -> int:
        """The routing group of an expert: groups are consecutive runs of equal length."""
        return expert * self.groups // self.experts

    @property
    def expert_parameters(self) -> int:
        """Weights in the matrices of one expert (biases and router rows not counted)."""
        return len(self.roles) * self.hidden * self.intermediate
