"""Who goes when layers share a budget, when experts are pinned or forbidden, and when both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.rows import SMALL
from moeprune.core.allocation import Candidates, by_importance, by_score
from moeprune.core.budget import Budget, least_kept, lowest, removal_range
from moeprune.core.dropping import Dropper
from moeprune.core.method import Context, LayerView
from moeprune.core.plan import LayerPlan
from moeprune.core.ranking import Rating
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError


@dataclass(frozen=True)
class Given(Dropper):
    """Scores that a test gives, by layer."""

    name: ClassVar[str] = "given"
    summary: ClassVar[str] = "for tests"
    source: ClassVar[str] = "none"

    table: tuple[tuple[float, ...], ...] = field(default=())

    def rate(self, view: LayerView, context: Context) -> Rating:
        scores = list(self.table[view.shape.layer])
        return Rating("given", scores, [0] * len(scores))


class Otherwise(Given):
    """Somebody's method that decides about all layers in its own way."""

    def plan_model(self, views: Iterable[LayerView], context: Context) -> dict[int, LayerPlan]:
        return super().plan_model(views, context)


def test_what_decides_about_all_layers_itself_is_asked_for_all() -> None:
    assert not Given().competes and Given(scope="global").competes and Otherwise().competes


def bare(table: Sequence[Sequence[float]], top_k: int = 1, groups: int = 1) -> list[LayerView]:
    return [
        LayerView(
            LayerShape(layer, len(scores), top_k, 8, 12, groups, groups), None, None  # type: ignore[arg-type]
        )
        for layer, scores in enumerate(table)
    ]  # fmt: skip


def plans(
    table: Sequence[Sequence[float]], context: Context, groups: int = 1, **options: object
) -> dict[int, LayerPlan]:
    made = Given(table=tuple(map(tuple, table)), **options)  # type: ignore[arg-type]
    return made.plan_model(bare(table, groups=groups), context)


def kept(table: Sequence[Sequence[float]], context: Context, **options: object) -> list[list[int]]:
    return [list(plan.keep) for plan in plans(table, context, **options).values()]  # type: ignore[arg-type]


TABLE = [[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0], [7.0, 7.0, 7.0, 7.0]]


def test_global_scope_by_hand() -> None:
    half = Context(Budget(ratio=0.5))
    # divided by means 2.5, 25, 7: .4 .8 1.2 1.6 twice, and four times 1
    assert kept(TABLE, half, scope="global") == [[2, 3], [2, 3], [2, 3]]
    # as they are: all of layer 0 but its best, then the sevens but one
    assert kept(TABLE, half, scope="global", normalise=False) == [[3], [0, 1, 2, 3], [3]]
    total = Context(Budget(total=4))
    assert kept(TABLE, total, scope="global", normalise=False) == [[3], [2, 3], [3]]


def test_importance_scope_by_hand() -> None:
    # shares 10, 100, 28 of 138: nobody can keep more than 4, and everybody keeps 1
    assert kept(TABLE, Context(Budget(total=6)), scope="importance") == [[3], [0, 1, 2, 3], [3]]
    # of the first that are free, 28 / 1.5 and 28 / 2.5 come before 10 / 1.5
    assert kept(TABLE, Context(Budget(total=8)), scope="importance") == [
        [3],
        [0, 1, 2, 3],
        [1, 2, 3],
    ]
    equal = [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]
    assert kept(equal, Context(Budget(total=4)), scope="importance") == [[1, 2], [0, 1]]
    zero = [[0.0] * 4, [0.0] * 4]
    assert kept(zero, Context(Budget(ratio=0.5)), scope="importance") == [[2, 3], [2, 3]]


