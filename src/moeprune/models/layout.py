"""Which tensor on disk is which expert's, and which rows of a router belong to which expert.

The mapping is transformers' own (its conversion mapping from checkpoint names to parameters), so
per-expert and fused checkpoints, renamed and transposed ones are all read the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.core_model_loading import Interleave, MergeModulelist, Transpose

from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint, TensorInfo
from moeprune.models.generated import ANSWER_KEYS
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.quantised import ACTIVATION_SCALES, Quantised, read
from moeprune.models.sites import MoESite
from moeprune.models.special import flat_matrices

_EXPERT_INDEX = re.compile(r"(?P<head>.*experts\.)(?P<expert>\d+)(?P<tail>\..*)")


@dataclass(frozen=True)
class DiskTensor:
    """A tensor on disk that an edit of the experts touches.

    Attributes:
        key: its name.
        layer: the MoE layer.
        role: ``gate``, ``up``, ``down``, ``gate_up`` (both, fused), ``other`` (biases, scales of
            quantised weights, and what identity experts have), ``router`` or ``table`` (experts by
            token id, which ``redirect_table`` rewrites when experts are deleted).
        expert: whose it is, where experts are stored one by one; None where they are fused.
        dim: the axis with one entry per expert, where they are fused and for routers.
        input_dim: the axis of the matrix's inputs: -1, or -2 where it is stored transposed.
        interleaved: whether the rows of a ``gate_up`` alternate between gate and up.
        rows: entries along ``dim`` per expert, where all experts are stored as one matrix.
        quantised: the weight that it is a part of, if that is quantised; ``input_dim`` is then an
            axis of the weight.
    """

    key: str
    layer: int
    role: str
    expert: int | None
    dim: int = 0
    input_dim: int = -1
    interleaved: bool = False
    rows: int = 1
    quantised: Quantised | None = None

    def renamed(self, expert: int) -> str:
        """The name under another expert's id."""
        match = _EXPERT_INDEX.fullmatch(self.key)
        assert match is not None, "only per-expert tensors are renamed"
        return f"{match['head']}{expert}{match['tail']}"

    @property
    def experts_prefix(self) -> str:
        """The name up to and including ``experts.``."""
        match = _EXPERT_INDEX.fullmatch(self.key)
        assert match is not None, "only per-expert tensors have an id in their name"
        return match["head"]


def expert_layout(model: LayeredModel) -> dict[str, DiskTensor]:
    """All tensors that belong to experts or have one entry per expert, by name on disk.

    Raises:
        UnsupportedModelError: the model's experts cannot be edited on disk; the message says why.
    """
    refuse(model)
    found: dict[str, DiskTensor] = {}
    unknown: list[str] = []
    for key, info in model.checkpoint.tensors.items():
        part = model.quantisation.parts.get(key)
        weight = key if part is None else part.name
        name, pattern = model.target(weight)
        if name is None:
            unknown.append(key)
            continue
        site = model.sites.get(model.group(name))
        if site is None:
            continue
        whole = info if part is None else replace(info, shape=part.shape)
        tensor = _router_tensor(weight, name, whole, site)
        if tensor is None and name.startswith(site.experts_name + "."):
            tensor = _expert_tensor(weight, name, pattern, whole, site, model)
        if tensor is not None and part is not None:
            tensor = _part_of(tensor, key, part)
        if tensor is not None:
            found[key] = tensor
    found |= _companions(unknown, found, model)
    for site in model.sites.values():
        _refuse_incomplete([t for t in found.values() if t.layer == site.shape.layer], site)
    return found


def _part_of(weight: DiskTensor, key: str, part: Quantised) -> DiskTensor | None:
    """Values and scales of experts go where the weight would; scales of routers stay."""
    if key == part.stored:
        return replace(weight, key=key, quantised=part)
    if weight.role == "router":
        return None
    return replace(weight, key=key, role="other", quantised=part)


