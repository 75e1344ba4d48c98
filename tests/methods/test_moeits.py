"""MoEITS: what is removed, how far, and when it says that it sees nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.rows import SMALL, Weights, random_weights, view_of
from families import tiny_model
from methods.conftest import experts_of
from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView
from moeprune.core.ops.nmi import pairwise_nmi
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError, MoepruneError
from moeprune.methods import moeits
from moeprune.methods.moeits import MoEITS
from moeprune.pipeline import stages

Matrix = NDArray[np.float64]

# sixteenths; removal order 1 (for 0), 2 (for 3), 3 (for 0): derived by hand in tests/core/ops
F1 = np.array([[0, 14, 4, 2], [14, 0, 6, 11], [4, 6, 0, 12], [2, 11, 12, 0]]) / 16


class Given(MoEITS):
    """The method on a similarity matrix that is handed to it, free of weights."""

    matrix: Matrix

    @classmethod
    def on(cls, matrix: Matrix, **options: Any) -> Given:
        method = cls(**options)
        object.__setattr__(method, "matrix", matrix)
        return method

    def similarity(self, view: LayerView, context: Context) -> Matrix:
        return self.matrix


def shape_of(experts: int, top_k: int = 1, groups: int = 1) -> LayerShape:
    return LayerShape(0, experts, top_k, 8, 12, groups)


def decided(
    matrix: Matrix, budget: Budget, top_k: int = 1, groups: int = 1, **options: Any
) -> tuple[LayerPlan, list[str]]:
    """The plan for a matrix, and the warnings."""
    shape = shape_of(len(matrix), top_k, groups)
    warnings: list[str] = []
    context = Context(budget, warn=warnings.append)
    method = Given.on(matrix, **options)
    plan = method.plan_layer(view_of(shape, None, random_weights(shape)), context)
    plan.check(shape)
    return plan, warnings


def keep(matrix: Matrix, budget: Budget, **options: Any) -> set[int]:
    return set(decided(matrix, budget, **options)[0].keep)


def random_matrix(experts: int, seed: int) -> Matrix:
    upper = np.triu(np.random.default_rng(seed).random((experts, experts)), 1)
    return upper + upper.T


# the matrix decides ------------------------------------------------------------------------------


def test_f1_by_hand() -> None:
    kept = {0: {0, 1, 2, 3}, 1: {0, 2, 3}, 2: {0, 3}, 3: {0}}
    for removed, expected in kept.items():
        assert keep(F1, Budget(keep=4 - removed)) == expected
        assert keep(F1, Budget(ratio=removed / 4)) == expected
    plan, _ = decided(F1, Budget(keep=2))
    assert plan.scores["removed_at"] == (None, 0.0, 1.0, None)
    assert plan.scores["closeness"] == tuple(s / 16 / 3 for s in (20, 31, 22, 25))


@pytest.mark.parametrize(
    ("mode", "tau", "removed"),
    [  # bars in sixteenths: 6.125 + 9.75 tau with the zero diagonal, 98 / 12 + 8 tau without
        ("compat", -1, 3),
        ("compat", 0.25, 2),
        ("compat", 0.75, 1),
        ("compat", 1, 0),
        ("off-diagonal", -1, 3),
        ("off-diagonal", 0.25, 2),
        ("off-diagonal", 0.5, 1),
        ("off-diagonal", 0.75, 0),
    ],
)
def test_f1_thresholds_by_hand(mode: str, tau: float, removed: int) -> None:
    assert len(keep(F1, Budget(tau=tau), threshold=mode)) == 4 - removed


def naive_bar(matrix: Matrix, tau: float, compat: bool) -> float:
    size = len(matrix)
    entries = sorted(matrix[i, j] for i in range(size) for j in range(size) if compat or i != j)

    def quantile(part: float) -> float:
        rank = part * (len(entries) - 1)
        low = int(rank)
        high = min(low + 1, len(entries) - 1)
        return float(entries[low] + (rank - low) * (entries[high] - entries[low]))

    return sum(entries) / len(entries) + tau * (quantile(0.75) - quantile(0.25))


def naive_kept(matrix: Matrix, bar: float) -> list[int]:
    """The authors' loop: closest pair above the bar, the more central of the two goes."""
    alive = list(range(len(matrix)))
    while len(alive) > 1:
        pairs = [(matrix[a, b], -i, -j) for i, a in enumerate(alive) for j, b in enumerate(alive)]
        value, i, j = max(p for p in pairs if -p[1] < -p[2])
        if not value > bar:
            break
        a, b = alive[-i], alive[-j]
        central = matrix[a, alive].sum() > matrix[b, alive].sum() and len(alive) > 2
        alive.remove(a if central else b)
    return alive


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(0, 2**32 - 1),
    st.floats(-2, 4),
    st.sampled_from(["compat", "off-diagonal"]),
)
def test_tau_equals_the_authors_loop(experts: int, seed: int, tau: float, mode: str) -> None:
    matrix = random_matrix(experts, seed)
    bar = naive_bar(matrix, tau, mode == "compat")
    if np.abs(matrix - bar).min() < 1e-12:
        return  # rounding decides
    assert sorted(keep(matrix, Budget(tau=tau), threshold=mode)) == naive_kept(matrix, bar)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.integers(0, 2**32 - 1),
    st.lists(st.floats(-3, 5), min_size=2, max_size=5),
    st.integers(1, 4),
)
def test_smaller_tau_keeps_a_subset(experts: int, seed: int, taus: list[float], floor: int) -> None:
    matrix = random_matrix(experts, seed)
    kept = [keep(matrix, Budget(tau=tau), floor=floor) for tau in sorted(taus)]
    for strict, lax in pairwise(kept):
        assert strict <= lax
    assert len(kept[0]) >= min(floor, experts)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 2**32 - 1), st.data())
