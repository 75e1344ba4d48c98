"""What a plan says about each layer, without the vectors: a copy of a plan has none."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.core.plan import FORMAT
from moeprune.core.shapes import ROLES
from moeprune.errors import PlanError
from moeprune.verification.shards import read_json

_PATTERN = re.compile(r"(\d{1,4}):(\d{1,4})")


@dataclass(frozen=True)
class Mask:
    """How many weights are zero: ``ratio`` of each group, ``pattern`` n of every m, or any number.

    A group is an output ``row`` or a whole ``matrix``.
    """

    roles: tuple[str, ...]
    ratio: float | None = None
    pattern: tuple[int, int] | None = None
    group: str = "row"


@dataclass(frozen=True)
class Edit:
    """What happens to one layer.

    Attributes:
        experts: E before.
        keep: experts whose weights stay, in the order in which they are stored.
        replaced: experts that become constants; the others are deleted.
        mask: which weights of kept experts are zero; None if none were.
        rebuilt: matrices of kept experts that have other values, by role.
        width: their neurons; None if that did not change.
        mixed: whether router rows are sums of old ones.
        served_by: who answers for each expert; empty if each does for itself.
        offsets: whether constants were added to outputs.
    """

    experts: int
    keep: tuple[int, ...]
    replaced: tuple[int, ...] = ()
    mask: Mask | None = None
    rebuilt: tuple[str, ...] = ()
    width: int | None = None
    mixed: bool = False
    served_by: tuple[int, ...] = ()
    offsets: bool = False

    @property
    def rebuilds(self) -> bool:
        """Whether tensors have values that slicing the original's does not give."""
        return bool(self.rebuilt) or self.mixed

    @property
    def unroutes(self) -> bool:
        """Whether routers lost the rows of deleted experts."""
        return bool(self.dropped) and not self.served_by

    @property
    def all(self) -> tuple[int, ...]:
        """Every expert."""
        return tuple(range(self.experts))

    @property
    def dropped(self) -> tuple[int, ...]:
        """Experts that are deleted."""
        return tuple(e for e in range(self.experts) if e not in {*self.keep, *self.replaced})


def read_edits(path: Path) -> dict[int, Edit]:
    """The layers of a plan.

    Raises:
        PlanError: not a plan.
    """
    data = read_json(path / "plan.json" if path.is_dir() else path)
    layers = data.get("layers") if isinstance(data, dict) else None
    if not isinstance(layers, dict) or data.get("format") != FORMAT:
        raise PlanError(f"{path} is not a plan of format {FORMAT}", "give the output of plan")
    try:
        return {int(index): _edit(entry) for index, entry in layers.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f"{path} is not a plan: a layer is malformed ({error})", "give the output of plan"
        ) from error


def _edit(entry: dict[str, Any]) -> Edit:
    mask = entry.get("mask")
    experts = int(entry["experts"])
    keep, replaced = (tuple(int(e) for e in entry[name]) for name in ("keep", "replaced"))
    if not set(keep + replaced) <= set(range(experts)) or len({*keep, *replaced}) != len(
        keep + replaced
    ):
        raise ValueError("its experts are not ids, each named once")
    neurons, vectors = entry.get("neurons"), entry.get("vectors") or ()
    stored = entry.get("stored") or {}
    roles = set(ROLES) if neurons else {*(entry.get("ranks") or ()), *stored.get("roles", ())}
    return Edit(
        experts,
        keep,
        replaced,
        None if mask is None else _mask(mask),
        tuple(role for role in ROLES if role in roles),
        int(neurons["width"]) if neurons else None,
        "router" in vectors,
        tuple(int(e) for e in entry.get("served_by") or ()),
        "offsets" in vectors,
    )


def _mask(entry: dict[str, Any]) -> Mask:
    roles = tuple(role for role in ROLES if role in entry["roles"])
    match = _PATTERN.fullmatch(str(entry.get("pattern", "")))
    if match is not None:
        return Mask(roles, pattern=(int(match[1]), int(match[2])))
    return Mask(roles, ratio=float(entry["ratio"]), group=str(entry.get("group", "row")))
