"""What a mask means for matrices as they are stored: gate and up may be one."""

from __future__ import annotations

import math

from moeprune.core.ops.masks import prune_count
from moeprune.core.plan import MaskEdit
from moeprune.errors import PlanError
from moeprune.models.layout import DiskTensor


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
