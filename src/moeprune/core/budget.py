"""From what the user asks for (a ratio, a count, a threshold, a pattern) to numbers per layer."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError

_KINDS = ("ratio", "keep", "tau", "pattern", "total")
_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996 in binary; it means 29


@dataclass(frozen=True)
class Budget:
    """How much to remove; exactly one of the fields but ``multiple_of`` is set.

    Attributes:
        ratio: fraction removed, of experts or of weights as the method defines; 0 <= ratio < 1.
        keep: experts kept per layer.
        tau: a method's own threshold (MoEITS).
        pattern: (n, m): n of every m consecutive weights are zeroed; 2:4 is (2, 4).
        multiple_of: the experts kept in a layer are a multiple of this, as tensor and expert
            parallel servers need; beside whichever of the others is set.
        total: experts kept in all layers together, for methods whose layers compete.
    """

    ratio: float | None = None
    keep: int | None = None
    tau: float | None = None
    pattern: tuple[int, int] | None = None
    multiple_of: int = 1
    total: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if self._has(name)]
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
        if self.multiple_of < 1:
            raise BudgetError(f"--multiple-of must be at least 1 (got {self.multiple_of})")

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name in _KINDS if self._has(name))

    def to_json(self) -> dict[str, float | int | str]:
        """As it stands in a plan."""
        value: float | int | str = getattr(self, self.kind)
        if self.pattern is not None:
            value = f"{self.pattern[0]}:{self.pattern[1]}"
        return {self.kind: value} | (
            {"multiple_of": self.multiple_of} if self.multiple_of > 1 else {}
        )

    def __str__(self) -> str:
        kind, value = next(iter(self.to_json().items()))
        return f"{value:.0%}" if kind == "ratio" and isinstance(value, float) else f"{kind} {value}"


def parse_pattern(text: str) -> tuple[int, int]:
    """``"2:4"`` as (2, 4): of every 4 consecutive weights 2 are zeroed."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if match is None:
        raise BudgetError(f"bad pattern {text!r}", "write N:M, for example 2:4")
    return int(match[1]), int(match[2])


def experts_to_remove(budget: Budget, shape: LayerShape) -> int:
    """How many experts ``budget`` removes from a layer; ``ratio`` rounds down.

    With routing groups, and with ``multiple_of``, a ratio keeps the next number that divides.

    Raises:
        BudgetError: ``keep`` is larger than the number of experts, or does not divide.
    """
    step = math.lcm(shape.groups, budget.multiple_of)
    if budget.keep is None:
        assert budget.ratio is not None, "callers accept ratio and keep only"
        kept = shape.experts - math.floor(shape.experts * budget.ratio + _SLACK)
        return shape.experts - next_multiple(kept, step, shape)
    if budget.keep > shape.experts:
        raise BudgetError(
            f"--keep {budget.keep}: layer {shape.layer} has {shape.experts} experts",
            f"keep at most {shape.experts}",
        )
    if budget.keep % step and budget.keep != shape.experts:
        groups = f"the {shape.groups} routing groups" if shape.groups > 1 else ""
        divisor = f"--multiple-of {budget.multiple_of}" if budget.multiple_of > 1 else ""
        raise BudgetError(
            f"--keep {budget.keep} leaves {budget.keep} experts, not a multiple of "
            f"{' and '.join(text for text in (groups, divisor) if text)}",
            f"use --keep {next_multiple(budget.keep, step, shape)}",
        )
    return shape.experts - budget.keep


