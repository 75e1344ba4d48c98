"""A model in memory that computes what a plan makes of it, without writing anything.

Layers lose experts as they are loaded: the experts' matrices and the router's rows are sliced, so
that the router selects among the rest. Experts that a plan replaces stay where they are; what they
return is exchanged. It is the reference that a written checkpoint is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moeprune.core.layer_plan import LayerPlan
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import edit_in_memory
from moeprune.models.resizing import keep_experts, replace_outputs
from moeprune.models.special import matrix_role, stacked


@dataclass(frozen=True)
class Restriction:
    """What a layer computes.

    Attributes:
        keep: experts that the router selects among, in the order of the result.
        constants: by id, what an expert returns for every token [H].
        zeros: by id, the row of the model under test whose zeros an expert takes.
    """

    keep: tuple[int, ...]
    constants: Mapping[int, Tensor] = field(default_factory=dict)
    zeros: Mapping[int, int] = field(default_factory=dict)


class AlignedModel(LayeredModel):
    """Weights are copied to aligned addresses: matrix kernels round by the address of operands."""

    changes = True

    def beside(self, index: int) -> int:
        """Parameters are copied one after another."""
        return max((_nbytes(p) for p in self.layers[index].parameters()), default=0)

    def load_resident(self) -> None:
        """As the base class."""
        super().load_resident()
        _align(self.model.get_output_embeddings())

    def load_layer(self, index: int) -> None:
        """As the base class."""
        super().load_layer(index)
        _align(self.layers[index])


def _align(module: nn.Module | None) -> None:
    for parameter in () if module is None else module.parameters():
        parameter.data = parameter.data.clone()


class RestrictedModel(AlignedModel):
    """The original, restricted as its layers are loaded; it can be walked once.

    Args:
        checkpoint: the original.
        restrictions: by layer.
        zeros: the model under test.
        dtype, device: as in ``LayeredModel``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        restrictions: Mapping[int, Restriction],
        zeros: LayeredModel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(checkpoint, dtype, device)
        self._restrictions = restrictions
        self._zeros = zeros

    def beside(self, index: int) -> int:
        """A parameter and what is kept of it; and the layer whose zeros are taken over."""
        restriction = self._restrictions.get(index)
        zeros = restriction is not None and restriction.zeros and self._zeros is not None
        other = sum(map(_nbytes, self.layers[index].parameters())) if zeros else 0
        return super().beside(index) + other

    def load_layer(self, index: int) -> None:
        """Load and restrict."""
        super().load_layer(index)
        restriction = self._restrictions.get(index)
        if restriction is None:
            return
        site = self.sites[index]
        if len(restriction.keep) < site.shape.experts:
            keep_experts(self, site, restriction.keep)
        if restriction.constants:
            replace_outputs(site.experts, restriction.constants, self.device)
        if restriction.zeros and self._zeros is not None:
            self._zeros.load_layer(index)
            source = self._zeros.sites[index].experts
            _copy_zeros(source, site.experts, restriction.zeros, restriction.keep)
            self._zeros.free_layer(index)


class PlannedModel(AlignedModel):
    """The original, edited as its layers are loaded; it can be walked once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layers: Mapping[int, LayerPlan],
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(checkpoint, dtype, device)
        self._planned = layers

    def beside(self, index: int) -> int:
        """What an edit makes new is no larger than the layer."""
        return super().beside(index) + sum(map(_nbytes, self.layers[index].parameters()))

    def load_layer(self, index: int) -> None:
        """Load and edit."""
        super().load_layer(index)
        if index in self._planned:
            edit_in_memory(self, self.sites[index], self._planned[index])


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy_zeros(
    source: nn.Module, target: nn.Module, rows: Mapping[int, int], keep: Sequence[int]
) -> None:
    """Zero in the experts of ``target`` what is zero in their rows of ``source``."""
    for name, parameter in target.named_parameters():
        if matrix_role(target, name) is None:
            continue
        pattern_EOI = stacked(source, name, source.get_parameter(name).data)
        values_EOI = stacked(target, name, parameter.data)
        for expert, row in rows.items():
            values_EOI[keep.index(expert)].masked_fill_(pattern_EOI[row] == 0, 0)
