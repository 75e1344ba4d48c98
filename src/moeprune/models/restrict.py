"""A model in memory that computes what a plan makes of it, without writing anything.

Layers lose experts as they are loaded: the experts' matrices and the router's rows are sliced, so
that the router selects among the rest. Experts that a plan replaces stay where they are; what they
return is exchanged. It is the reference that a written checkpoint is compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.core.ops.tables import redirect_table
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite, is_experts
from moeprune.models.special import flat_matrices, matrix_role, stacked
from moeprune.models.uneven_runtime import COUNTS, recount


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

    def load_layer(self, index: int) -> None:
        """Load and restrict."""
        super().load_layer(index)
        restriction = self._restrictions.get(index)
        if restriction is None:
            return
        site = self.sites[index]
        if len(restriction.keep) < site.shape.experts:
            self._slice(site, restriction.keep)
        if restriction.constants:
            _replace_outputs(site.experts, restriction.constants, self.device)
        if restriction.zeros and self._zeros is not None:
            self._zeros.load_layer(index)
            source = self._zeros.sites[index].experts
            _copy_zeros(source, site.experts, restriction.zeros, restriction.keep)
            self._zeros.free_layer(index)

    def _slice(self, site: MoESite, keep: Sequence[int]) -> None:
        E, ids = site.shape.experts, torch.tensor(keep, device=self.device)
        sizes = {E: len(keep)}
        for tensor in site.router_tensors:
            owner, _, name = tensor.name.rpartition(".")
            module = self.model.get_submodule(owner)
            rows = torch.cat((ids, torch.arange(E, tensor.size, device=self.device)))
            sizes[tensor.size] = len(rows)  # rows beyond the experts' stay
            _set(module, name, getattr(module, name).index_select(tensor.dim, rows))
        for path in flat_matrices(site.experts):
            owner, _, name = path.rpartition(".")
            module = site.experts.get_submodule(owner)
            flat = module.get_parameter(name)
            _set(module, name, flat.view(E, -1, flat.shape[-1])[ids].flatten(0, 1))
        for name, parameter in list(site.experts.named_parameters(recurse=False)):
            if parameter.shape[0] in sizes:
                rows = torch.cat((ids, torch.arange(E, len(parameter), device=self.device)))
                _set(site.experts, name, parameter.index_select(0, rows))
        for name, table_VK in list(site.router.named_buffers(recurse=False)):
            if name in quirks.EXPERT_TABLES:
                _set(site.router, name, redirect_table(table_VK, tuple(keep), E))
        inside = (site.experts_name, *(tensor.name for tensor in site.router_tensors))
        for path, module in self.layers[site.shape.layer].named_modules():
            full = f"{self.prefix}.{site.shape.layer}.{path}"
            around = any(name == full or name.startswith(f"{full}.") for name in inside)
            if path and (around or full.startswith(f"{site.experts_name}.")):
                _recount(module, sizes)
                _recount_config(module, E, len(keep))


def _recount(module: nn.Module, sizes: Mapping[int, int]) -> None:
    recount(module, sizes)
    for name in quirks.EXPERT_COUNT_KEYS:
        value = vars(module).get(name)
        if isinstance(value, int) and value in sizes and not COUNTS.fullmatch(name):
            setattr(module, name, sizes[value])


def _recount_config(module: Any, before: int, after: int) -> None:
    """Give a module a configuration of its own, for those that read the number when they run."""
    config = vars(module).get("config")
    keys = [key for key in quirks.EXPERT_COUNT_KEYS if getattr(config, key, None) == before]
    if keys and not is_experts(module):
        module.config = copy.copy(config)
        for key in keys:
            setattr(module.config, key, after)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = value.detach()
    else:
        setattr(module, name, nn.Parameter(value.detach(), requires_grad=False))


def _replace_outputs(experts: Any, constants: Mapping[int, Tensor], device: torch.device) -> None:
    own = experts.forward
    E, H = int(experts.num_experts), len(next(iter(constants.values())))
    table_EH = torch.zeros(E, H, dtype=torch.float32, device=device)
    for expert, value_H in constants.items():
        table_EH[expert] = value_H.to(table_EH)
    gone_E = torch.zeros(E, dtype=torch.bool, device=device)
    gone_E[list(constants)] = True

    def forward(x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor, *args: Any, **kw: Any) -> Tensor:
        gone_TK = gone_E[index_TK]
        out_TH: Tensor = own(x_TH, index_TK, gate_TK.masked_fill(gone_TK, 0.0), *args, **kw)
        gates_TK = gate_TK.float().masked_fill(~gone_TK, 0.0)
        return out_TH + torch.einsum("tk,tkh->th", gates_TK, table_EH[index_TK]).to(out_TH.dtype)

    experts.forward = forward


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
