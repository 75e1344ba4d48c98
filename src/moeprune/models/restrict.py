"""A model in memory that computes what a plan makes of it, without writing anything.

Layers lose experts as they are loaded: the experts' matrices and the router's rows are sliced, so
that the router selects among the rest. Experts that a plan replaces stay where they are; what they
return is exchanged. It is the reference that a written checkpoint is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite


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
        block = self.model.get_submodule(site.experts_name.rpartition(".")[0])
        E, ids = site.shape.experts, torch.tensor(keep, device=self.device)
        for name, parameter in list(site.experts.named_parameters(recurse=False)):
            if parameter.shape[:1] == (E,):
                _set(site.experts, name, parameter.index_select(0, ids))
        for tensor in site.router_tensors:
            owner, _, name = tensor.name.rpartition(".")
            module = self.model.get_submodule(owner)
            extra = torch.arange(E, tensor.size, device=self.device)
            kept = getattr(module, name).index_select(tensor.dim, torch.cat((ids, extra)))
            _set(module, name, kept)
        for module in {block, site.experts, *site.router.modules()}:
            for name, value in list(vars(module).items()):
                if _counts_experts(name) and value == E and type(value) is int:
                    setattr(module, name, len(keep))


def _counts_experts(name: str) -> bool:
    """Whether an attribute of that name may hold E."""
    return "expert" in name and not any(part in name for part in ("tok", "top", "shared", "group"))


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