def test_budgets_are_exact_and_nested(experts: int, seed: int, data: st.DataObject) -> None:
    matrix = random_matrix(experts, seed)
    top_k = data.draw(st.integers(1, experts))
    kept = [keep(matrix, Budget(keep=n), top_k=top_k) for n in range(top_k, experts + 1)]
    assert [len(ids) for ids in kept] == list(range(top_k, experts + 1))
    assert all(few < more for few, more in pairwise(kept))


def test_the_floor_is_top_k_or_the_users_own() -> None:
    matrix = random_matrix(8, 0)
    everything = Budget(tau=-1000.0)
    for top_k, floor, least in ((1, 0, 1), (3, 0, 3), (3, 5, 5), (2, 99, 8)):
        plan, warnings = decided(matrix, everything, top_k, floor=floor)
        assert len(plan.keep) == least
        below = [text for text in warnings if f"fewer than the {least} experts" in text]
        assert len(below) == (least > 1)
    with pytest.raises(BudgetError, match="top-k is 3"):
        decided(matrix, Budget(keep=2), 3)
    with pytest.raises(BudgetError, match="the floor is 5"):
        decided(matrix, Budget(keep=4), 3, floor=5)


def test_reaching_the_floor_by_tau_itself_is_no_reason_to_warn() -> None:
    matrix = np.full((4, 4), 0.1)
    matrix[0, 1] = matrix[1, 0] = 0.9
    plan, warnings = decided(matrix, Budget(tau=1.0), top_k=3)
    assert plan.keep == (0, 2, 3)
    assert not any("fewer than" in text for text in warnings)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 2**32 - 1), st.floats(-3, 4))
def test_routing_groups_keep_the_same_number(groups: int, size: int, seed: int, tau: float) -> None:
    matrix = random_matrix(groups * size, seed)
    for budget in (Budget(tau=tau), Budget(ratio=0.4), Budget(keep=2 * groups)):
        kept = keep(matrix, budget, groups=groups)
        per_group = [sum(e // size == g for e in kept) for g in range(groups)]
        assert len(set(per_group)) == 1
        assert per_group[0] >= (2 if groups > 1 else 1)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 2**32 - 1), st.integers(2, 7))
def test_permuting_experts_permutes_the_plan(labels: Sequence[int], seed: int, kept: int) -> None:
    matrix = random_matrix(7, seed)
    original, _ = decided(matrix, Budget(keep=kept), top_k=2)
    permuted, _ = decided(matrix[np.ix_(labels, labels)], Budget(keep=kept), top_k=2)
    assert {labels[e] for e in permuted.keep} == set(original.keep)
    for name in ("closeness", "removed_at"):
        moved = [original.scores[name][e] for e in labels]
        assert list(permuted.scores[name]) == pytest.approx(moved)


# weights decide ----------------------------------------------------------------------------------


