"""The original model, and what was done to it by the plan or by the bytes of its experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from moeprune.core.plan import Plan
from moeprune.core.shapes import ROLES
from moeprune.errors import PlanError
from moeprune.models.bounds import Limits
from moeprune.models.checkpoint import Checkpoint, TensorInfo
from moeprune.models.counts import Slots, padded_slots
from moeprune.models.depth import Shallower
from moeprune.models.layout import DiskTensor, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.restrict import Restriction
from moeprune.models.scan import digest
from moeprune.models.store import read_plan
from moeprune.models.surgery import PLAN_COPY
from moeprune.models.writer import sliced
from moeprune.verification.edits import Edit, Mask, read_edits
from moeprune.verification.finding import Skip
from moeprune.verification.shards import read_json
from moeprune.verification.subject import Subject


@dataclass(frozen=True)
class Source:
    """Where a stored tensor comes from.

    Attributes:
        key: its name in the original.
        dim: the axis along which parts were taken; None if it was copied whole.
        ids: the parts.
        masked: the layer's edit, if weights of this tensor were zeroed.
        disk: what kind of tensor it is; None if it is no expert's or router's.
        table: the layer's edit, if this names experts by token and they were renumbered.
        zero: whether it is padding of the original's shape.
        rebuilt: whether its values were computed from several of the original's.
    """

    key: str
    dim: int | None = None
    ids: Slots = ()
    masked: Edit | None = None
    disk: DiskTensor | None = None
    table: Edit | None = None
    zero: bool = False
    rebuilt: bool = False


@dataclass
class Reference:
    """The original and the plan.

    Attributes:
        checkpoint: the original.
        plan: the plan that was given; None to take the copy in the checkpoint.
        subject: the checkpoint under test.
        inferred: whether the edits were read off the experts' bytes, for want of a plan.
        device, dtype: to compute with.
        limits: what walks are held to.
    """

    checkpoint: Checkpoint
    plan: Path | None
    subject: Subject
    device: str = "cpu"
    dtype: str = "float32"
    limits: Limits = field(default_factory=Limits)
    inferred: bool = field(default=False, init=False)

    @cached_property
    def model(self) -> LayeredModel:
        """The original on the meta device."""
        return LayeredModel(self.checkpoint)

    @cached_property
    def layout(self) -> dict[str, DiskTensor]:
        """Which of its tensors belong to experts and routers."""
        return expert_layout(self.model)

    @property
    def plan_file(self) -> Path | None:
        """The plan that says what was done."""
        copy = self.subject.path / PLAN_COPY
        return self.plan or (copy if copy.is_file() else None)

    @cached_property
    def full_plan(self) -> Plan | None:
        """The plan with its vectors, where it has them."""
        if self.plan is None:
            return None
        try:
            return read_plan(self.plan)
        except PlanError:
            return None

    @property
    def planned_for(self) -> str | None:
        """The fingerprint of the model that the plan was made for."""
        file = self.plan_file
        data = read_json(file / "plan.json" if file.is_dir() else file) if file else None
        model = data.get("model") if isinstance(data, dict) else None
        return str(model.get("fingerprint")) if isinstance(model, dict) else None

    @cached_property
    def edits(self) -> dict[int, Edit]:
        """What was done to every MoE layer.

        Raises:
            PlanError: the plan is not one, or not for this model.
            Skip: there is no plan, and the experts are not those of the original.
        """
        sites = self.model.sites
        whole = {i: Edit(s.shape.experts, tuple(range(s.shape.experts))) for i, s in sites.items()}
        if self.plan_file is None:
            found = {index: self._recognise(index) for index in sites}
            self.inferred = True
        else:
            found = read_edits(self.plan_file)
        for index, edit in found.items():
            if index not in whole or edit.experts != whole[index].experts:
                raise PlanError(f"layer {index} of the plan is no layer of {self.checkpoint.path}")
        return whole | found

    @cached_property
    def shallower(self) -> Shallower | None:
        """The original without the layers that the plan drops; None if it drops none."""
        file = self.plan_file
        data = read_json(file / "plan.json" if file.is_dir() else file) if file else None
        dropped = data.get("drop_layers") if isinstance(data, dict) else None
        if not dropped:
            return None
        known = range(len(self.model.layers))
        if not isinstance(dropped, list) or not all(type(i) is int and i in known for i in dropped):
            raise PlanError("the plan drops layers that the original does not have")
        return Shallower(self.model, tuple(dropped))

    # --- without a plan

    def _recognise(self, layer: int) -> Edit:
        """The edit that the experts' bytes show; where weights were changed, the router's rows."""
        novices = self.subject.novices_of(layer)
        pads = self.subject.pads(layer)
        experts = self.model.sites[layer].shape.experts
        for routers in (False, True):
            own = self._signatures(self.checkpoint.tensors, layer, range(experts), routers)
            stored = [e for e in self._stored_ids(layer, routers) if e not in pads]
            signatures = self._signatures(self.subject.tensors, layer, stored, routers)
            known = {signature: expert for expert, signature in own.items()}
            found = [known.get(signatures[expert]) for expert in stored]
            if None not in found and len(set(found)) == len(found) == len(stored) and found:
                keep = tuple(e for e in found if e is not None and e not in novices)
                return Edit(experts, keep, tuple(novices), Mask(ROLES) if routers else None)
        raise Skip(f"there is no plan, and the experts of layer {layer} are not the original's")

    def _keys(self, layer: int, routers: bool) -> list[tuple[str, DiskTensor]]:
        return sorted(
            (key, tensor)
            for key, tensor in self.layout.items()
            if tensor.layer == layer
            and tensor.role != "table"
            and (tensor.role == "router") == routers
            and (tensor.expert or 0) < self.model.sites[layer].shape.experts
        )

    def _stored_ids(self, layer: int, routers: bool) -> list[int]:
        """Ids under which experts are stored; positions where they are fused."""
        keys = self._keys(layer, routers)
        one_by_one = [tensor for _, tensor in keys if tensor.expert is not None]
        if one_by_one:
            ids = range(self.model.sites[layer].shape.experts)
            names = {e: one_by_one[0].renamed(e) for e in ids}
            return [e for e in ids if names[e] in self.subject.tensors]
        rows = [
            self.subject.tensors[key].shape[tensor.dim] // tensor.rows - self._extra(key, tensor)
            for key, tensor in keys
            if key in self.subject.tensors
        ]
        return list(range(min(rows, default=0)))

    def _extra(self, key: str, tensor: DiskTensor) -> int:
        experts = self.model.sites[tensor.layer].shape.experts
        return self.checkpoint.tensors[key].shape[tensor.dim] // tensor.rows - experts

    def _signatures(
        self, tensors: Mapping[str, TensorInfo], layer: int, ids: Sequence[int], routers: bool
    ) -> dict[int, tuple[str, ...]]:
        found: dict[int, list[str]] = {e: [] for e in ids}
        names: set[str] = set()
        for key, tensor in self._keys(layer, routers):
            if tensor.expert is None:
                if key in tensors:
                    for e in ids:
                        found[e].append(
                            digest(sliced(key, tensors[key], tensor.dim, [e], tensor.rows))
                        )
                continue
            for e in ids:
                name = tensor.renamed(e)
                if name in tensors and name not in names:
                    names.add(name)
                    info = tensors[name]
                    found[e].append(digest(sliced(name, info, 0, range(info.shape[0]))))
        return {e: tuple(parts) for e, parts in found.items()}

    # --- where every stored tensor comes from

    def sources(self) -> Iterator[tuple[str, Source]]:
        """(name in the checkpoint, where it comes from) of every tensor that must be there."""
        for key, source in self._sources():
            name = self._moved(key)
            if name is not None:
                yield name, source

    def _moved(self, key: str) -> str | None:
        """A tensor's name after layers were dropped; None if it is gone."""
        return key if self.shallower is None else self.shallower.renamed(key)

    def _sources(self) -> Iterator[tuple[str, Source]]:
        """The same, by the name before layers are dropped."""
        without_heads = not any(self.subject.attached(key) for key in self.subject.tensors)
        for key, info in self.checkpoint.tensors.items():
            moved = self._moved(key)
            head = moved is not None and self.subject.attached(moved) and key not in self.layout
            if head and without_heads:
                continue  # left out: the rule 'attached-heads' knows whether config.json says so
            tensor = self._head_tensor(key) if head else self.layout.get(key)
            edit = None if tensor is None else self.edits.get(tensor.layer)
            if tensor is None or edit is None:
                yield key, Source(key)
                continue
            if head:  # neither constants nor masks: a head was not observed
                edit = Edit(edit.experts, edit.keep if edit.unroutes else edit.all)
            slots = self._slots(tensor.layer, edit)
            if tensor.role == "table":
                yield key, Source(key, table=edit if edit.unroutes else None)
            elif tensor.role == "router":
                ids = (*slots, *range(edit.experts, info.shape[tensor.dim]))
                yield key, Source(key, tensor.dim, ids, None, tensor, rebuilt=edit.mixed)
            elif tensor.expert is None:
                ids = edit.keep if edit.replaced or edit.served_by else slots
                new = _rebuilt(edit, tensor)
                masked = None if new else _masked(edit, tensor)
                yield key, Source(key, 0, ids, masked, tensor, rebuilt=new)
            elif tensor.expert >= edit.experts:  # identity experts stand behind the others
                number = len(slots) + tensor.expert - edit.experts
                new = edit.width is not None
                yield tensor.renamed(number), Source(key, rebuilt=new)
            elif tensor.expert in edit.keep:
                new = _rebuilt(edit, tensor)
                masked = None if new else _masked(edit, tensor)
                source = Source(key, None, (), masked, tensor, rebuilt=new)
                yield tensor.renamed(slots.index(tensor.expert)), source
                if tensor.expert == edit.keep[0]:
                    for number in (n for n, expert in enumerate(slots) if expert is None):
                        yield tensor.renamed(number), Source(key, zero=True, rebuilt=new)

    def _head_tensor(self, key: str) -> DiskTensor | None:
        """What a prediction head's tensor is, by the one in its place in the last MoE layer."""
        last = max(self.model.sites)
        own = {
            name.partition(f".{last}.")[2]: tensor
            for name, tensor in self.layout.items()
            if tensor.layer == last
        }
        parts = key.split(".")
        ends = (".".join(parts[start:]) for start in range(1, len(parts)))
        found = next((own[end] for end in ends if end in own), None)
        return None if found is None else replace(found, key=key)

    def _slots(self, layer: int, edit: Edit) -> Slots:
        """The original's expert of each that the router selects among; None is padding."""
        if edit.replaced or edit.served_by:
            return tuple(range(edit.experts))
        keep, shape = edit.keep, self.model.sites[layer].shape
        if self.shallower is not None:
            return keep  # such a plan edits no experts
        stored = self.subject.experts(layer)
        if stored <= len(keep) or not self.subject.pads(layer):
            return keep
        return padded_slots(keep, shape, stored)

    def restriction(self, layer: int, constants: Mapping[int, Tensor]) -> Restriction:
        """What a layer of the original is restricted to, to compute what the result should."""
        edit = self.edits[layer]
        if edit.replaced:
            rows = {expert: row for row, expert in enumerate(edit.keep)}
            keep, constants = tuple(range(edit.experts)), {e: constants[e] for e in edit.replaced}
        else:
            slots = self._slots(layer, edit)
            rows = {expert: slots.index(expert) for expert in edit.keep}
            keep, constants = edit.keep, {}
        return Restriction(keep, constants, rows if edit.mask is not None else {})


def _rebuilt(edit: Edit, tensor: DiskTensor) -> bool:
    if tensor.role == "other":
        return edit.width is not None
    return bool(set(tensor.role.split("_")) & set(edit.rebuilt))


def _masked(edit: Edit, tensor: DiskTensor) -> Edit | None:
    roles = () if edit.mask is None else edit.mask.roles
    return edit if tensor.role in roles or (tensor.role == "gate_up" and "gate" in roles) else None
