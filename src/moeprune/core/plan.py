"""The plan: what happens to every layer, with the scores that led there, as readable JSON.

Vectors (novices, mask scales) stand in a safetensors file beside it; a plan never holds a mask or
a weight. ``Plan.to_json`` and ``Plan.from_json`` are the format's only definition; it is described
in docs/formats.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeprune.core.shapes import ROLES, LayerShape
from moeprune.errors import PlanError
from moeprune.files import json_bytes

FORMAT = "moeprune.plan/1"
MASK_GROUPS = ("row", "matrix")

_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")
_PATTERN = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")


@dataclass(frozen=True)
class MaskEdit:
    """Zero the weights with the lowest ``|W| * scale`` inside every kept expert.

    Attributes:
        ratio: fraction of each group, or None if ``pattern`` is set.
        pattern: (n, m), n of every m consecutive weights, or None if ``ratio`` is set.
        roles: the matrices that are masked.
        scale_in_EH: scale of the gate and up matrices' input columns; None is magnitude pruning.
        scale_mid_EI: scale of the down matrix's input columns; None is magnitude pruning.
        group: weights compete within an output ``row`` or within the ``matrix``; for a ratio.
    """

    ratio: float | None
    pattern: tuple[int, int] | None
    roles: tuple[str, ...] = ROLES
    scale_in_EH: Tensor | None = None
    scale_mid_EI: Tensor | None = None
    group: str = "row"

    def scale(self, role: str, expert: int) -> Tensor | None:
        """The scale of one expert's matrix, [H] or [I]."""
        table = self.scale_mid_EI if role == "down" else self.scale_in_EH
        return None if table is None else table[expert]


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one MoE layer.

    Experts that are neither kept nor replaced are deleted, together with their router rows; where
    a table over token ids chooses experts, its entries are redirected (``redirect_table``).

    Attributes:
        layer: index of the decoder layer.
        experts: E before the edit.
        keep: experts whose weights stay, ascending.
        replaced: experts that become constant vectors ("novices"), ascending.
        scores: the method's score per expert, by name; None where it has none.
        novices_NH: the constants of ``replaced``, in that order.
        mask: weights to zero inside the kept experts.
        notes: what a reader of the plan should know about this layer.
    """

    layer: int
    experts: int
    keep: tuple[int, ...]
    replaced: tuple[int, ...] = ()
    scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    novices_NH: Tensor | None = None
    mask: MaskEdit | None = None
    notes: tuple[str, ...] = ()

    @property
    def dropped(self) -> tuple[int, ...]:
        """Experts that are deleted, ascending."""
        stay = {*self.keep, *self.replaced}
        return tuple(e for e in range(self.experts) if e not in stay)

    def check(self, shape: LayerShape) -> None:
        """Raise ``PlanError`` unless this edit makes sense for a layer of that shape."""
        where = f"plan, layer {self.layer}"
        if self.experts != shape.experts:
            raise PlanError(f"{where}: made for {self.experts} experts, found {shape.experts}")
        for name in ("keep", "replaced"):
            ids = getattr(self, name)
            if list(ids) != sorted(set(ids)):
                raise PlanError(f"{where}: {name!r} must be ascending ids without repetition")
            if ids and not 0 <= min(ids) <= max(ids) < shape.experts:
                raise PlanError(f"{where}: {name!r} names an expert outside 0..{shape.experts - 1}")
        both = sorted(set(self.keep) & set(self.replaced))
        if both:
            raise PlanError(f"{where}: expert {both[0]} is both kept and replaced")
        remain = len(self.keep) + len(self.replaced)
        if remain < shape.top_k:
            raise PlanError(
                f"{where}: {remain} experts remain, but {shape.top_k} are selected per token",
                f"keep or replace at least {shape.top_k}",
            )
        if self.novices_NH is not None or self.replaced:
            size = () if self.novices_NH is None else tuple(self.novices_NH.shape)
            if size != (len(self.replaced), shape.hidden):
                raise PlanError(
                    f"{where}: novices of shape {list(size)}, expected one row of {shape.hidden} "
                    f"for each of {len(self.replaced)} replaced experts",
                    "by hand, experts can be taken from 'replaced', but not added without a vector",
                )
        if self.mask is not None:
            self._check_mask(self.mask, shape, where)

    def _check_mask(self, mask: MaskEdit, shape: LayerShape, where: str) -> None:
        if (mask.ratio is None) == (mask.pattern is None):
            raise PlanError(f"{where}: a mask has either a ratio or a pattern")
        if mask.group not in MASK_GROUPS or (mask.pattern and mask.group != "row"):
            raise PlanError(f"{where}: weights cannot compete within {mask.group!r} here")
        if mask.ratio is not None and not 0 <= mask.ratio < 1:
            raise PlanError(f"{where}: mask ratio {mask.ratio} is not in [0, 1)")
        if mask.pattern is not None:
            n, m = mask.pattern
            if not 0 < n < m or shape.hidden % m or shape.intermediate % m:
                raise PlanError(
                    f"{where}: pattern {n}:{m} does not fit rows of {shape.hidden} "
                    f"and {shape.intermediate}"
                )
        wrong = [role for role in mask.roles if role not in shape.roles]
        if wrong:
            raise PlanError(f"{where}: this model's experts have no {wrong[0]!r} matrix")
        for table, width in (
            (mask.scale_in_EH, shape.hidden),
            (mask.scale_mid_EI, shape.intermediate),
        ):
            if table is not None and tuple(table.shape) != (shape.experts, width):
                raise PlanError(f"{where}: mask scales of shape {list(table.shape)}")


@dataclass(frozen=True)
class Plan:
    """A decision for a whole model, with where it came from.

    Attributes:
        layers: edits by layer index.
        method: name of the method.
        options: all its options, defaults included.
        budget: what was asked for.
        model: hash and facts of the model that it was made for.
        statistics: hash and facts of the calibration; empty for a data-free method.
        seed: the seed of whatever was random.
        warnings: what the method wants the user to know.
        versions: of moeprune, torch, transformers, numpy.
    """

    layers: Mapping[int, LayerPlan]
    method: str
    options: Mapping[str, Any]
    budget: Mapping[str, Any]
    model: Mapping[str, Any]
    statistics: Mapping[str, Any]
    seed: int
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def check(self, shapes: Mapping[int, LayerShape]) -> None:
        """Raise ``PlanError`` unless every layer's edit fits the model's layers."""
        unknown = sorted(set(self.layers) - set(shapes))
        if unknown:
            raise PlanError(
                f"plan names layer {unknown[0]}, which is not an MoE layer of the model"
            )
        for index, layer in self.layers.items():
            layer.check(shapes[index])

    def vectors(self) -> dict[str, Tensor]:
        """What goes into the safetensors file, by name."""
        found: dict[str, Tensor] = {}
        for index, layer in sorted(self.layers.items()):
            if layer.novices_NH is not None:
                found[f"layers.{index}.novices"] = layer.novices_NH
            scales = {} if layer.mask is None else _scales(layer.mask)
            for name, table in scales.items():
                if table is not None:
                    found[f"layers.{index}.{name}"] = table
        return {name: tensor.float().contiguous() for name, tensor in found.items()}

    def to_json(self, vectors: Mapping[str, Any] | None) -> dict[str, Any]:
        """The plan as JSON; ``vectors`` names the safetensors file and its hash."""
        return {
            "format": FORMAT,
            "method": self.method,
            "options": dict(self.options),
            "budget": dict(self.budget),
            "seed": self.seed,
            "model": dict(self.model),
            "statistics": dict(self.statistics),
            "versions": dict(self.versions),
            "vectors": None if vectors is None else dict(vectors),
            "warnings": list(self.warnings),
            "layers": {str(i): _layer_to_json(layer) for i, layer in sorted(self.layers.items())},
        }

    @classmethod
    def from_json(cls, data: Any, vectors: Mapping[str, Tensor]) -> Plan:
        """Read a plan, possibly edited by hand.

        Raises:
            PlanError: a field is missing or of the wrong kind; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"not a plan: 'format' is not {FORMAT!r}", "make one: moeprune plan")
        layers = _get(data, "layers", dict, "plan")
        parsed = {}
        for key, entry in layers.items():
            if not _INDEX.fullmatch(str(key)) or not isinstance(entry, dict):
                raise PlanError(f"plan: layers.{key} is not a layer index with an object")
            parsed[int(key)] = _layer_from_json(int(key), entry, vectors)
        plan = cls(
            layers=parsed,
            method=_get(data, "method", str, "plan"),
            options=_get(data, "options", dict, "plan"),
            budget=_get(data, "budget", dict, "plan"),
            model=_get(data, "model", dict, "plan"),
            statistics=_get(data, "statistics", dict, "plan"),
            seed=_get(data, "seed", int, "plan"),
            warnings=_texts(data, "warnings", "plan"),
            versions=_get(data, "versions", dict, "plan"),
        )
        try:
            json_bytes(data)
        except (
            ValueError,
            RecursionError,
        ) as error:  # infinite numbers and half characters: Python reads, JSON not
            raise PlanError(f"plan: holds what JSON cannot: {error}") from error
        return plan


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "experts": layer.experts,
        "keep": list(layer.keep),
        "replaced": list(layer.replaced),
    }
    if layer.novices_NH is not None:
        # which row of the vectors belongs to whom: 'replaced' may be edited by hand
        entry["novice_rows"] = list(layer.replaced)
    if layer.mask is not None:
        mask = layer.mask
        entry["mask"] = {
            "roles": list(mask.roles),
            **({"ratio": mask.ratio} if mask.ratio is not None else {}),
            **({"pattern": f"{mask.pattern[0]}:{mask.pattern[1]}"} if mask.pattern else {}),
            **({"group": mask.group} if mask.group != "row" else {}),
            # without its scales a mask would silently become another method's
            "scales": [name for name, table in _scales(mask).items() if table is not None],
        }
    entry["scores"] = {
        name: [v if v is not None and math.isfinite(v) else None for v in values]
        for name, values in layer.scores.items()
    }
    if layer.notes:
        entry["notes"] = list(layer.notes)
    return entry


