"""One layer of a plan as JSON, and the vectors that belong to it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeprune.core.edits import MaskEdit, Neurons, StoredWeights
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.skipping import Skipping
from moeprune.errors import PlanError

_PATTERN = re.compile(r"([0-9]{1,4}):([0-9]{1,4})")


def layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    """One layer as it stands in plan.json."""
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
    entry |= _rebuilt_to_json(layer)
    if layer.skipping is not None:
        entry["skipping"] = layer.skipping.to_json()
    entry["scores"] = {
        name: [v if v is not None and math.isfinite(v) else None for v in values]
        for name, values in layer.scores.items()
    }
    if layer.notes:
        entry["notes"] = list(layer.notes)
    return entry


def _rebuilt_to_json(layer: LayerPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if layer.neurons is not None:
        entry["neurons"] = {"width": layer.neurons.width}
    if layer.served_by is not None:
        entry["served_by"] = list(layer.served_by)
    if layer.ranks:
        entry["ranks"] = {role: list(ranks) for role, ranks in layer.ranks.items()}
    if layer.stored is not None:
        entry["stored"] = dict(layer.stored.reference)
    by_rows = {"router": layer.router_CE, "offsets": layer.offsets_CH}
    vectors = [name for name, tensor in by_rows.items() if tensor is not None]
    if vectors:
        entry["vectors"] = vectors
    if entry:
        # whose vectors these are: with them, 'keep' cannot be edited by hand
        entry["rebuilt"] = list(layer.keep)
    return entry


def layer_from_json(
    index: int, entry: dict[str, Any], vectors: Mapping[str, Tensor], stored: StoredWeights | None
) -> LayerPlan:
    """The inverse of ``layer_to_json``, with the layer's vectors and stored matrices.

    Raises:
        PlanError: a field is missing or of the wrong kind; the message names it.
    """
    where = f"plan: layers.{index}"
    keep, replaced = (ids(entry, name, where) for name in ("keep", "replaced"))
    novices = vectors.get(f"layers.{index}.novices")
    listed = ids(entry, "novice_rows", where) if "novice_rows" in entry else ()
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
        mask = _mask_from_json(index, get(entry, "mask", dict, where), vectors)
    scores = get(entry, "scores", dict, where)
    return LayerPlan(
        layer=index,
        experts=get(entry, "experts", int, where),
        keep=keep,
        replaced=replaced,
        scores={str(name): _numbers(scores, name, f"{where}.scores") for name in scores},
        novices_NH=novices if replaced else None,
        mask=mask,
        **_rebuilt_from_json(index, entry, vectors, stored),
        skipping=(
            Skipping.from_json(entry["skipping"], f"{where}.skipping")
            if "skipping" in entry
            else None
        ),
        notes=texts(entry, "notes", where),
    )


def _rebuilt_from_json(
    index: int, entry: dict[str, Any], vectors: Mapping[str, Tensor], stored: StoredWeights | None
) -> dict[str, Any]:
    where = f"plan: layers.{index}"

    def vector(name: str) -> Tensor:
        tensor = vectors.get(f"layers.{index}.{name}")
        if tensor is None:
            raise _lost(where, name)
        return tensor

    if "rebuilt" not in entry:
        return {}
    if ids(entry, "rebuilt", where) != ids(entry, "keep", where):
        raise PlanError(
            f"{where}: its experts are rebuilt, so 'keep' cannot be edited by hand",
            "plan again with --pin or --forbid",
        )
    found: dict[str, Any] = {}
    if "neurons" in entry:
        width = get(get(entry, "neurons", dict, where), "width", int, f"{where}.neurons")
        index_N4 = vector("neuron_index")
        if index_N4.is_floating_point():
            raise PlanError(f"{where}: the list of neurons does not hold integers")
        found["neurons"] = Neurons(width, index_N4.to(torch.int32), vector("neuron_factor"))
    if "served_by" in entry:
        found["served_by"] = ids(entry, "served_by", where)
    if "ranks" in entry:
        ranks = get(entry, "ranks", dict, where)
        found["ranks"] = {role: ids(ranks, role, f"{where}.ranks") for role in ranks}
    if "stored" in entry:
        if stored is None:
            raise _lost(where, "stored")
        found["stored"] = stored
    names = texts(entry, "vectors", where)
    fields = {"router": "router_CE", "offsets": "offsets_CH"}
    unknown = sorted(set(names) - set(fields))
    if unknown:
        raise PlanError(f"{where}: unknown vectors {unknown[0]!r}")
    return found | {fields[name]: vector(name).float() for name in names}


def layer_vectors(layer: LayerPlan) -> dict[str, Tensor]:
    """What a layer's plan puts into the safetensors file, by its name after the layer's."""
    found: dict[str, Tensor | None] = {
        "novices": layer.novices_NH,
        **({} if layer.mask is None else _scales(layer.mask)),
        "neuron_factor": None if layer.neurons is None else layer.neurons.factor_N3,
        "router": layer.router_CE,
        "offsets": layer.offsets_CH,
    }
    tensors = {name: tensor.float() for name, tensor in found.items() if tensor is not None}
    if layer.neurons is not None:
        tensors["neuron_index"] = layer.neurons.index_N4.to(torch.int32)
    return tensors


def _mask_from_json(index: int, entry: dict[str, Any], vectors: Mapping[str, Tensor]) -> MaskEdit:
    where = f"plan: layers.{index}.mask"
    pattern: tuple[int, int] | None = None
    if "pattern" in entry:
        match = _PATTERN.fullmatch(get(entry, "pattern", str, where))
        if match is None:
            raise PlanError(f"{where}: bad pattern {entry['pattern']!r}", "for example 2:4")
        pattern = (int(match[1]), int(match[2]))
    ratio = entry.get("ratio")
    if ratio is not None and not (_is_number(ratio) and 0 <= ratio < 1):
        raise PlanError(f"{where}: ratio is not a number in [0, 1)")
    scales = {name: vectors.get(f"layers.{index}.{name}") for name in texts(entry, "scales", where)}
    unknown = sorted(set(scales) - set(_scales(MaskEdit(0.0, None))))
    lost = sorted(name for name, table in scales.items() if table is None)
    if unknown:
        raise PlanError(f"{where}: unknown scale {unknown[0]!r}")
    if lost:
        raise _lost(where, lost[0])
    return MaskEdit(
        ratio=None if ratio is None else float(ratio),
        pattern=pattern,
        roles=tuple(str(role) for role in get(entry, "roles", list, where)),
        scale_in_EH=scales.get("scale_in"),
        scale_mid_EI=scales.get("scale_mid"),
        group=get({"group": "row"} | entry, "group", str, where),
    )


def _scales(mask: MaskEdit) -> dict[str, Tensor | None]:
    """The scale tables by their names among the vectors."""
    return {"scale_in": mask.scale_in_EH, "scale_mid": mask.scale_mid_EI}


def get(data: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of that type, or ``PlanError``."""
    value = data.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanError(f"{where}: {name!r} is missing or not {kind.__name__}")
    return value


def ids(entry: dict[str, Any], name: str, where: str, what: str = "expert") -> tuple[int, ...]:
    """A list of ids of experts or layers."""
    values = get(entry, name, list, where)
    if not all(isinstance(e, int) and not isinstance(e, bool) for e in values):
        raise PlanError(f"{where}: {name!r} is not a list of {what} ids")
    return tuple(values)


def _lost(where: str, name: str) -> PlanError:
    return PlanError(
        f"{where}: its vectors {name!r} are missing",
        "a plan is two files, .json and .safetensors: copy both",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(entry: dict[str, Any], name: str, where: str) -> tuple[float | None, ...]:
    values = get(entry, name, list, where)
    try:
        if all(value is None or _is_number(value) for value in values):
            return tuple(None if value is None else float(value) for value in values)
    except OverflowError:
        pass  # an integer of hundreds of digits
    raise PlanError(f"{where}: {name!r} is not a list of numbers")


def texts(entry: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """An optional list of strings."""
    values = [] if entry.get(name) is None else get(entry, name, list, where)
    if not all(isinstance(value, str) for value in values):
        raise PlanError(f"{where}: {name!r} is not a list of strings")
    return tuple(values)
