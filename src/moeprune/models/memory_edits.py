"""Edits of a layer that is in memory, so that a walk sees what the written checkpoint computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.core.edits import EditedExperts
from moeprune.core.layer_plan import LayerPlan
from moeprune.models.loading import LayeredModel
from moeprune.models.masking import is_masked
from moeprune.models.rebuilding import BIASES, Biases, joined, mix_rows, mixed_bias, new_bias
from moeprune.models.resizing import answer, keep_experts, put, replace_outputs
from moeprune.models.sites import MoESite
from moeprune.models.special import flat_matrices, matrix_role, stacked

WIDTHS = re.compile(r"(expert_|moe_)?(intermediate|ffn_hidden|ffn|inner)_?(size|dim)|expert_dim")
"""Attributes of experts modules that hold I."""


class LoadedExperts:
    """The matrices of a layer that is in memory."""

    def __init__(self, site: MoESite) -> None:
        self._experts: Any = site.experts
        self._by_role: dict[str, str] = {}
        for name, _ in site.experts.named_parameters():
            role = matrix_role(site.experts, name)
            for part in () if role is None else role.split("_"):
                self._by_role[part] = name

    def matrix(self, expert: int, role: str) -> Tensor:
        """One matrix as float32, rows = outputs, columns = inputs."""
        name = self._by_role[role]
        weight = self._experts.get_parameter(name).data
        rows_OI: Tensor = stacked(self._experts, name, weight)[expert]
        if matrix_role(self._experts, name) == "gate_up":
            part = ("gate", "up").index(role)
            concatenated = self._experts.is_concatenated
            rows_OI = rows_OI.chunk(2)[part] if concatenated else rows_OI[part::2]
        exact = rows_OI.dtype == torch.float64
        return rows_OI.contiguous() if exact else rows_OI.float().contiguous()


def edit_in_memory(model: LayeredModel, site: MoESite, layer: LayerPlan) -> None:
    """Do to a loaded layer what ``layer`` says; freeing it brings its old form back.

    The files that it was read from stay as they are. Edits of the router and the experts' matrices
    are made here as in a checkpoint that is written, in the model's own dtype.
    """
    with model.changing:
        _edit(model, site, layer)


@contextmanager
def trying(model: LayeredModel, site: MoESite, layer: LayerPlan) -> Iterator[None]:
    """Do to a loaded layer what ``layer`` says while the block lasts; then it is as it was.

    Its own weights stay in memory beside the new ones.
    """
    with model.changing:
        restore = snapshot(model.layers[site.shape.layer], weights=True)
    try:
        edit_in_memory(model, site, layer)
        yield
    finally:
        with model.changing:
            restore()


def _edit(model: LayeredModel, site: MoESite, layer: LayerPlan) -> None:
    model.when_freed(site.shape.layer, snapshot(model.layers[site.shape.layer]))
    matrices = _new_matrices(site, layer)
    rows = _new_rows(model, site, layer)
    if layer.unroutes:
        keep_experts(model, site, layer.keep)
    for name, value in rows.items():
        owner, _, last = name.rpartition(".")
        put(model.model.get_submodule(owner), last, value)
    for name, value in matrices.items():
        owner, _, last = name.rpartition(".")
        put(site.experts.get_submodule(owner), last, value)
    before, after = site.shape.intermediate, layer.width(site.shape.intermediate)
    for module in site.experts.modules() if before != after else ():
        for name, value in list(vars(module).items()):
            if WIDTHS.fullmatch(name) and value == before:
                setattr(module, name, after)
    if layer.novices_NH is not None and layer.replaced:
        constants = dict(zip(layer.replaced, layer.novices_NH.unbind(), strict=True))
        replace_outputs(site.experts, constants, model.device)
    if layer.served_by is not None or layer.offsets_CH is not None:
        answer(site.experts, layer, model.device)


def snapshot(layer: nn.Module, weights: bool = False) -> Callable[[], None]:
    """What brings a layer's sizes, counts and classes back.

    Its weights come back on meta, or with ``weights`` as they are: they stay in memory for it.
    """
    saved = []
    for module in layer.modules():
        shapes = {
            name: p if p is None or weights else torch.empty_like(p, device="meta")
            for name, p in module._parameters.items()
        }
        saved.append((module, type(module), dict(vars(module)), shapes, dict(module._buffers)))

    def restore() -> None:
        for module, kind, state, shapes, buffers in saved:
            module.__class__ = kind
            attributes = vars(module)
            attributes.update(state)
            for name in attributes.keys() - state.keys():
                del attributes[name]
            for name, meta in shapes.items():
                value = None if meta is None else nn.Parameter(meta, requires_grad=False)
                module._parameters[name] = value
            module._buffers.update(buffers)

    return restore


def _new_matrices(site: MoESite, layer: LayerPlan) -> dict[str, Tensor]:
    """New values of the parameters of the experts module, by name."""
    experts: Any = site.experts
    edited = layer.edited(LoadedExperts(site))
    found: dict[str, Tensor] = {}
    for name, parameter in experts.named_parameters():
        role = matrix_role(experts, name)
        if layer.mask is not None and role is not None:
            is_masked(layer.mask, role)
        if role is None:
            if layer.neurons is None or name not in BIASES:
                continue
            one = _bias(layer, experts, name, parameter.data)
        elif not set(role.split("_")) & set(layer.changed_roles):
            continue
        else:
            one = _matrix(edited, experts, name, role)
        found[name] = _stack(site, layer, one, parameter.data)
    return found


def _stack(site: MoESite, layer: LayerPlan, one: Callable[[int], Tensor], old: Tensor) -> Tensor:
    """The kept experts' new values where they stand; the others are there and never used."""
    flat, E = bool(flat_matrices(site.experts)), site.shape.experts
    present = layer.keep if layer.unroutes else tuple(range(E))
    beyond = 0 if flat else len(old) - E  # identity experts
    first = one(layer.keep[0]).to(old.dtype)
    new = first.new_zeros(len(present) + beyond, *first.shape)
    for number, expert in enumerate(present):
        if expert in layer.keep:
            new[number] = first if expert == layer.keep[0] else one(expert).to(old.dtype)
    if beyond and new.shape[1:] == old.shape[1:]:
        new[len(present) :] = old[E:]
    return new.flatten(0, 1) if flat else new


