"""Experts modules without transformers' experts interface, described so that they follow it.

What is special about each is data in ``quirks``; this module is what the data means.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks


def describe(model: nn.Module) -> None:
    """Set the interface's flags on the experts of a model whose classes do not have them.

    Forward passes are not changed: flags only say how the matrices are stored.
    """
    module: Any
    for module in model.modules():
        if type(module).__name__ in quirks.UNDECORATED:
            module.is_transposed = quirks.UNDECORATED[type(module).__name__]
            module.has_gate = module.is_concatenated = True
            module.has_bias = module.has_post_expert_norm = False
            module._apply_gate = MethodType(_apply_gate, module)


def _apply_gate(experts: Any, gate_up_nJ: Tensor) -> Tensor:
    gate_nI, up_nI = gate_up_nJ.chunk(2, dim=-1)
    hidden: Tensor = experts.act_fn(gate_nI) * up_nI
    return hidden


def flat_matrices(experts: nn.Module) -> dict[str, tuple[str, int]]:
    """Parameters that hold all experts' matrices as one, [E * I, H]: see ``FLAT_MATRICES``."""
    return quirks.FLAT_MATRICES.get(type(experts).__name__, {})


def expert_sizes(experts: Any) -> tuple[int, int, int]:
    """E, H and I of an experts module."""
    if flat_matrices(experts):
        E = int(experts.num_experts)
        if E < 1:
            raise UnsupportedModelError(f"{type(experts).__name__} has {E} experts")
        rows, hidden = experts.get_parameter(next(iter(flat_matrices(experts)))).shape
        return E, int(hidden), int(rows) // E
    if experts.down_proj is None:
        raise UnsupportedModelError(f"{type(experts).__name__} has no experts")
    E, a, b = (int(n) for n in experts.down_proj.shape)
    return (E, b, a) if experts.is_transposed else (E, a, b)


def matrix_role(experts: nn.Module, parameter: str) -> str | None:
    """``gate``, ``up``, ``down`` or ``gate_up``; None for what is no matrix of an expert."""
    if parameter in flat_matrices(experts):
        return flat_matrices(experts)[parameter][0]
    return {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}.get(parameter)


def stacked(experts: Any, parameter: str, weight: Tensor) -> Tensor:
    """A view of ``weight``, the values of a matrix parameter, as [E, outputs, inputs]."""
    flat = flat_matrices(experts)
    transposed = flat[parameter][1] == -2 if flat else bool(experts.is_transposed)
    if flat:
        weight = weight.view(int(experts.num_experts), -1, weight.shape[-1])
    return weight.transpose(-1, -2) if transposed else weight