def with_copies(weights: Weights, copies: dict[int, int], noise: float = 0.0) -> Weights:
    """Experts of which some are (almost) copies of others."""
    generator = torch.Generator().manual_seed(3)
    changed = {role: table.clone() for role, table in weights.by_role.items()}
    for table in changed.values():
        for copy, original in copies.items():
            bit = torch.randn(table[0].shape, generator=generator)
            table[copy] = table[original] + noise * bit
    return Weights(changed)


LARGE = LayerShape(0, 6, 2, 32, 48)


@pytest.mark.parametrize(
    ("preset", "roles", "expected"),
    [
        ("equal", ("gate", "up", "down"), (1 / 3, 1 / 3, 1 / 3)),
        ("up-down", ("gate", "up", "down"), (0.2, 0.4, 0.4)),
        ("equal", ("up", "down"), (0.5, 0.5)),
        ("up-down", ("up", "down"), (0.5, 0.5)),
    ],
)
def test_matrix_weights(preset: str, roles: tuple[str, ...], expected: tuple[float, ...]) -> None:
    shape = replace(LARGE, roles=roles)
    weights = with_copies(random_weights(shape), {5: 0}, noise=0.5)
    method = MoEITS(matrix_weights=preset)  # type: ignore[arg-type]
    found = method.similarity(view_of(shape, None, weights), Context(Budget(keep=2)))
    total = np.zeros((6, 6))
    for role, share in zip(roles, expected, strict=True):
        total += share * pairwise_nmi(weights.by_role[role].numpy())
    np.testing.assert_allclose(found, total, rtol=1e-12)
    assert total[0, 5] > 1.5 * np.delete(total[0], 5).max()


def test_fixed_bins_reach_the_kernel() -> None:
    weights = random_weights(LARGE)
    method = MoEITS(bins=16)
    found = method.similarity(view_of(LARGE, None, weights), Context(Budget(keep=2)))
    expected = sum(pairwise_nmi(table.numpy(), 16) / 3 for table in weights.by_role.values())
    np.testing.assert_allclose(found, np.asarray(expected), rtol=1e-12)


@pytest.mark.parametrize(("noise", "warned"), [(None, True), (0.0, False), (0.2, False)])
def test_it_says_when_it_has_no_signal(noise: float | None, warned: bool) -> None:
    weights = random_weights(LARGE)
    if noise is not None:
        weights = with_copies(weights, {4: 1}, noise)
    warnings: list[str] = []
    context = Context(Budget(keep=5), warn=warnings.append)
    plan = MoEITS().plan_layer(view_of(LARGE, None, weights), context)
    assert any("MoEITS has no signal here" in text for text in warnings) == warned
    if noise is not None:
        assert plan.dropped in ((1,), (4,))


def test_weights_that_are_not_finite_are_an_error_with_a_place() -> None:
    weights = random_weights(SMALL)
    weights.by_role["up"][2, 0, 0] = torch.nan
    with pytest.raises(MoepruneError, match=r"layer 0, up matrices: cannot bin .* NaN"):
        MoEITS().plan_layer(view_of(SMALL, None, weights), Context(Budget(keep=3)))


def test_progress_reaches_the_end() -> None:
    steps: list[tuple[int, int]] = []
    context = Context(
        Budget(keep=3), progress=lambda done, total, what: steps.append((done, total))
    )
    MoEITS().similarity(view_of(SMALL, None), context)
    assert steps == [(done, 45) for done in range(1, 46)]


# on real models ----------------------------------------------------------------------------------


def plan_of(model: Path, budget: Budget, **options: Any) -> dict[int, LayerPlan]:
    made = stages.plan(model, "moeits", budget, options=options)
    assert made.statistics == {}
    return dict(made.layers)


def test_one_of_each_duplicated_pair_goes_first(tmp_path: Path) -> None:
    pairs = {0: [(0, 5), (2, 3)], 1: [(1, 7), (0, 4)], 2: [(6, 7), (1, 2)], 3: [(3, 4), (0, 7)]}
    model = tiny_model("qwen3_moe")
    for layer, copies in pairs.items():
        experts = experts_of(model, layer)
        for original, copy in copies:
            experts.gate_up_proj.data[copy] = experts.gate_up_proj.data[original]
            experts.down_proj.data[copy] = experts.down_proj.data[original]
    model.save_pretrained(tmp_path / "model")
    for budget in (Budget(keep=6), Budget(ratio=0.25), Budget(tau=100.0)):
        for layer, plan in plan_of(tmp_path / "model", budget).items():
            assert len(plan.dropped) == 2  # by tau as well: nothing else is near the bar
            for pair in pairs[layer]:
                assert len({*pair} & {*plan.dropped}) == 1
    stock = stages.plan(tmp_path / "model", "moeits", Budget(keep=6))
    assert stock.warnings == ()