def _matrix(edited: EditedExperts, experts: Any, name: str, role: str) -> Callable[[int], Tensor]:
    flat = flat_matrices(experts)
    transposed = flat[name][1] == -2 if flat else bool(experts.is_transposed)

    def one(expert: int) -> Tensor:
        if role == "gate_up":
            gate, up = edited.matrix(expert, "gate"), edited.matrix(expert, "up")
            matrix = joined(gate, up, not experts.is_concatenated)
        else:
            matrix = edited.matrix(expert, role)
        return matrix.T if transposed else matrix

    return one


def _bias(layer: LayerPlan, experts: Any, name: str, old: Tensor) -> Callable[[int], Tensor]:
    neurons, role = layer.neurons, BIASES[name]
    assert neurons is not None
    if role == "down":
        return lambda e: mixed_bias(neurons.shares(layer.keep.index(e)), lambda row: old[row])
    biases = Biases(lambda row: old[row], not experts.is_concatenated, role)
    return lambda e: new_bias(neurons, layer.keep.index(e), biases)


def _new_rows(model: LayeredModel, site: MoESite, layer: LayerPlan) -> dict[str, Tensor]:
    """New values of the router's tensors, by name, where a plan mixes their rows."""
    if layer.router_CE is None:
        return {}
    found = {}
    for tensor in site.router_tensors:
        owner, _, name = tensor.name.rpartition(".")
        old = getattr(model.model.get_submodule(owner), name).data
        rows_R = old.transpose(0, tensor.dim)
        router_CE = layer.router_CE.to(old.device)
        mixed_C = mix_rows(router_CE, rows_R, layer.experts)
        new_R = torch.cat((mixed_C, rows_R[layer.experts :]))
        found[tensor.name] = new_R.transpose(0, tensor.dim).contiguous()
    return found
