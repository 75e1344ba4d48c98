"""Sizes as budgets: how they are written, and the least removal that fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.core.targets import Target, parse_size
from moeprune.errors import BudgetError, PlanError


@dataclass(frozen=True)
class Toy(Method):
    """A method that is never run."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "for tests"
    source: ClassVar[str] = "none"
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "keep")

    scope: Literal["layer", "global"] = "layer"

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        raise NotImplementedError


def shape(experts: int, groups: int = 1) -> LayerShape:
    return LayerShape(0, experts, 2, 4, 6, groups, groups)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gb", 24 * 10**9),
        ("1.5MiB", 3 * 2**19),
        ("900kB", 900_000),
        ("2TB", 2 * 10**12),
        ("123", 123),
        ("123B", 123),
        ("8e9", 8 * 10**9),
        ("1.5e9", 1_500_000_000),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text, "target-bytes") == value


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 2", "1XB", "1e", "inf", "nan", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(BudgetError, match="bad --target-bytes"):
        parse_size(text, "target-bytes")
    with pytest.raises(BudgetError, match="bad --target-params"):
        parse_size("8GB", "target-params")


def test_candidates_are_what_the_method_takes() -> None:
    target = Target(bytes=1)
    assert [b.keep for b in target.candidates(Toy(), [shape(4), shape(4)])] == [4, 3, 2, 1, 0]
    assert [b.keep for b in target.candidates(Toy(), [shape(8, 2)])] == [8, 6, 4, 2, 0]
    eights = Target(parameters=1, multiple_of=8)
    assert [b.keep for b in eights.candidates(Toy(), [shape(20)])] == [16, 8, 0]
    totals = target.candidates(Toy("global"), [shape(3), shape(2)])
    assert [b.total for b in totals] == [5, 4, 3, 2, 1, 0]
    ratios = [b.ratio for b in target.candidates(Toy(), [shape(2), shape(3)])]
    assert ratios == [0, 1 / 3, 1 / 2, 2 / 3]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 40)
)
def test_the_first_that_fits(drops: list[int], goal: int, possible: int) -> None:
    """Sizes that only fall, of which those from ``possible`` on cannot be made."""
    sizes = sorted(drops, reverse=True)
    asked = []

    def size_of(budget: Budget) -> int:
        assert budget.total is not None
        asked.append(budget.total)
        if budget.total >= possible:
            raise (PlanError if possible % 2 else BudgetError)("no more can go")
        return sizes[budget.total]

    budgets = [Budget(total=i) for i in range(len(sizes))]
    fits = [i for i, size in enumerate(sizes) if i < possible and size <= goal]
    if fits:
        assert Target(bytes=goal).search(Toy(), budgets, size_of) == (
            budgets[fits[0]],
            sizes[fits[0]],
        )
    elif possible:
        smallest = sizes[min(possible, len(sizes)) - 1]
        with pytest.raises(BudgetError, match=f"the smallest result of toy has {smallest} bytes"):
            Target(bytes=goal).search(Toy(), budgets, size_of)
    else:
        with pytest.raises((BudgetError, PlanError), match="no more can go"):
            Target(bytes=goal).search(Toy(), budgets, size_of)
    assert len(asked) == len(set(asked)) <= len(sizes).bit_length() + 1


def test_impossible_targets() -> None:
    for fields in ({}, {"bytes": 1, "parameters": 1}):
        with pytest.raises(BudgetError, match="give exactly one"):
            Target(**fields)
    with pytest.raises(BudgetError, match="--target-params must be positive"):
        Target(parameters=0)
    with pytest.raises(BudgetError, match="multiple-of must be at least 1"):
        Target(bytes=1, multiple_of=0)