def _layer_from_json(index: int, entry: dict[str, Any], vectors: Mapping[str, Tensor]) -> LayerPlan:
    where = f"plan: layers.{index}"
    keep, replaced = (_ids(entry, name, where) for name in ("keep", "replaced"))
    novices = vectors.get(f"layers.{index}.novices")
    listed = _ids(entry, "novice_rows", where) if "novice_rows" in entry else ()
    if listed or novices is not None:
        if novices is None:
            raise _lost(where, "novices")
        if novices.ndim != 2 or not len(set(listed)) == len(listed) == len(novices):
            raise PlanError(
                f"{where}: 'novice_rows' names {len(set(listed))} experts, its vectors have shape "
                f"{list(novices.shape)}",
                "edit 'keep' and 'replaced'; 'novice_rows' belongs to the vectors",
            )
    missing = [e for e in replaced if e not in listed]
    if missing:
        raise PlanError(
            f"{where}: expert {missing[0]} is in 'replaced' but has no vector",
            "plan again with a larger ratio, or keep the expert",
        )
    if novices is not None:
        novices = novices[[listed.index(e) for e in replaced]]
    mask = None
    if "mask" in entry:
        mask = _mask_from_json(index, _get(entry, "mask", dict, where), vectors)
    scores = _get(entry, "scores", dict, where)
    return LayerPlan(
        layer=index,
        experts=_get(entry, "experts", int, where),
        keep=keep,
        replaced=replaced,
        scores={str(name): _numbers(scores, name, f"{where}.scores") for name in scores},
        novices_NH=novices if replaced else None,
        mask=mask,
        notes=_texts(entry, "notes", where),
    )