def slow_global(
    table: Sequence[Sequence[float]], remove: int, pinned: dict[int, set[int]], least: int
) -> dict[int, int]:
    """Take the lowest score of any expert that may go, one at a time."""
    gone: dict[int, set[int]] = {layer: set() for layer in range(len(table))}
    for _ in range(remove):
        best = None
        for layer, scores in enumerate(table):
            mean = sum(scores) / len(scores) or 1.0
            for e, score in enumerate(scores):
                free = e not in gone[layer] and e not in pinned.get(layer, set())
                if free and len(scores) - len(gone[layer]) > least:
                    key = (score / mean, layer, e)
                    best = key if best is None else min(best, key)
        assert best is not None
        gone[best[1]].add(best[2])
    return {layer: len(experts) for layer, experts in gone.items()}


score = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
tables = st.lists(st.lists(score, min_size=2, max_size=6), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(tables, st.data())
def test_global_scope_is_one_expert_after_another(
    table: list[list[float]], data: st.DataObject
) -> None:
    pinned = {
        layer: data.draw(st.sets(st.integers(0, len(s) - 1))) for layer, s in enumerate(table)
    }
    most = sum(min(len(s) - 1, len(s) - len(pinned[i])) for i, s in enumerate(table))
    remove = data.draw(st.integers(0, most))
    every = sum(map(len, table))
    context = Context(
        Budget(total=every - remove), pinned={i: frozenset(ids) for i, ids in pinned.items()}
    )
    found = plans(table, context, scope="global")
    expected = slow_global(table, remove, pinned, 1)
    assert {i: len(plan.dropped) for i, plan in found.items()} == expected
    assert all(pinned[i] <= set(plan.keep) for i, plan in found.items())


@settings(max_examples=150, deadline=None)
@given(tables, st.sampled_from(["global", "importance"]), st.booleans())
def test_plans_are_nested(table: list[list[float]], scope: str, normalise: bool) -> None:
    every = sum(map(len, table))
    before = None
    for total in range(every, len(table) - 1, -1):
        found = kept(table, Context(Budget(total=total)), scope=scope, normalise=normalise)
        assert sum(map(len, found)) == total
        if before is not None:
            assert all(set(a) < set(b) or a == b for a, b in zip(found, before, strict=True))
        before = found


@settings(max_examples=100, deadline=None)
@given(tables, st.data())
def test_importance_is_the_divisor_method(table: list[list[float]], data: st.DataObject) -> None:
    """No layer could give an expert to another and be closer to proportion: Webster."""
    weights = [sum(scores) for scores in table]
    assume(all(weights))
    total = data.draw(st.integers(len(table), sum(map(len, table))))
    layers = [
        Candidates(i, s, [0] * len(s), 0, len(s) - 1) for i, s in enumerate(table)
    ]  # fmt: skip
    removed = by_importance(layers, sum(map(len, table)) - total)
    counts = [len(s) - removed[i] for i, s in enumerate(table)]
    assert sum(counts) == total and all(
        1 <= n <= len(s) for n, s in zip(counts, table, strict=True)
    )
    for giver, n in enumerate(counts):
        for taker, m in enumerate(counts):
            if giver != taker and n > 1 and m < len(table[taker]):
                assert weights[giver] / (n - 0.5) >= weights[taker] / (m + 0.5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), st.data())
def test_pinned_stay_and_forbidden_go(
    groups: int, per_group: int, multiple_of: int, data: st.DataObject
) -> None:
    E = groups * per_group
    shape = LayerShape(0, E, 1, 8, 12, groups, groups)
    fate = data.draw(st.lists(st.sampled_from("pf...."), min_size=E, max_size=E))
    pinned = frozenset(e for e, what in enumerate(fate) if what == "p")
    forbidden = frozenset(e for e, what in enumerate(fate) if what == "f")
    scores = data.draw(st.lists(score, min_size=E, max_size=E))
    step = math.lcm(groups, multiple_of)
    assume(step <= E)
    least = least_kept(shape, 0, multiple_of)

    def possible(n: int) -> bool:
        try:
            gone = lowest(scores, [0] * E, n, shape, pinned, forbidden)
        except BudgetError:
            return False
        assert len(gone) == n and not pinned & set(gone) and forbidden <= set(gone)
        return True

    valid = [n for n in range(E - least + 1) if (E - n) % step == 0 and n % groups == 0]
    fits = [n for n in valid if possible(n)]
    try:
        low, high = removal_range(shape, least, multiple_of, pinned, forbidden)
    except BudgetError:
        assert not fits
        return
    assert (low, high) == (min(fits), max(fits))


