"""A plan becomes the tensors, the configuration and the code of the new checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moeprune.core.ops.tables import redirect_table
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.models.attached import (
    KEEP_PRUNED,
    Attached,
    check_choice,
    without_heads,
)
from moeprune.models.byte_exact import (
    kept_by_module,
    renumbered,
)
from moeprune.models.counts import (
    PAD_BIAS,
    Slots,
    kept_counts,
    padded_slots,
    set_counts,
)
from moeprune.models.generated import (
    GeneratedCode,
    answer_code,
    novice_code,
    set_code,
    uneven_code,
)
from moeprune.models.layout import DiskTensor
from moeprune.models.loading import LayeredModel
from moeprune.models.native import model_class, native_class, remote_class
from moeprune.models.novices import set_novices
from moeprune.models.quantised import (
    bf16_piece,
    parameters,
    parameters_of,
    with_description,
    without_description,
)
from moeprune.models.rebuilding import Rebuilder
from moeprune.models.sites import resize_facts
from moeprune.models.width import set_width
from moeprune.models.writer import TORCH_DTYPES, Piece, computed, copied, given, sliced, zeros


@dataclass(frozen=True)
class Sizes:
    """What an edit did to the size of a model.

    Attributes:
        experts: experts with weights, over all MoE layers, before and after.
        parameters: values in all tensors, before and after.
        nonzero: the same without the weights that a mask zeroes.
        bytes: of all tensors, before and after.
        attached: what was done to how many tensors of heads that transformers does not load
            (see ``models.attached``); empty if there are none.
    """

    experts: tuple[int, int]
    parameters: tuple[int, int]
    nonzero: tuple[int, int]
    bytes: tuple[int, int]
    attached: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Sizes:
        """What ``dataclasses.asdict`` made, as JSON gives it back."""
        pairs = {name: tuple(told[name]) for name in ("experts", "parameters", "nonzero", "bytes")}
        return cls(**pairs, attached=told["attached"])


@dataclass(frozen=True)
class Writing:
    """How a plan is written, where the plan leaves a choice.

    Attributes:
        pad: fill layers that keep fewer experts than others with pads that are never chosen, so
            that stock classes open the result; refused where that would not be exact.
        mtp: what happens to attached prediction layers, which transformers does not load: they
            are pruned like the nearest layer (``keep-pruned``) or left out (``drop``). A plan that
            deletes no expert leaves routers and counts as they are; heads are then copied whole.
        dequantize: quantised weights become bf16, all together, instead of keeping their bytes.

    Raises:
        MoepruneError: ``mtp`` is neither.
    """

    pad: bool = False
    mtp: str = KEEP_PRUNED
    dequantize: bool = False

    def __post_init__(self) -> None:
        check_choice(self.mtp)


class Editor:
    """Turns a validated plan into pieces, config and code of the new checkpoint."""

    def __init__(
        self,
        model: LayeredModel,
        plan: Plan,
        layout: Mapping[str, DiskTensor],
        attached: Attached,
        writing: Writing,
    ) -> None:
        shapes = {index: site.shape for index, site in model.sites.items()}
        self.counts = kept_counts(shapes, plan)
        if writing.pad:
            self.counts = dict.fromkeys(self.counts, max(self.counts.values()))
            plan = replace(plan, layers=_whole(shapes) | dict(plan.layers))
        self.model, self.plan, self.layout, self.attached = model, plan, layout, attached
        self.checkpoint, self.quantisation = model.checkpoint, model.quantisation
        self.dequantized = self.quantisation.method if writing.dequantize else None
        self.novices = any(layer.replaced for layer in plan.layers.values())
        self.answers = any(layer.answers for layer in plan.layers.values())
        self._slots = {
            index: padded_slots(layer.keep, shapes[index], self.counts[index])
            for index, layer in plan.layers.items()
            # with novices, and with experts that answer for others, everybody's id stays
            if not layer.replaced and layer.served_by is None
        }
        self.rebuilder = Rebuilder(model, layout)

    def pieces(self) -> list[Piece]:
        """All tensors of the new checkpoint, in the order of the old one."""
        found: list[Piece] = []
        with_novices: set[int] = set()
        with_offsets: set[int] = set()
        for key in self.checkpoint.tensors:
            if self.dequantized and self.quantisation.is_scale(key):
                continue
            if key in self.attached.keys:
                found += self._of_head(key)
                continue
            tensor = self.layout.get(key)
            layer = None if tensor is None else self.plan.layers.get(tensor.layer)
            if tensor is None or layer is None:
                found.append(self._copied(key))
                continue
            if layer.replaced and tensor.layer not in with_novices and tensor.role == "down":
                with_novices.add(tensor.layer)
                found += self._novices(layer, tensor)
            if (
                layer.offsets_CH is not None
                and tensor.layer not in with_offsets
                and tensor.role == "down"
            ):
                with_offsets.add(tensor.layer)
                found += self._offsets(layer, tensor)
            found += self._edited(key, tensor, layer)
        return found

    def _of_head(self, key: str) -> list[Piece]:
        if self.attached.dropped:
            return []
        tensor = self.attached.tensors.get(key)
        layer = None if tensor is None else self.plan.layers.get(tensor.layer)
        if tensor is None or layer is None:
            return [self._copied(key)]
        return self._edited(key, tensor, only_deleting(layer))  # a head was not observed

    def _edited(self, key: str, tensor: DiskTensor, layer: LayerPlan) -> list[Piece]:
        info = self.checkpoint.tensors[key]
        slots = self._slots.get(layer.layer)
        if tensor.role == "router":
            if slots is None:
                return [self._copied(key)]
            # rows beyond E are not experts' (shared, zero or skip classes): they stay
            extra = range(layer.experts, info.shape[tensor.dim])
            fill = 0.0 if info.numel != info.shape[tensor.dim] else PAD_BIAS
            piece = self._sliced(tensor, [*slots, *extra], fill)
            mixed = layer.router_CE is not None
            return [self.rebuilder.router(piece, tensor, layer, slots) if mixed else piece]
        if tensor.role == "table":
            return [self._table(key, layer) if layer.unroutes else copied(key, info)]
        if tensor.expert is not None:
            return self._numbered(tensor, layer)
        slots = layer.keep if slots is None else slots
        return [self._values(self._sliced(tensor, slots), tensor, layer, slots)]

    def _numbered(self, tensor: DiskTensor, layer: LayerPlan) -> list[Piece]:
        """A tensor of one expert under its new number, and after the first kept one the pads."""
        assert tensor.expert is not None
        if tensor.expert in (*layer.dropped, *layer.replaced):
            return []
        slots = self._slots.get(layer.layer, tuple(range(layer.experts)))
        # ids from E on are identity experts, which stay behind the others
        beyond = tensor.expert - layer.experts
        number = len(slots) + beyond if beyond >= 0 else slots.index(tensor.expert)
        piece = self._copied(tensor.key, tensor.renamed(number))
        found = [self._values(piece, tensor, layer, (tensor.expert,))]
        if tensor.expert == layer.keep[0]:
            pads = [number for number, expert in enumerate(slots) if expert is None]
            found += [zeros(self._copied(tensor.key, tensor.renamed(number))) for number in pads]
        return found

    def _table(self, key: str, layer: LayerPlan) -> Piece:
        def make() -> Tensor:
            table_VK = self.checkpoint.read(key)
            try:
                return redirect_table(table_VK, layer.keep, layer.experts)
            except ValueError as error:
                raise CheckpointError(f"{key}: {error}") from error

        return computed(copied(key, self.checkpoint.tensors[key]), make)

    def _copied(self, key: str, name: str | None = None) -> Piece:
        """A tensor under another name: the same bytes, or what they stand for."""
        weight = self.quantisation.parts.get(key) if self.dequantized else None
        if weight is None:
            return copied(name or key, self.checkpoint.tensors[key])
        return bf16_piece(weight.plain(name or key), self.checkpoint, weight)

    def _sliced(self, tensor: DiskTensor, slots: Sequence[int | None], fill: float = 0.0) -> Piece:
        """Some experts of a fused tensor or a router: the same bytes, or what they stand for."""
        weight = self.quantisation.parts.get(tensor.key) if self.dequantized else None
        if weight is not None:
            return bf16_piece(weight.name, self.checkpoint, weight, slots)
        info = self.checkpoint.tensors[tensor.key]
        return sliced(tensor.key, info, tensor.dim, slots, tensor.rows, fill)

    def _novices(self, layer: LayerPlan, tensor: DiskTensor) -> list[Piece]:
        assert layer.novices_NH is not None
        dtype = TORCH_DTYPES.get(self.checkpoint.tensors[tensor.key].dtype, torch.bfloat16)
        values = layer.novices_NH.to(dtype)
        if tensor.expert is None:
            name = self.model.sites[layer.layer].experts_name + ".novice_value"
            return [given(self.model.disk_name(name), values)]
        return [
            given(f"{tensor.experts_prefix}{expert}.approx_value", values[row].clone())
            for row, expert in enumerate(layer.replaced)
        ]

    def _offsets(self, layer: LayerPlan, tensor: DiskTensor) -> list[Piece]:
        assert layer.offsets_CH is not None
        dtype = TORCH_DTYPES.get(self.checkpoint.tensors[tensor.key].dtype, torch.bfloat16)
        values = layer.offsets_CH.to(dtype)
        if tensor.expert is None:
            name = self.model.sites[layer.layer].experts_name + ".output_offset"
            return [given(self.model.disk_name(name), values)]
        slots = self._slots.get(layer.layer, tuple(range(layer.experts)))
        return [
            given(f"{tensor.experts_prefix}{slots.index(e)}.output_offset", values[row].clone())
            for row, e in enumerate(layer.keep)
        ]

    def _values(self, piece: Piece, tensor: DiskTensor, layer: LayerPlan, slots: Slots) -> Piece:
        """``piece`` with the values that the plan gives it."""
        if not self.rebuilder.changes(tensor, layer):
            return piece
        return self.rebuilder.piece(piece, tensor, layer, slots)

    def config(self) -> dict[str, Any]:
        """The new config.json.

        Raises:
            UnsupportedModelError: the number of experts is not where it should be.
        """
        config = set_counts(self.model, self.counts)
        config = set_width(self.model, config, self.plan)
        if self.dequantized:
            config = without_description(config)
        elif self.quantisation.method and any(p.unroutes for p in self.plan.layers.values()):
            kept = kept_by_module(self.model.sites, self.layout, self.plan)
            config = with_description(config, lambda old: renumbered(old, kept))
        if self.attached.dropped and self.attached.heads:
            without_heads(config)
        text = config.get("text_config")  # with towers, the language model's part
        (text if isinstance(text, dict) else config).update(described(self.plan))
        if self.novices:
            set_novices(config, self.model.sites, self.plan)
        return set_code(config, self.code, model_class(self.checkpoint, self.model.config))

    @cached_property
    def code(self) -> GeneratedCode | None:
        """Classes that the checkpoint needs to open; None where stock ones do."""
        uneven = len(set(self.counts.values())) > 1
        own = self.novices or self.answers
        if (own or uneven) and remote_class(self.checkpoint, self.model.config):
            raise UnsupportedModelError(
                f"{self.checkpoint.path} has classes of its own, which ours cannot extend",
                "delete the same number of experts in every layer",
            )
        if own and uneven:
            raise UnsupportedModelError(
                f"layers of {self.checkpoint.path} hold different numbers of experts: none of them "
                "can be replaced by constants, answer for others or have constants",
                "do it to the original model, or keep the same number of experts in every layer",
            )
        if self.novices and self.answers:
            raise UnsupportedModelError(
                "the plan replaces experts by constants in some layers, and in others they answer "
                "for others or have constants: one model cannot do both",
                "make it two plans, for two copies of the model",
            )
        if self.answers:
            return answer_code(native_class(self.model.config))
        if self.novices:
            return novice_code(native_class(self.model.config))
        if uneven:
            native = native_class(self.model.config)
            return uneven_code(native, resize_facts(self.model.model, self.model.prefix))
        return None

    def sizes(self, pieces: list[Piece]) -> Sizes:
        """Sizes before and after."""
        before = sum(site.shape.experts for site in self.model.sites.values())
        gone = sum(len(p.dropped) + len(p.replaced) for p in self.plan.layers.values())
        sites = self.model.sites
        gone += sum(sites[i].shape.experts for i in self.plan.drop_layers if i in sites)
        numel = parameters(self.checkpoint)
        after = sum(parameters_of(piece.name, piece.dtype, piece.shape) for piece in pieces)
        return Sizes(
            experts=(before, before - gone),
            parameters=(numel, after),
            nonzero=(numel, after - sum(self.rebuilder.zeroed.values())),
            bytes=(self.checkpoint.nbytes, sum(piece.nbytes for piece in pieces)),
            attached=self.attached.counts(),
        )


def described(plan: Plan) -> dict[str, Any]:
    """What config.json says about kept experts that stock classes do not know."""
    layers = sorted(plan.layers.items())
    found = {
        "experts_served_by": {str(i): list(p.served_by) for i, p in layers if p.served_by},
        "expert_offsets": [i for i, p in layers if p.offsets_CH is not None],
        "expert_skipping": {str(i): p.skipping.to_json() for i, p in layers if p.skipping},
    }
    return {key: value for key, value in found.items() if value}


def only_deleting(layer: LayerPlan) -> LayerPlan:
    """What becomes of a block that has no edit of its own, but as many experts as the layer."""
    return replace(layer, mask=None, neurons=None, router_CE=None, ranks={}, stored=None)


def _whole(shapes: Mapping[int, LayerShape]) -> dict[int, LayerPlan]:
    """All experts of every layer: a layer that a plan leaves out may need pads."""
    return {
        index: LayerPlan(index, shape.experts, tuple(range(shape.experts)))
        for index, shape in shapes.items()
    }