def _companions(
    unknown: list[str], found: dict[str, DiskTensor], model: LayeredModel
) -> dict[str, DiskTensor]:
    """Tensors beside the experts' that transformers does not load go where the experts go.

    Raises:
        UnsupportedModelError: a tensor is an expert's, but it cannot be said whose.
    """
    experts = [tensor for tensor in found.values() if tensor.role != "router"]
    single = {t.experts_prefix: t for t in experts if t.expert is not None}
    fused = {t.key.rpartition(".")[0] + ".": t for t in experts if t.expert is None}
    companions = {}
    for key in unknown:
        match = _EXPERT_INDEX.fullmatch(key)
        parent = key.rpartition(".")[0] + "."
        if match is not None:
            known = single.get(match["head"])
            expert = int(match["expert"])
            if known is None:
                continue  # of another block than the model's own: see attached.py
            if expert >= model.sites[known.layer].shape.experts:
                raise _not_loaded(key)
            companions[key] = DiskTensor(key, known.layer, "other", expert)
        elif parent in fused and parent not in single:
            layer = fused[parent].layer
            shape = model.checkpoint.tensors[key].shape
            if not key.endswith(ACTIVATION_SCALES):
                raise _not_loaded(key)
            if shape[:1] == (model.sites[layer].shape.experts,):
                companions[key] = DiskTensor(key, layer, "other", None)
            elif math.prod(shape) != 1:
                raise UnsupportedModelError(f"{key}: {list(shape)} has no entry per expert")
    return companions


def _not_loaded(key: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{key} stands beside experts, and transformers does not load it: what it is for is unknown"
    )


def _refuse_incomplete(tensors: list[DiskTensor], site: MoESite) -> None:
    """Raise unless every matrix of every expert of a layer is stored, and of no other expert."""
    stored: dict[str, set[int | None]] = {}
    for tensor in tensors:
        for role in ("gate", "up") if tensor.role == "gate_up" else (tensor.role,):
            stored.setdefault(role, set()).add(tensor.expert)
    for role in site.shape.roles:
        ids = stored.get(role, set())
        if ids not in ({None}, set(range(site.shape.experts))):
            raise CheckpointError(
                f"layer {site.shape.layer} has {site.shape.experts} experts by its configuration, "
                f"but {len(ids)} {role} matrices are stored, or not those of its experts",
                "the checkpoint is incomplete, or not of this config.json",
            )


def refuse(model: LayeredModel) -> None:
    """Raise ``UnsupportedModelError`` if the model has no experts, or none that we can edit."""
    kind = text_config(model.config).model_type
    for name in (kind, model.config.model_type):
        if name in quirks.REFUSED:
            raise UnsupportedModelError(f"{name} is not supported: {quirks.REFUSED[name]}")
    if not model.sites and type(model.model).__module__.startswith("transformers_modules."):
        raise UnsupportedModelError(
            f"the classes that {model.checkpoint.path} brings have no experts modules of the kind "
            "that transformers has: their experts cannot be found"
        )
    if not model.sites:
        raise UnsupportedModelError(
            f"{model.checkpoint.path} is a dense model ({kind}): it has no experts to prune",
            "moeprune works on Mixture-of-Experts models",
        )
    if getattr(text_config(model.config), "approximate_experts", None):
        raise UnsupportedModelError(
            f"some experts of {model.checkpoint.path} are constants already",
            "prune the original model instead",
        )
    if any(getattr(text_config(model.config), key, None) for key in ANSWER_KEYS):
        raise UnsupportedModelError(
            f"experts of {model.checkpoint.path} answer for others, or have constants, already",
            "prune the original model instead",
        )
    model.quantisation.refuse()


def _router_tensor(key: str, name: str, info: TensorInfo, site: MoESite) -> DiskTensor | None:
    for tensor in site.router_tensors:
        if tensor.name == name:
            if len(info.shape) <= tensor.dim or info.shape[tensor.dim] != tensor.size:
                raise UnsupportedModelError(f"{key}: {list(info.shape)} is not the router's shape")
            return DiskTensor(key, site.shape.layer, "router", None, tensor.dim)
    if name.rpartition(".")[2] in quirks.EXPERT_TABLES:
        if len(info.shape) != 2:
            raise UnsupportedModelError(f"{key}: {list(info.shape)} is not a table's shape")
        return DiskTensor(key, site.shape.layer, "table", None)
    return None


