"""From what the user asks for (a ratio, a count, a threshold, a pattern) to numbers per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError

_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary; it means 29


@dataclass(frozen=True)
class Budget:
    """How much to remove; exactly one field is set.

    Attributes:
        ratio: fraction removed, of experts or of weights as the method defines; 0 <= ratio < 1.
        keep: experts kept per layer.
        tau: a method's own threshold (MoEITS).
        pattern: (n, m): n of every m consecutive weights are zeroed; 2:4 is (2, 4).
    """

    ratio: float | None = None
    keep: int | None = None
    tau: float | None = None
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "keep", "tau", "pattern") if self._has(name)]
        if len(given) != 1:
            got = " and ".join(f"--{name}" for name in given) or "none"
            raise BudgetError(
                f"give exactly one budget (got {got})",
                "one of --ratio 0.5, --keep 16, --tau 1.5, --pattern 2:4, as the method allows",
            )
        if self.ratio is not None and not 0.0 <= self.ratio < 1.0:
            raise BudgetError(
                f"ratio out of range: {self.ratio:g}",
                "a ratio is the fraction removed: at least 0 and below 1, for example 0.5",
            )
        if self.keep is not None and self.keep < 0:
            raise BudgetError(f"--keep must not be negative (got {self.keep})")
        if self.tau is not None and not math.isfinite(self.tau):
            raise BudgetError(f"--tau must be a finite number (got {self.tau})")
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise BudgetError(f"bad pattern {self.pattern[0]}:{self.pattern[1]}", "for example 2:4")

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in ("ratio", "keep", "tau", "pattern") if self._has(name))

    def to_json(self) -> dict[str, float | int | str]:
        """As it stands in a plan."""
        if self.pattern is not None:
            return {"pattern": f"{self.pattern[0]}:{self.pattern[1]}"}
        value: float | int = getattr(self, self.kind)
        return {self.kind: value}

    def __str__(self) -> str:
        [(kind, value)] = self.to_json().items()
        return f"{value:.0%}" if kind == "ratio" and isinstance(value, float) else f"{kind} {value}"


def parse_pattern(text: str) -> tuple[int, int]:
    """``"2:4"`` as (2, 4): of every 4 consecutive weights 2 are zeroed."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        raise BudgetError(f"bad pattern {text!r}", "write N:M, for example 2:4")
    return int(match[1]), int(match[2])


def experts_to_remove(budget: Budget, shape: LayerShape) -> int:
    """How many experts ``budget`` removes from a layer; ``ratio`` rounds down.

    Raises:
        BudgetError: ``keep`` is larger than the number of experts.
    """
    if budget.keep is not None:
        if budget.keep > shape.experts:
            raise BudgetError(
                f"--keep {budget.keep}: layer {shape.layer} has {shape.experts} experts",
                f"keep at most {shape.experts}",
            )
        return shape.experts - budget.keep
    assert budget.ratio is not None, "callers accept ratio and keep only"
    return math.floor(shape.experts * budget.ratio + _SLACK)


def least_kept(shape: LayerShape, floor: int = 0) -> int:
    """The fewest experts that a layer can route over, at least ``floor`` (the user's own, up to E).

    K experts must exist; a group-limited router needs the same number in every group, two for the
    sum of the two best that ranks a group, and K among the groups that a token may choose from.
    """
    floor = min(floor, shape.experts)
    if shape.groups == 1:
        return max(shape.top_k, floor)
    per_group = max(2, math.ceil(shape.top_k / shape.top_groups), math.ceil(floor / shape.groups))
    return per_group * shape.groups


def removable(budget: Budget, shape: LayerShape, floor: int = 0) -> int:
    """How many experts to delete from a layer, such that the router still works.

    With routing groups a ratio is rounded down to the same number per group.

    Raises:
        BudgetError: fewer than ``least_kept`` would remain, or groups would become unequal.
    """
    remove = experts_to_remove(budget, shape)
    if budget.ratio is not None:
        remove -= remove % shape.groups
    kept, least = shape.experts - remove, least_kept(shape, floor)
    asked = f"--keep {budget.keep}" if budget.keep is not None else f"ratio {budget.ratio:g}"
    if kept < least:
        reason = f"top-k is {shape.top_k}" if shape.groups == 1 else f"{shape.groups} groups"
        if least > least_kept(shape):
            reason = f"the floor is {floor}"
        raise BudgetError(
            f"{asked} leaves {kept} of {shape.experts} experts in layer {shape.layer}, "
            f"but {least} must stay ({reason})",
            f"use --keep {least} or more (ratio {1 - least / shape.experts:.4g} or less)",
        )
    if kept % shape.groups:
        raise BudgetError(
            f"{asked} leaves {kept} experts, not a multiple of the {shape.groups} routing groups",
            f"use --keep {kept + shape.groups - kept % shape.groups}",
        )
    return remove


def lowest(
    scores: Sequence[float], counts: Sequence[int], remove: int, shape: LayerShape
) -> list[int]:
    """The ``remove`` experts with the lowest scores, ascending by id.

    Ties break by the number of tokens, then by id: the expert that was used less, then the lower
    id, goes first. With routing groups the same number goes from every group. NaN ranks lowest.
    """
    order = sorted(
        range(shape.experts),
        key=lambda e: (-math.inf if math.isnan(scores[e]) else scores[e], counts[e], e),
    )
    quota = [remove // shape.groups] * shape.groups
    chosen = []
    for expert in order:
        group = shape.group_of(expert)
        if quota[group]:
            quota[group] -= 1
            chosen.append(expert)
    return sorted(chosen)