def test_it_needs_no_data_and_taus_are_nested(tiny: Callable[[str], Path]) -> None:
    model = tiny("olmoe")
    kept = [plan_of(model, Budget(tau=tau)) for tau in (-2.0, 0.0, 0.5, 1.0, 2.0, 50.0)]
    sizes = []
    for layer in kept[0]:
        ids = [set(plans[layer].keep) for plans in kept]
        assert all(strict <= lax for strict, lax in pairwise(ids))
        assert len(ids[0]) == 2 and len(ids[-1]) == 8
        sizes.append([len(x) for x in ids])
    assert len({n for row in sizes for n in row}) > 3
    assert MoEITS.needs == ()


def test_random_weights_are_reported_as_noise(tiny: Callable[[str], Path]) -> None:
    made = stages.plan(tiny("olmoe"), "moeits", Budget(keep=4))
    assert len([text for text in made.warnings if "no signal" in text]) >= 3


@pytest.mark.parametrize("budget", [Budget(keep=6), Budget(ratio=0.4), Budget(tau=0.5)])
def test_a_group_limited_model_keeps_the_same_number_per_group(
    budget: Budget, tiny: Callable[[str], Path]
) -> None:
    for plan in plan_of(tiny("deepseek_v3"), budget).values():
        first = sum(e < 4 for e in plan.keep)
        assert first == len(plan.keep) - first >= 2
        if budget.tau is None:
            assert len(plan.keep) == 6


def test_a_model_without_gate_matrices(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    equal = plan_of(tiny("nemotron_h"), Budget(keep=5))
    weighted = plan_of(tiny("nemotron_h"), Budget(keep=5), matrix_weights="up-down")
    for layer, plan in equal.items():
        assert plan.scores == weighted[layer].scores  # without a gate both are half and half
        assert len(plan.keep) == 5
    sizes = stages.apply(
        tiny("nemotron_h"),
        stages.plan(tiny("nemotron_h"), "moeits", Budget(keep=5)),
        tmp_path / "out",
    )
    # two matrices, a router row and its correction bias for each of three experts in three layers
    assert sizes.parameters[0] - sizes.parameters[1] == 9 * (2 * 32 * 24 + 32 + 1)


def test_permuted_experts_on_disk_permute_the_plan(tmp_path: Path) -> None:
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "one")
    for layer in range(4):
        experts = experts_of(model, layer)
        for name in ("gate_up_proj", "down_proj"):
            parameter = getattr(experts, name)
            parameter.data = parameter.data[order].clone()
    model.save_pretrained(tmp_path / "two")
    one, two = (plan_of(tmp_path / name, Budget(keep=4)) for name in ("one", "two"))
    for layer, plan in one.items():
        assert {order[e] for e in two[layer].keep} == set(plan.keep)
        assert set(plan.keep) != {0, 1, 2, 3}


def test_f2_parameters_of_deepseek_moe_16b() -> None:
    """METHODS 3.10: one expert and its router row, and the authors' totals after removal."""
    shape = LayerShape(1, 64, 6, 2048, 1408)
    per_expert = shape.expert_parameters + shape.hidden
    assert per_expert == 8_652_800
    for removed, parameters in (
        (54, 15_908_476_928),
        (329, 13_528_956_928),
        (533, 11_763_785_728),
        (678, 10_509_129_728),
        (837, 9_133_334_528),
        (1005, 7_679_664_128),
        (1075, 7_073_968_128),
        (1148, 6_442_313_728),
    ):
        assert 16_375_728_128 - removed * per_expert == parameters


def test_the_similarity_is_not_computed_for_an_impossible_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moeits, "pairwise_nmi", lambda *args, **kwargs: pytest.fail("computed"))
    with pytest.raises(BudgetError, match="top-k is 2"):
        MoEITS().plan_layer(view_of(SMALL, None), Context(Budget(keep=1)))
