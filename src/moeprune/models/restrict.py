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
from moeprune.models.special import flat_matrices
from moeprune.models.uneven_runtime import recount


@dataclass(frozen=True)
class Restriction:
    """What a layer computes.

    Attributes:
        keep: experts that the router selects among, in the order of the result.
        constants: by id, what an expert returns for every token [H].
        masked: whether weights are zeroed where the model under test has zeros.
    """

    keep: tuple[int, ...]
    constants: Mapping[int, Tensor] = field(default_factory=dict)
    masked: bool = False


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
        zeros: the model whose zeros are copied where a restriction is ``masked``.
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
        if restriction.masked and self._zeros is not None:
            self._zeros.load_layer(index)
            kept = [e for e in restriction.keep if e not in restriction.constants]
            _copy_zeros(self._zeros.sites[index].experts, site.experts, kept)
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
        for name, parameter in list(site.experts.named_parameters()):
            if name in flat_matrices(site.experts):
                owner, _, last = name.rpartition(".")
                matrices = parameter.view(E, -1, parameter.shape[-1])
                _set(site.experts.get_submodule(owner), last, matrices[ids].flatten(0, 1))
            elif "." in name:
                continue  # a norm inside, shared by all
            elif parameter.shape[0] in sizes:
                rows = torch.cat((ids, torch.arange(E, len(parameter), device=self.device)))
                _set(site.experts, name, parameter.index_select(0, rows))
        for name, table_VK in list(site.router.named_buffers(recurse=False)):
            if name in quirks.EXPERT_TABLES:
                _set(site.router, name, redirect_table(table_VK, tuple(keep), E))
        inside = (site.experts_name, *(tensor.name for tensor in site.router_tensors))
        for path, module in self.layers[site.shape.layer].named_modules():
            full = f"{self.prefix}.{site.shape.layer}.{path}"
            if path and any(name == full or name.startswith(f"{full}.") for name in inside):
                recount(module, sizes)
                _recount_config(module, E, len(keep))


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


def _copy_zeros(source: nn.Module, target: nn.Module, kept: Sequence[int]) -> None:
    """Zero what is zero in ``source``, whose experts are the ``kept`` ones of ``target``."""
    for name, parameter in target.named_parameters(recurse=False):
        pattern = source.get_parameter(name)
        rows = range(len(parameter)) if len(pattern) == len(parameter) else kept
        for row, expert in enumerate(rows):
            parameter.data[expert].masked_fill_(pattern[row] == 0, 0)
