"""Which experts of the teacher an expert of the student stands for, by the student's own plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import PlanError, UnsupportedModelError
from moeprune.files import load_json, sha256_file
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.counts import padded_slots
from moeprune.models.native import read_config, text_config
from moeprune.models.sites import MoESite
from moeprune.models.surgery import PLAN_COPY, PROVENANCE

Group = Mapping[int, float]
"""The teacher's experts that one expert of the student stands for, with shares that sum to 1."""

Groups = Mapping[int, tuple[Group, ...]]
"""By layer, the groups of the student's experts in their order; that of a pad is empty."""

_MOST = 1 << 28


def provenance(student: Checkpoint) -> dict[str, Any]:
    """What the student's moeprune.json says.

    Raises:
        PlanError: there is none, or no plan of the same hash beside it.
    """
    hint = "recover what moeprune apply or prune has written"
    record = _json(student.path / PROVENANCE, hint)
    plan = student.path / PLAN_COPY
    if not plan.is_file():
        raise PlanError(f"{student.path} has no {PLAN_COPY}", hint)
    if record.get("plan_sha256") != sha256_file(plan):
        raise PlanError(f"{plan} is not the plan that {PROVENANCE} names", hint)
    return record


def _json(file: Path, hint: str) -> dict[str, Any]:
    try:
        found = load_json(file, _MOST)
    except FileNotFoundError:
        raise PlanError(
            f"{file.parent} has no {file.name}: how it was pruned is unknown", hint
        ) from None
    except ValueError as error:
        raise PlanError(f"{file} is not valid JSON: {str(error)[:100]}", hint) from error
    if not isinstance(found, dict):
        raise PlanError(f"{file} is not a JSON object", hint)
    return found


def check_teacher(student: Checkpoint, teacher: Checkpoint, same_layers: bool) -> None:
    """Raise ``UnsupportedModelError`` unless ``teacher`` can teach ``student``.

    Architecture and vocabulary have to be the same, and the number of decoder layers if
    ``same_layers``.
    """
    mine, other = (text_config(read_config(c)) for c in (student, teacher))
    facts = ["model_type", "vocab_size"] + ["num_hidden_layers"] * same_layers
    names = {"model_type": "architecture", "vocab_size": "vocabulary"}
    for key in facts:
        a, b = getattr(mine, key, None), getattr(other, key, None)
        if a != b:
            raise UnsupportedModelError(
                f"teacher and student differ in {names.get(key, 'number of layers')}: {b} and {a}",
                "give --teacher the model that the student was pruned from",
            )


def made_from(student: Checkpoint, teacher: Checkpoint) -> bool:
    """Whether the student was pruned from the teacher."""
    return provenance(student).get("base_fingerprint") == teacher.fingerprint


def pair(
    student: Checkpoint,
    teacher: Checkpoint,
    students: Mapping[int, MoESite],
    teachers: Mapping[int, MoESite],
) -> Groups:
    """The teacher's experts of every expert of the student.

    A kept expert pairs with itself, a merged one with its group by the shares that its plan tells
    (``core.merging``), one that answers for others without shares with all of them alike, a pad
    with none. An expert rebuilt from parts of others pairs with the one whose id it keeps.

    Raises:
        PlanError: there is no plan, it was made for another model than the teacher, or its counts
            are not those of the student.
    """
    record = provenance(student)
    if record.get("base_fingerprint") != teacher.fingerprint:
        base = record.get("base")
        name = base.get("name") if isinstance(base, dict) else None
        raise PlanError(
            f"the student's plan is about the experts of {name}, and the teacher is another model",
            "give --teacher that model, or use --how logit-kd, which pairs no experts",
        )
    layers = _json(student.path / PLAN_COPY, "apply the plan again").get("layers")
    layers = layers if isinstance(layers, dict) else {}
    found = {}
    for index, site in students.items():
        if index not in teachers:
            raise PlanError(f"layer {index} has experts in the student and none in the teacher")
        entry = layers.get(str(index), {})
        try:
            found[index] = _slots(entry, site.shape.experts, teachers[index])
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"{student.path / PLAN_COPY}: layer {index} is malformed ({error})"
            ) from error
        if len(found[index]) != site.shape.experts:
            raise PlanError(
                f"layer {index} has {site.shape.experts} experts, by its plan {len(found[index])}",
                "apply the plan to the original again",
            )
    return found


def _slots(entry: Mapping[str, Any], count: int, teacher: MoESite) -> tuple[Group, ...]:
    E = teacher.shape.experts
    if not entry:
        return tuple({e: 1.0} for e in range(E))
    keep = tuple(int(e) for e in entry["keep"])
    if not set(keep) <= set(range(E)):
        raise ValueError(f"it keeps experts beyond {E}")
    joins = (entry.get("scores") or {}).get("joins", entry.get("served_by"))
    if joins is not None:
        return _merged(keep, tuple(int(e) for e in joins), entry, E)
    if entry.get("replaced") or len(keep) == count:
        return tuple({e: 1.0} for e in keep)
    slots = padded_slots(keep, teacher.shape, count)
    return tuple({} if e is None else {e: 1.0} for e in slots)


def _merged(
    keep: tuple[int, ...], core_of: tuple[int, ...], entry: Mapping[str, Any], count: int
) -> tuple[Group, ...]:
    """Groups of experts that were merged, or that one of them answers for."""
    shares = (entry.get("scores") or {}).get("share")
    weights = [1.0] * count if shares is None else [float(share) for share in shares]
    if set(core_of) != set(keep) or not len(core_of) == len(weights) == count:
        raise ValueError("its experts join others than those that it keeps")
    found = []
    for core in keep:
        group = {e: weights[e] for e, own in enumerate(core_of) if own == core and weights[e] > 0}
        total = sum(group.values())
        if not 0 < total < math.inf:
            raise ValueError(f"the shares of expert {core} are no numbers above 0")
        found.append({e: weight / total for e, weight in group.items()})
    return tuple(found)