def next_multiple(kept: int, step: int, shape: LayerShape) -> int:
    """The least multiple of ``step`` that is at least ``kept``, or else the greatest up to E.

    Raises:
        BudgetError: E is less than ``step``.
    """
    if step > shape.experts:
        raise BudgetError(
            f"layer {shape.layer} has {shape.experts} experts: none of its numbers is a multiple "
            f"of {step}",
            f"use --multiple-of {shape.experts} or less",
        )
    return min(math.ceil(kept / step), shape.experts // step) * step


def least_kept(shape: LayerShape, floor: int = 0, multiple_of: int = 1) -> int:
    """The fewest experts that a layer can route over: at least ``floor`` (the user's own, up to E).

    Rounded up to the next number that routing groups and ``multiple_of`` divide.

    K experts must exist; a group-limited router needs the same number in every group, two for the
    sum of the two best that ranks a group, and K among the groups that a token may choose from.
    """
    floor = min(floor, shape.experts)
    least = max(shape.top_k, floor)
    if shape.groups > 1:
        per_group = max(
            2, math.ceil(shape.top_k / shape.top_groups), math.ceil(floor / shape.groups)
        )
        least = per_group * shape.groups
    return next_multiple(least, math.lcm(shape.groups, multiple_of), shape)


def removable(budget: Budget, shape: LayerShape, floor: int = 0) -> int:
    """How many experts to delete from a layer, such that the router still works.

    Raises:
        BudgetError: fewer than ``least_kept`` would remain, or groups would become unequal.
    """
    remove = experts_to_remove(budget, shape)
    kept, least = shape.experts - remove, least_kept(shape, floor, budget.multiple_of)
    if kept < least:
        asked = f"--keep {budget.keep}" if budget.keep is not None else f"ratio {budget.ratio:g}"
        reason = f"top-k is {shape.top_k}" if shape.groups == 1 else f"{shape.groups} groups"
        if least > least_kept(shape, 0, budget.multiple_of):
            reason = f"the floor is {floor}"
        raise BudgetError(
            f"{asked} leaves {kept} of {shape.experts} experts in layer {shape.layer}, "
            f"but {least} must stay ({reason})",
            f"use --keep {least} or more (ratio {1 - least / shape.experts:.4g} or less)",
        )
    return remove


def removal_range(
    shape: LayerShape,
    least: int,
    multiple_of: int = 1,
    pinned: Collection[int] = (),
    forbidden: Collection[int] = (),
) -> tuple[int, int]:
    """The fewest and the most experts that can be removed from a layer.

    ``least`` experts and all pinned ones stay, all forbidden ones go, the same number goes from
    every routing group, and what is kept is a multiple of ``multiple_of`` (if E is none, of the
    numbers below it).

    Raises:
        BudgetError: no number fits.
    """
    step = math.lcm(shape.groups, multiple_of)
    pins, bans = _by_group(pinned, shape), _by_group(forbidden, shape)
    few = shape.groups * max(bans)
    many = min(shape.experts - least, shape.groups * (shape.experts // shape.groups - max(pins)))
    rest = shape.experts % step  # E - n is a multiple of step for n = rest, rest + step, ...
    low = rest + math.ceil(max(0, few - rest) / step) * step
    high = rest + (many - rest) // step * step
    if low > high:
        raise BudgetError(
            f"layer {shape.layer}: {len(pinned)} experts are pinned or protected and "
            f"{len(forbidden)} forbidden; no number of experts from {least} on satisfies that",
            "pin or forbid fewer experts",
        )
    return low, high


def lowest(
    scores: Sequence[float],
    counts: Sequence[int],
    remove: int,
    shape: LayerShape,
    pinned: Collection[int] = (),
    forbidden: Collection[int] = (),
) -> list[int]:
    """The ``remove`` experts with the lowest scores, ascending by id.

    Ties break by the number of tokens, then by id: the expert that was used less, then the lower
    id, goes first. With routing groups the same number goes from every group. NaN ranks lowest.
    All ``forbidden`` experts are among them, and no ``pinned`` one is.

    Raises:
        BudgetError: more experts are forbidden, or fewer are not pinned, than are to be removed.
    """
    check_fixed(remove, shape, pinned, forbidden)
    quota = [remove // shape.groups] * shape.groups
    order = sorted(
        (e for e in range(shape.experts) if e not in pinned),
        key=lambda e: (
            e not in forbidden,
            -math.inf if math.isnan(scores[e]) else scores[e],
            counts[e],
            e,
        ),
    )
    chosen = []
    for expert in order:
        group = shape.group_of(expert)
        if quota[group]:
            quota[group] -= 1
            chosen.append(expert)
    return sorted(chosen)


def _by_group(experts: Collection[int], shape: LayerShape) -> list[int]:
    """How many of ``experts`` are in each routing group."""
    found = [0] * shape.groups
    for expert in experts:
        found[shape.group_of(expert)] += 1
    return found


def check_fixed(
    remove: int, shape: LayerShape, pinned: Collection[int], forbidden: Collection[int]
) -> None:
    """Raise ``BudgetError`` if ``remove`` experts cannot be all forbidden and no pinned ones."""
    quota = remove // shape.groups
    pins, bans = max(_by_group(pinned, shape)), max(_by_group(forbidden, shape))
    size = shape.experts // shape.groups
    where = f"layer {shape.layer}" + (", one routing group" if shape.groups > 1 else "")
    asked = f"the budget removes {quota} of {size} experts"
    if quota > size - pins:
        raise BudgetError(
            f"{where}: {asked}, but {pins} are pinned or protected",
            f"pin fewer, or keep at least {shape.groups * pins}",
        )
    if bans > quota:
        raise BudgetError(
            f"{where}: {asked}, but {bans} are forbidden",
            f"forbid fewer, or keep at most {shape.groups * (size - bans)}",
        )
