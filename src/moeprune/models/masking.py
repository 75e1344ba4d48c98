"""Zeroes the weights that a mask does not keep: in a file that is written, or in a loaded layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeprune.core.ops.masks import prune_count
from moeprune.core.plan import LayerPlan, MaskEdit
from moeprune.errors import PlanError
from moeprune.models.layout import DiskTensor
from moeprune.models.sites import MoESite
from moeprune.models.special import matrix_role, stacked


def is_masked(mask: MaskEdit, role: str) -> bool:
    """Whether matrices of a role, or both roles of a ``gate_up``, are masked.

    Raises:
        PlanError: one half of a fused matrix is, and the other is not.
    """
    if role == "gate_up":
        if ("gate" in mask.roles) != ("up" in mask.roles):
            raise PlanError("gate and up matrices are stored together: mask both or none")
        return "gate" in mask.roles
    return role in mask.roles


def zero_masked(
    weight_OI: Tensor, mask: MaskEdit, role: str, expert: int, interleaved: bool = False
) -> None:
    """Zero, in place, the weights of one expert's matrix that ``mask`` does not keep.

    ``interleaved`` says whether the rows of a ``gate_up`` alternate between gate and up: the two
    are matrices of their own where weights compete within a matrix.
    """
    for part_OI in single_matrices(weight_OI, role, interleaved):
        keep_OI = mask.keep(part_OI, "down" if role == "down" else "gate", expert)
        part_OI.masked_fill_(~keep_OI, 0.0)


def single_matrices(weight_OI: Tensor, role: str, interleaved: bool) -> tuple[Tensor, ...]:
    """Views of the gate and the up matrix in a ``gate_up``; any other matrix as it is."""
    if role != "gate_up":
        return (weight_OI,)
    if interleaved:
        return weight_OI[0::2], weight_OI[1::2]
    gate_OI, up_OI = weight_OI.chunk(2)
    return gate_OI, up_OI


def zeros_of(mask: MaskEdit, shape: tuple[int, ...], tensor: DiskTensor) -> int:
    """How many weights of a tensor of that shape a mask zeroes."""
    if mask.pattern is None and mask.group == "matrix":
        assert mask.ratio is not None
        experts = shape[0] // tensor.rows if tensor.expert is None else 1
        matrices = experts * (2 if tensor.role == "gate_up" else 1)
        return matrices * prune_count(math.prod(shape) // matrices, mask.ratio)
    width = shape[tensor.input_dim] if tensor.input_dim == -1 or tensor.rows == 1 else tensor.rows
    if mask.pattern is not None:
        per_row = width // mask.pattern[1] * mask.pattern[0]
    else:
        assert mask.ratio is not None
        per_row = prune_count(width, mask.ratio)
    return math.prod(shape) // width * per_row


def mask_in_memory(site: MoESite, layer: LayerPlan) -> None:
    """Zero a loaded layer's weights as ``layer.mask`` says, so that later layers see the effect."""
    mask, experts = layer.mask, site.experts
    if mask is None:
        return
    interleaved = not experts.is_concatenated
    for name, parameter in list(experts.named_parameters()):
        role = matrix_role(experts, name)
        if role is None or not is_masked(mask, role):
            continue
        weight = parameter.data.clone()  # the loaded tensor may be the mapped file itself
        rows_EOI = stacked(experts, name, weight)
        for expert in layer.keep:
            zero_masked(rows_EOI[expert], mask, role, expert, interleaved)
        owner, _, last = name.rpartition(".")
        masked = torch.nn.Parameter(weight, requires_grad=False)
        setattr(experts.get_submodule(owner), last, masked)