def _mask_from_json(index: int, entry: dict[str, Any], vectors: Mapping[str, Tensor]) -> MaskEdit:
    where = f"plan: layers.{index}.mask"
    pattern: tuple[int, int] | None = None
    if "pattern" in entry:
        match = _PATTERN.fullmatch(_get(entry, "pattern", str, where))
        if match is None:
            raise PlanError(f"{where}: bad pattern {entry['pattern']!r}", "for example 2:4")
        pattern = (int(match[1]), int(match[2]))
    ratio = entry.get("ratio")
    if ratio is not None and not (_is_number(ratio) and 0 <= ratio < 1):
        raise PlanError(f"{where}: ratio is not a number in [0, 1)")
    scales = {
        name: vectors.get(f"layers.{index}.{name}") for name in _texts(entry, "scales", where)
    }
    unknown = sorted(set(scales) - set(_scales(MaskEdit(0.0, None))))
    lost = sorted(name for name, table in scales.items() if table is None)
    if unknown:
        raise PlanError(f"{where}: unknown scale {unknown[0]!r}")
    if lost:
        raise _lost(where, lost[0])
    return MaskEdit(
        ratio=None if ratio is None else float(ratio),
        pattern=pattern,
        roles=tuple(str(role) for role in _get(entry, "roles", list, where)),
        scale_in_EH=scales.get("scale_in"),
        scale_mid_EI=scales.get("scale_mid"),
        group=_get({"group": "row"} | entry, "group", str, where),
    )


def _scales(mask: MaskEdit) -> dict[str, Tensor | None]:
    """The scale tables by their names among the vectors."""
    return {"scale_in": mask.scale_in_EH, "scale_mid": mask.scale_mid_EI}


def _get(data: dict[str, Any], name: str, kind: type, where: str) -> Any:
    value = data.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanError(f"{where}: {name!r} is missing or not {kind.__name__}")
    return value


def _ids(entry: dict[str, Any], name: str, where: str) -> tuple[int, ...]:
    values = _get(entry, name, list, where)
    if not all(isinstance(e, int) and not isinstance(e, bool) for e in values):
        raise PlanError(f"{where}: {name!r} is not a list of expert ids")
    return tuple(values)


def _lost(where: str, name: str) -> PlanError:
    return PlanError(
        f"{where}: its vectors {name!r} are missing",
        "a plan is two files, .json and .safetensors: copy both",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(entry: dict[str, Any], name: str, where: str) -> tuple[float | None, ...]:
    values = _get(entry, name, list, where)
    try:
        if all(value is None or _is_number(value) for value in values):
            return tuple(None if value is None else float(value) for value in values)
    except OverflowError:
        pass  # an integer of hundreds of digits
    raise PlanError(f"{where}: {name!r} is not a list of numbers")


def _texts(entry: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """An optional list of strings."""
    values = [] if entry.get(name) is None else _get(entry, name, list, where)
    if not all(isinstance(value, str) for value in values):
        raise PlanError(f"{where}: {name!r} is not a list of strings")
    return tuple(values)
