"""A plan becomes a checkpoint: tensors are sliced, renumbered or masked on disk, never in a model.

Everything is validated before the first byte is written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeprune.core.budget import least_kept
from moeprune.core.ops.masks import nm_keep_mask, prune_count, row_keep_mask
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import PlanError, UnsupportedModelError
from moeprune.files import json_bytes, new_directory, sha256_bytes
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import DiskTensor, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.native import native_class
from moeprune.models.runtime import MODELING_FILE, modeling_files, remote_class
from moeprune.models.sites import MoESite
from moeprune.models.writer import Piece, computed, copied, given, sliced, write_shards

PROVENANCE = "moeprune.json"
PLAN_COPY = "moeprune_plan.json"


@dataclass(frozen=True)
class Sizes:
    """What an edit did to the size of a model.

    Attributes:
        experts: experts with weights, over all MoE layers, before and after.
        parameters: values in all tensors, before and after.
        nonzero: the same without the weights that a mask zeroes.
        bytes: of all tensors, before and after.
    """

    experts: tuple[int, int]
    parameters: tuple[int, int]
    nonzero: tuple[int, int]
    bytes: tuple[int, int]


def apply_plan(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sizes:
    """Write the checkpoint that ``plan`` describes to ``out``.

    Raises:
        PlanError: the plan is not for this model, or asks for what its router cannot do.
        UnsupportedModelError: experts of this family cannot be edited.
        OutputError: ``out`` exists, or could not be written; nothing is left behind.
    """
    model = LayeredModel(checkpoint)
    layout = expert_layout(model)
    check_plan(model, plan)
    surgeon = _Surgeon(model, plan, layout)
    pieces = surgeon.pieces()
    config = surgeon.config()
    others = checkpoint.other_files()
    with new_directory(out, force) as work:
        write_shards(work, pieces, progress=progress)
        # raw JSON, edited: vendors' own key names stay
        (work / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for file in others:
            if file.name not in (PROVENANCE, PLAN_COPY):
                shutil.copyfile(file, work / file.name)
        for name, text in surgeon.code().items():
            (work / name).write_text(text, encoding="utf-8")
        sizes = surgeon.sizes(pieces)
        plan_bytes = json_bytes(plan.to_json(None))
        (work / PLAN_COPY).write_bytes(plan_bytes)
        (work / PROVENANCE).write_bytes(
            json_bytes(_provenance(checkpoint, plan, plan_bytes, sizes))
        )
    return sizes


def _provenance(checkpoint: Checkpoint, plan: Plan, plan_bytes: bytes, sizes: Sizes) -> Any:
    return {
        "format": "moeprune.checkpoint/1",
        "base": dict(plan.model),
        "base_fingerprint": checkpoint.fingerprint,
        "method": plan.method,
        "options": dict(plan.options),
        "budget": dict(plan.budget),
        "seed": plan.seed,
        "plan_sha256": sha256_bytes(plan_bytes),
        "statistics": dict(plan.statistics),
        "versions": dict(plan.versions),
        "experts": list(sizes.experts),
        "parameters": list(sizes.parameters),
        "nonzero_parameters": list(sizes.nonzero),
        "tensor_bytes": list(sizes.bytes),
    }


def check_plan(model: LayeredModel, plan: Plan) -> None:
    """Raise ``PlanError`` unless ``plan`` was made for this model and can be carried out on it."""
    fingerprint = plan.model.get("fingerprint")
    if fingerprint != model.checkpoint.fingerprint:
        raise PlanError(
            f"the plan was made for another model ({plan.model.get('name')}, "
            f"fingerprint {str(fingerprint)[:12]}) than {model.checkpoint.path.name} "
            f"({model.checkpoint.fingerprint[:12]})",
            "plan again for this model, or give the model that the plan names",
        )
    shapes = {index: site.shape for index, site in model.sites.items()}
    plan.check(shapes)
    counts = {}
    for index, shape in shapes.items():
        layer = plan.layers.get(index)
        remain = shape.experts if layer is None else shape.experts - len(layer.dropped)
        counts[index] = remain
        if layer is not None and layer.replaced and not layer.keep:
            raise PlanError(
                f"plan, layer {index}: all experts are replaced by constants",
                "keep the weights of at least one expert in every layer",
            )
        if layer is not None and layer.dropped:
            _check_router(layer, shape)
    if len(set(counts.values())) > 1:
        least = min(counts.values())
        raise PlanError(
            f"the plan keeps between {least} and {max(counts.values())} experts per layer; "
            "stock model classes need the same number in every layer",
            f"plan with --keep {least} or a --ratio, or edit the plan to equal counts",
        )


def _check_router(layer: LayerPlan, shape: LayerShape) -> None:
    where = f"plan, layer {layer.layer}"
    if layer.replaced:
        raise PlanError(f"{where}: deleting and replacing experts cannot be mixed")
    remain, least = len(layer.keep), least_kept(shape)
    if remain < least:
        raise PlanError(f"{where}: {remain} experts remain, its router needs {least}")
    per_group = [sum(shape.group_of(e) == g for e in layer.keep) for g in range(shape.groups)]
    if len(set(per_group)) > 1:
        raise PlanError(
            f"{where}: {per_group} experts remain in the {shape.groups} routing groups",
            "keep the same number in every group",
        )


class _Surgeon:
    """Turns a validated plan into pieces, config and code of the new checkpoint."""

    def __init__(self, model: LayeredModel, plan: Plan, layout: Mapping[str, DiskTensor]) -> None:
        self.model, self.plan, self.layout = model, plan, layout
        self.checkpoint = model.checkpoint
        self.novices = any(layer.replaced for layer in plan.layers.values())
        self.dropped = max((len(layer.dropped) for layer in plan.layers.values()), default=0)
        self._masked = 0

    def pieces(self) -> list[Piece]:
        """All tensors of the new checkpoint, in the order of the old one."""
        found: list[Piece] = []
        with_novices: set[int] = set()
        for key, info in self.checkpoint.tensors.items():
            tensor = self.layout.get(key)
            layer = None if tensor is None else self.plan.layers.get(tensor.layer)
            if tensor is None or layer is None:
                found.append(copied(key, info))
                continue
            if layer.replaced and tensor.layer not in with_novices and tensor.role == "down":
                with_novices.add(tensor.layer)
                found += self._novices(layer, tensor)
            found += self._edited(key, tensor, layer)
        return found

    def _edited(self, key: str, tensor: DiskTensor, layer: LayerPlan) -> list[Piece]:
        info = self.checkpoint.tensors[key]
        if tensor.role == "router":
            if not layer.dropped:
                return [copied(key, info)]
            # rows beyond E are not experts' (shared, zero or skip classes): they stay
            extra = range(layer.experts, info.shape[tensor.dim])
            return [sliced(key, info, tensor.dim, [*layer.keep, *extra])]
        if tensor.expert is not None:
            if tensor.expert not in layer.keep:
                return []
            number = layer.keep.index(tensor.expert) if layer.dropped else tensor.expert
            piece, experts = copied(tensor.renamed(number), info), [tensor.expert]
        else:
            piece, experts = sliced(key, info, 0, layer.keep), list(layer.keep)
        if layer.mask is not None and _is_masked(layer.mask, tensor.role):
            piece = self._mask(piece, tensor, layer.mask, experts)
        return [piece]

    def _novices(self, layer: LayerPlan, tensor: DiskTensor) -> list[Piece]:
        assert layer.novices_NH is not None
        dtype = _TORCH_DTYPES.get(self.checkpoint.tensors[tensor.key].dtype, torch.bfloat16)
        values = layer.novices_NH.to(dtype)
        if tensor.expert is None:
            name = self.model.sites[layer.layer].experts_name + ".novice_value"
            return [given(self.model.disk_name(name), values)]
        return [
            given(f"{tensor.experts_prefix}{expert}.approx_value", values[row].clone())
            for row, expert in enumerate(layer.replaced)
        ]

    def _mask(self, piece: Piece, tensor: DiskTensor, mask: MaskEdit, experts: list[int]) -> Piece:
        if piece.dtype not in _TORCH_DTYPES:
            raise UnsupportedModelError(
                f"{tensor.key} is stored as {piece.dtype}; "
                "weights can be masked in floating point only"
            )

        def make() -> Tensor:
            weight = self.checkpoint.read(tensor.key)
            if tensor.expert is None:
                weight = weight[experts]
            rows = weight if tensor.input_dim == -1 else weight.transpose(-1, -2)
            for part, expert in zip(
                rows if tensor.expert is None else [rows], experts, strict=True
            ):
                zero_masked(part, mask, tensor.role, expert)
            return weight

        self._masked += _zeros(mask, piece.shape, tensor)
        return computed(piece, make)

    def config(self) -> dict[str, Any]:
        """The new config.json.

        Raises:
            UnsupportedModelError: the number of experts is not where it should be.
        """
        config: dict[str, Any] = json.loads(json.dumps(self.checkpoint.config))
        if self.dropped:
            before = next(iter(self.model.sites.values())).shape.experts
            _set_expert_count(config, before, before - self.dropped)
        if self.novices:
            if remote_class(self.checkpoint, self.model.config) is not None:
                raise UnsupportedModelError(
                    f"{self.checkpoint.path} has classes of its own, which novices cannot extend",
                    "plan with a method that deletes experts",
                )
            native = native_class(self.model.config)
            config["approximate_experts"] = {
                str(index): list(layer.replaced)
                for index, layer in sorted(self.plan.layers.items())
                if layer.replaced
            }
            stem = MODELING_FILE.removesuffix(".py")
            # no stock class's name: a server that goes by it would leave the constants out
            config["architectures"] = [f"Novice{native.__name__}"]
            config["auto_map"] = {"AutoModelForCausalLM": f"{stem}.Novice{native.__name__}"}
        return config

    def code(self) -> dict[str, str]:
        """Generated files that the checkpoint needs to open."""
        return modeling_files(native_class(self.model.config)) if self.novices else {}

    def sizes(self, pieces: list[Piece]) -> Sizes:
        """Sizes before and after."""
        before = sum(site.shape.experts for site in self.model.sites.values())
        gone = sum(len(p.dropped) + len(p.replaced) for p in self.plan.layers.values())
        numel = self.checkpoint.numel
        after = sum(math.prod(piece.shape) for piece in pieces)
        return Sizes(
            experts=(before, before - gone),
            parameters=(numel, after),
            nonzero=(numel, after - self._masked),
            bytes=(self.checkpoint.nbytes, sum(piece.nbytes for piece in pieces)),
        )


_TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def _is_masked(mask: MaskEdit, role: str) -> bool:
    if role == "gate_up":
        if ("gate" in mask.roles) != ("up" in mask.roles):
            raise PlanError("gate and up matrices are stored together: mask both or none")
        return "gate" in mask.roles
    return role in mask.roles


def zero_masked(weight_OI: Tensor, mask: MaskEdit, role: str, expert: int) -> None:
    """Zero, in place, the weights of one expert's matrix that ``mask`` does not keep."""
    scale = mask.scale("down" if role == "down" else "gate", expert)
    if mask.pattern is not None:
        keep_OI = nm_keep_mask(weight_OI, scale, *mask.pattern)
    else:
        assert mask.ratio is not None
        keep_OI = row_keep_mask(weight_OI, scale, mask.ratio)
    weight_OI.masked_fill_(~keep_OI, 0.0)


def _zeros(mask: MaskEdit, shape: tuple[int, ...], tensor: DiskTensor) -> int:
    width = shape[tensor.input_dim]
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
    names = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
    for name, parameter in list(experts.named_parameters(recurse=False)):
        role = names.get(name)
        if role is None or not _is_masked(mask, role):
            continue
        weight = parameter.data.clone()  # the loaded tensor may be the mapped file itself
        rows = weight.transpose(-1, -2) if experts.is_transposed else weight
        for expert in layer.keep:
            zero_masked(rows[expert], mask, role, expert)
        setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))


def _set_expert_count(config: dict[str, Any], before: int, after: int) -> None:
    for part in (config, config.get("text_config"), config.get("ffn_config")):
        if not isinstance(part, dict):
            continue
        keys = [key for key in quirks.EXPERT_COUNT_KEYS if key in part]
        if keys and all(part[key] == before for key in keys):
            part.update(dict.fromkeys(keys, after))
            return
    raise UnsupportedModelError(
        f"config.json does not say {before} experts under any of "
        f"{', '.join(quirks.EXPERT_COUNT_KEYS)}"
    )
