"""From what the user asks for to numbers per layer."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeprune.core.budget import (
    Budget,
    experts_to_remove,
    least_kept,
    lowest,
    parse_pattern,
    removable,
)
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError


def shape(experts: int, top_k: int = 2, groups: int = 1, top_groups: int = 1) -> LayerShape:
    return LayerShape(3, experts, top_k, 8, 12, groups, top_groups)


@pytest.mark.parametrize(
    ("budget", "json", "text"),
    [
        (Budget(ratio=0.5), {"ratio": 0.5}, "50%"),
        (Budget(keep=0), {"keep": 0}, "keep 0"),
        (Budget(tau=-1.25), {"tau": -1.25}, "tau -1.25"),
        (Budget(pattern=(2, 4)), {"pattern": "2:4"}, "pattern 2:4"),
        (Budget(ratio=0.5, multiple_of=8), {"ratio": 0.5, "multiple_of": 8}, "50%"),
    ],
)
def test_kinds(budget: Budget, json: dict[str, object], text: str) -> None:
    assert budget.kind == next(iter(json))
    assert budget.to_json() == json
    assert str(budget) == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one budget .got none"),
        ({"ratio": 0.5, "keep": 4}, "got --ratio and --keep"),
        ({"ratio": 1.0}, "ratio out of range: 1"),
        ({"ratio": -0.1}, "ratio out of range"),
        ({"ratio": math.nan}, "ratio out of range"),
        ({"keep": -1}, "must not be negative"),
        ({"tau": math.inf}, "finite"),
        ({"tau": math.nan}, "finite"),
        ({"pattern": (4, 4)}, "bad pattern 4:4"),
        ({"pattern": (0, 4)}, "bad pattern 0:4"),
        ({"ratio": 0.5, "multiple_of": 0}, "--multiple-of must be at least 1"),
    ],
)
def test_impossible_budgets(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**fields)  # type: ignore[arg-type]


def test_patterns() -> None:
    assert parse_pattern(" 2:4 ") == (2, 4)
    for text in ("2", "2:", "a:b", "2:4:8", "-2:4", ""):
        with pytest.raises(BudgetError, match="bad pattern"):
            parse_pattern(text)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 512), st.integers(0, 999))
@example(100, 290)  # 28.999999999999996 in binary
@example(50, 580)
def test_a_ratio_rounds_down_and_means_what_it_says_in_decimal(experts: int, mills: int) -> None:
    exact = math.floor(Fraction(mills, 1000) * experts)
    assert experts_to_remove(Budget(ratio=mills / 1000), shape(experts, 1)) == exact


def test_keep_is_exact_and_bounded() -> None:
    assert experts_to_remove(Budget(keep=0), shape(8)) == 8
    assert experts_to_remove(Budget(keep=8), shape(8)) == 0
    with pytest.raises(BudgetError, match="--keep 9: layer 3 has 8 experts") as caught:
        experts_to_remove(Budget(keep=9), shape(8))
    assert caught.value.hint == "keep at most 8"


@pytest.mark.parametrize(
    ("layer", "floor", "least"),
    [
        (shape(8, 2), 0, 2),
        (shape(8, 2), 5, 5),
        (shape(8, 4), 1, 4),
        (shape(8, 2), 99, 8),  # a floor above E means all
        (shape(8, 2, groups=2), 0, 4),
        (shape(8, 2, groups=2, top_groups=2), 0, 4),  # the two best of a group rank it
        (shape(8, 1, groups=4), 0, 8),
        (shape(16, 6, groups=4, top_groups=2), 0, 12),  # six among two groups
        (shape(16, 6, groups=4, top_groups=4), 0, 8),
        (shape(16, 2, groups=4, top_groups=2), 9, 12),
        (shape(16, 2, groups=4, top_groups=2), 99, 16),
    ],
)
def test_the_fewest_experts_of_a_router(layer: LayerShape, floor: int, least: int) -> None:
    assert least_kept(layer, floor) == least


def test_removable() -> None:
    assert removable(Budget(ratio=0.5), shape(8)) == 4
    assert removable(Budget(keep=2), shape(8)) == 6
    assert removable(Budget(ratio=0.4), shape(8, 2, groups=2)) == 2  # three, rounded to groups
    assert removable(Budget(ratio=0.0), shape(8)) == 0


@pytest.mark.parametrize(
    ("budget", "layer", "floor", "message", "hint"),
    [
        (Budget(keep=1), shape(8), 0, "leaves 1 of 8.*2 must stay .top-k is 2", "--keep 2 or more"),
        (Budget(ratio=0.9), shape(8, 4), 0, "ratio 0.9 leaves 1", "ratio 0.5 or less"),
        (Budget(keep=2), shape(8, 2, 2), 0, "4 must stay .2 groups", "--keep 4"),
        (Budget(keep=5), shape(8, 2, 2), 0, "not a multiple of the 2", "--keep 6"),
        (Budget(keep=3), shape(8), 5, "5 must stay .the floor is 5", "--keep 5"),
        (Budget(keep=9), shape(8), 0, "layer 3 has 8 experts", "at most 8"),
        (Budget(keep=5, multiple_of=4), shape(8), 0, "of --multiple-of 4", "--keep 8"),
        (Budget(keep=6, multiple_of=4), shape(8, 2, 2), 0, "2 routing groups and --m", "--keep 8"),
        (Budget(ratio=0.9, multiple_of=4), shape(16, 6), 0, "leaves 4 of 16", "--keep 8"),
        (Budget(ratio=0.5, multiple_of=16), shape(8), 0, "none of its numbers", "of 8 or less"),
    ],
)
def test_refusals_say_what_would_work(
    budget: Budget, layer: LayerShape, floor: int, message: str, hint: str
) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        removable(budget, layer, floor)
    assert hint in caught.value.hint


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 24),
    st.floats(0, 1, exclude_max=True),
)
def test_what_is_removable_leaves_a_router_that_works(
    groups: int, per_group: int, top_k: int, floor: int, ratio: float
) -> None:
    layer = shape(groups * per_group, min(top_k, groups * per_group), groups)
    try:
        remove = removable(Budget(ratio=ratio), layer, floor)
    except BudgetError:
        asked = experts_to_remove(Budget(ratio=ratio), layer)
        assert layer.experts - asked < least_kept(layer, floor) + groups
        return
    kept = layer.experts - remove
    assert kept >= least_kept(layer, floor) >= layer.top_k
    assert kept % groups == 0
    assert 0 <= experts_to_remove(Budget(ratio=ratio), layer) - remove < groups


def test_multiples_by_hand() -> None:
    def kept(ratio: float, step: int, layer: LayerShape) -> int:
        return layer.experts - removable(Budget(ratio=ratio, multiple_of=step), layer)

    assert kept(0.5, 8, shape(60)) == 32  # 30, rounded up
    assert kept(0.05, 8, shape(60)) == 56  # 57, and there is no 64
    assert kept(0.0, 8, shape(60)) == 56
    assert kept(0.0, 8, shape(64)) == 64
    assert kept(0.5, 4, shape(24, 2, groups=3)) == 12
    assert kept(0.6, 4, shape(24, 2, groups=3)) == 12  # a multiple of both 3 and 4
    assert removable(Budget(keep=16, multiple_of=8), shape(60)) == 44


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 96), st.integers(1, 12), st.floats(0, 1, exclude_max=True))
def test_a_multiple_is_the_next_one_that_exists(experts: int, step: int, ratio: float) -> None:
    layer = shape(experts, 1)
    if step > experts:
        with pytest.raises(BudgetError, match="none of its numbers"):
            experts_to_remove(Budget(ratio=ratio, multiple_of=step), layer)
        return
    kept = experts - experts_to_remove(Budget(ratio=ratio, multiple_of=step), layer)
    asked = experts - experts_to_remove(Budget(ratio=ratio), layer)
    multiples = list(range(0, experts + 1, step))
    assert kept == next((n for n in multiples if n >= asked), multiples[-1])


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 5))
def test_lowest_equals_a_sort_per_group(data: st.DataObject, groups: int, per_group: int) -> None:
    layer = shape(groups * per_group, 1, groups)
    score = st.sampled_from([0.0, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan])
    scores = data.draw(st.lists(score, min_size=layer.experts, max_size=layer.experts))
    counts = data.draw(st.lists(st.integers(0, 2), min_size=layer.experts, max_size=layer.experts))
    each = data.draw(st.integers(0, per_group))
    expected = []
    for group in range(groups):
        ids = list(range(group * per_group, (group + 1) * per_group))
        keys = [(-math.inf if scores[e] != scores[e] else scores[e], counts[e], e) for e in ids]
        expected += [e for _, _, e in sorted(keys)[:each]]
    assert lowest(scores, counts, each * groups, layer) == sorted(expected)


def test_ties_break_by_tokens_then_by_id() -> None:
    assert lowest([1, 1, 1, 0], [5, 3, 3, 9], 2, shape(4)) == [1, 3]
    assert lowest([math.nan, 0, 0, 0], [9, 0, 0, 0], 1, shape(4)) == [0]