def test_pins_and_bans_beat_scores() -> None:
    context = Context(
        Budget(keep=2), pinned={0: frozenset({0})}, forbidden={0: frozenset({3}), 1: frozenset({3})}
    )
    for scope in ("layer", "global"):
        found = kept(TABLE, context, scope=scope)
        assert 0 in found[0] and 3 not in found[0] and 3 not in found[1]
        assert sum(map(len, found)) == 6


@pytest.mark.parametrize(
    ("context", "message", "hint"),
    [
        (
            Context(Budget(keep=1), pinned={0: frozenset({0, 1})}),
            "layer 0: the budget removes 3 of 4 experts, but 2 are pinned or protected",
            "keep at least 2",
        ),
        (
            Context(Budget(keep=3), forbidden={1: frozenset({0, 1})}),
            "layer 1: the budget removes 1 of 4 experts, but 2 are forbidden",
            "keep at most 2",
        ),
    ],
)
def test_refusals_of_one_layer(context: Context, message: str, hint: str) -> None:
    with pytest.raises(BudgetError, match=message) as caught:
        plans(TABLE, context)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (Context(Budget(ratio=0.75), pinned={0: frozenset({0, 1})}), "9 of 12 .* only 8 can"),
        (Context(Budget(total=12), forbidden={0: frozenset({0})}), "0 of 12 .* at least 1 must"),
        (Context(Budget(total=13)), "13 of 12 experts cannot be kept"),
        (
            Context(Budget(ratio=0.5), forbidden={2: frozenset({0, 1, 2, 3})}),
            "layer 2: 0 experts are pinned or protected and 4 forbidden",
        ),
    ],
)
@pytest.mark.parametrize("scope", ["global", "importance"])
def test_refusals_of_all_layers(context: Context, message: str, scope: str) -> None:
    with pytest.raises(BudgetError, match=message):
        plans(TABLE, context, scope=scope)


def test_a_total_is_for_layers_that_compete() -> None:
    Given(scope="global").accept(Budget(total=3))
    with pytest.raises(BudgetError, match="given has no --total"):
        Given().accept(Budget(total=3))


@pytest.mark.parametrize("scope", ["global", "importance"])
def test_groups_and_multiples_are_kept_in_every_layer(scope: str) -> None:
    table = [[float(e * (layer + 1) % 7) for e in range(12)] for layer in range(3)]
    context = Context(Budget(ratio=0.5, multiple_of=2))
    for plan in plans(table, context, groups=3, scope=scope).values():
        shape = LayerShape(plan.layer, 12, 1, 8, 12, 3, 3)
        groups = [shape.group_of(e) for e in plan.keep]
        assert len(plan.keep) % 6 == 0 and len(set(map(groups.count, range(3)))) == 1


def test_nan_ranks_lowest_everywhere() -> None:
    table = [[math.nan, 1.0, 2.0], [5.0, 6.0, math.nan]]
    for scope in ("layer", "global"):
        warnings: list[str] = []
        context = Context(Budget(keep=2), warn=warnings.append)
        assert kept(table, context, scope=scope) == [[1, 2], [0, 1]]
        assert len(warnings) == 2
    layers = [Candidates(0, table[0], [0, 0, 0], 0, 2)]
    assert by_score(layers, 1, True) == {0: 1}


def test_uniform_of_a_competition_is_the_same_ranking() -> None:
    method = Given(scope="global", table=((1.0, 2.0),))
    assert method.per_layer() == replace(method, scope="layer")
    assert SMALL.groups == 1
