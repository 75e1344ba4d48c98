"""A loaded layer loses experts, or gets other matrices, in place.

Names of axes as in ``core.edits``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.core.layer_plan import LayerPlan
from moeprune.core.ops.tables import redirect_table
from moeprune.models import quirks
from moeprune.models.loading import LayeredModel
from moeprune.models.sites import MoESite, is_experts
from moeprune.models.special import flat_matrices
from moeprune.models.uneven_runtime import COUNTS, recount


def keep_experts(model: LayeredModel, site: MoESite, keep: Sequence[int]) -> None:
    """Take experts out of a loaded layer: their matrices, router rows and all counts of them."""
    E, ids = site.shape.experts, torch.tensor(keep, device=model.device)
    sizes = {E: len(keep)}
    for tensor in site.router_tensors:
        owner, _, name = tensor.name.rpartition(".")
        module = model.model.get_submodule(owner)
        rows = torch.cat((ids, torch.arange(E, tensor.size, device=model.device)))
        sizes[tensor.size] = len(rows)  # rows beyond the experts' stay
        put(module, name, getattr(module, name).index_select(tensor.dim, rows))
    for path in flat_matrices(site.experts):
        owner, _, name = path.rpartition(".")
        module = site.experts.get_submodule(owner)
        flat = module.get_parameter(name)
        put(module, name, flat.view(E, -1, flat.shape[-1])[ids].flatten(0, 1))
    for name, parameter in list(site.experts.named_parameters(recurse=False)):
        if parameter.shape[0] in sizes:
            rows = torch.cat((ids, torch.arange(E, len(parameter), device=model.device)))
            put(site.experts, name, parameter.index_select(0, rows))
    for name, table_VK in list(site.router.named_buffers(recurse=False)):
        if name in quirks.EXPERT_TABLES:
            put(site.router, name, redirect_table(table_VK, tuple(keep), E))
    inside = (site.experts_name, *(tensor.name for tensor in site.router_tensors))
    for path, module in model.layers[site.shape.layer].named_modules():
        full = f"{model.prefix}.{site.shape.layer}.{path}"
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


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Put values in place of a parameter or a buffer."""
    if name in module._buffers:
        module._buffers[name] = value.detach()
    else:
        setattr(module, name, nn.Parameter(value.detach(), requires_grad=False))


def replace_outputs(experts: Any, constants: Mapping[int, Tensor], device: torch.device) -> None:
    """Let some experts of a loaded layer return constants or affine maps, each times its gate.

    Vectors longer than the block is wide are maps, packed as in ``LayerPlan.novices_NH``.
    """
    own = experts.forward
    E, H = int(experts.num_experts), len(next(iter(constants.values())))
    table_EH = torch.zeros(E, H, dtype=torch.float32, device=device)
    for expert, value_H in constants.items():
        table_EH[expert] = value_H.to(table_EH)
    gone_E = torch.zeros(E, dtype=torch.bool, device=device)
    gone_E[list(constants)] = True

    def mapped(x_TH: Tensor, index_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """The part B A x of every replaced expert, one after the other."""
        added_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        width = x_TH.shape[-1]
        for expert in constants if width < H else ():
            a_rH, bt_rH = table_EH[expert, width:].view(2, -1, width)
            gate_T1 = gates_TK.masked_fill(index_TK != expert, 0.0).sum(dim=1, keepdim=True)
            added_TH += gate_T1 * ((x_TH.float() @ a_rH.T) @ bt_rH)
        return added_TH

    def forward(x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor, *args: Any, **kw: Any) -> Tensor:
        gone_TK = gone_E[index_TK]
        out_TH: Tensor = own(x_TH, index_TK, gate_TK.masked_fill(gone_TK, 0.0), *args, **kw)
        gates_TK = gate_TK.float().masked_fill(~gone_TK, 0.0)
        rows_TKH = table_EH[index_TK, : x_TH.shape[-1]]
        added_TH = torch.einsum("tk,tkh->th", gates_TK, rows_TKH)
        return out_TH + (added_TH + mapped(x_TH, index_TK, gates_TK)).to(out_TH.dtype)

    experts.forward = forward


def answer(experts: Any, layer: LayerPlan, device: torch.device) -> None:
    """Let kept experts of a loaded layer answer for others, and add constants to their outputs.

    Unless the router lost rows, all experts are still there; ids from E on are no experts.
    """
    own, E = experts.forward, len(layer.keep) if layer.unroutes else layer.experts
    served_E = torch.arange(E) if layer.served_by is None else torch.tensor(layer.served_by)
    served_E = served_E.to(device)
    table_EH: Tensor | None = None
    if layer.offsets_CH is not None:
        width = layer.offsets_CH.shape[1]
        # the row behind the experts' is for slots without one
        table_EH = torch.zeros(E + 1, width, dtype=torch.float32, device=device)
        present = range(E) if layer.unroutes else layer.keep
        table_EH[list(present)] = layer.offsets_CH.to(table_EH)

    def forward(x_TH: Tensor, index_TK: Tensor, gate_TK: Tensor, *args: Any, **kw: Any) -> Tensor:
        inside_TK = index_TK < E
        mapped_TK = torch.where(inside_TK, served_E[index_TK.clamp(max=E - 1)], index_TK)
        out_TH: Tensor = own(x_TH, mapped_TK, gate_TK, *args, **kw)
        if table_EH is None:
            return out_TH
        rows_TKH = table_EH[torch.where(inside_TK, mapped_TK, E)]
        added_TH = torch.einsum("tk,tkh->th", gate_TK.float(), rows_TKH)
        return out_TH + added_TH.to(out_TH.dtype).view_as(out_TH)

    experts.forward = forward