def _expert_tensor(
    key: str, name: str, pattern: str | None, info: TensorInfo, site: MoESite, model: LayeredModel
) -> DiskTensor | None:
    parameter = name.removeprefix(site.experts_name + ".")
    flat = flat_matrices(site.experts).get(parameter)
    if flat is not None:
        flat_role, axis = flat
        rows = site.shape.intermediate
        tensor = DiskTensor(key, site.shape.layer, flat_role, None, 0, axis, rows=rows)
        _check_shape(tensor, info, site)
        return tensor
    if "." in parameter or parameter == "novice_value":
        return None  # a norm inside the experts module, shared by all of them
    role = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}.get(parameter, "other")
    transposed = bool(site.experts.is_transposed)
    interleaved = not site.experts.is_concatenated
    per_expert = False
    if pattern is not None:
        converter = model.converter(pattern)
        per_expert = any(isinstance(op, MergeModulelist) for op in converter.operations)
        loaded = tuple(getattr(site.experts, parameter).shape)
        transposed ^= any(_transposes(op, info.shape, loaded) for op in converter.operations)
        interleaved ^= any(isinstance(op, Interleave) for op in converter.operations)
        if role == "gate_up" and len(converter.source_patterns) == 2:
            role = ("gate", "up")[converter.source_patterns.index(pattern)]
    match = _EXPERT_INDEX.fullmatch(key)
    if per_expert and match is None:
        raise UnsupportedModelError(f"{key}: no expert id in its name")
    expert = int(match["expert"]) if per_expert and match is not None else None
    if expert is not None and expert >= site.shape.experts:
        role = "other"  # an identity expert's: stored, never used
    axis = -2 if transposed else -1
    tensor = DiskTensor(key, site.shape.layer, role, expert, 0, axis, interleaved)
    _check_shape(tensor, info, site)
    return tensor


def _transposes(operation: object, stored: tuple[int, ...], loaded: tuple[int, ...]) -> bool:
    """Whether a conversion turns the matrices; some look at the shape, as both layouts exist."""
    return isinstance(operation, Transpose) and not (operation.check_dims and stored == loaded)


def _check_shape(tensor: DiskTensor, info: TensorInfo, site: MoESite) -> None:
    shape = site.shape
    fits = tensor.expert is not None or info.shape[0] == shape.experts * tensor.rows
    if tensor.rows > 1:
        fits = fits and info.shape[1:] == (shape.hidden,)
    elif tensor.role != "other":
        width = shape.intermediate if tensor.role == "down" else shape.hidden
        fits = fits and len(info.shape) >= 2 and info.shape[tensor.input_dim] == width
    if not fits:
        raise UnsupportedModelError(
            f"{tensor.key}: unexpected shape {list(info.shape)} for {shape.experts} experts of "
            f"{shape.hidden} x {shape.intermediate}"
        )


class DiskExperts:
    """One layer's expert matrices, read from disk when asked for.

    With ``written`` they are what an edit starts from: quantised weights are those that a
    dequantised checkpoint would hold, in bf16, and float64 stays float64.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Mapping[str, DiskTensor],
        site: MoESite,
        written: bool = False,
    ) -> None:
        self._checkpoint, self._written = checkpoint, written
        self._tensors = {
            (tensor.role, tensor.expert): tensor
            for tensor in layout.values()
            if tensor.layer == site.shape.layer and tensor.role not in ("router", "table", "other")
        }

    def matrix(self, expert: int, role: str) -> Tensor:
        """One matrix as float32 [outputs, inputs]."""
        single = self._tensors.get((role, expert))
        if single is not None:
            return self._oriented(self._read(single), single)
        fused = self._tensors.get((role, None))
        if fused is not None:
            return self._oriented(self._read(fused, expert), fused)
        both = self._tensors[("gate_up", None)]
        stacked = self._oriented(self._read(both, expert), both)
        if both.interleaved:
            return stacked[("gate", "up").index(role) :: 2].contiguous()
        return stacked.chunk(2)[("gate", "up").index(role)].contiguous()

    def _read(self, tensor: DiskTensor, row: int | None = None) -> Tensor:
        if tensor.quantised is not None:
            dtype = torch.bfloat16 if self._written else torch.float32
            return read(self._checkpoint, tensor.quantised, row, dtype)
        if row is None:
            return self._checkpoint.read(tensor.key)
        if tensor.rows > 1:
            return self._checkpoint.read_rows(tensor.key, row * tensor.rows, tensor.rows)
        return self._checkpoint.read_row(tensor.key, row)

    def _oriented(self, tensor: Tensor, disk: DiskTensor) -> Tensor:
        tensor = tensor.T if disk.input_dim == -2 else tensor
        exact = self._written and tensor.dtype == torch.float64
        return tensor.to(tensor.dtype if exact else torch.float32).contiguous()


def read_router(
    checkpoint: Checkpoint, layout: Mapping[str, DiskTensor], layer: int
) -> dict[str, Tensor]:
    """A router's tensors with one entry per output, float32, that axis first, by name."""
    found = {}
    for tensor in layout.values():
        if tensor.layer == layer and tensor.role == "router":
            if tensor.quantised is not None:
                value = read(checkpoint, tensor.quantised)
            else:
                value = checkpoint.read(tensor.key)
            found[tensor.key] = value.movedim(tensor.dim, 0).to(torch.float32).contiguous()
    return found
