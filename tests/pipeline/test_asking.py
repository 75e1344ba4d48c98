"""Sizes as budgets and experts that stay or go, on models that are then written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from families import save_tiny
from moeprune.core.accumulators import Outputs
from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.targets import Target
from moeprune.errors import BudgetError, MoepruneError
from moeprune.models.store import StatisticsStore
from moeprune.pipeline import stages
from support import tensor_digests

COMPUTE = stages.Compute(dtype="float32", workers=2)
TEXT = stages.Text(sequences=6, length=64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return get


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("asking") / "statistics"
    stages.calibrate("demo", out, TEXT, compute=COMPUTE)
    return out


def written(model: Any, plan: Any, out: Path, writing: stages.Writing = stages.Writing()) -> Any:
    return stages.apply(model, plan, out, writing=writing)


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("unit", ["bytes", "parameters"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_least_removal_that_fits(
    model_type: str, unit: str, scope: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every number of experts is written, and the target is put between two of them."""
    model = tiny(model_type)
    budgets = [Budget(keep=n) for n in (8, 6, 4)]
    if scope == "global":
        budgets = [Budget(total=n) for n in (32, 25, 17)]
    options = {"scope": scope, "normalise": False}
    sizes = []
    for i, budget in enumerate(budgets):
        plan = stages.plan(model, "random", budget, options=options)
        sizes.append(getattr(written(model, plan, tmp_path / str(i)), unit)[1])
    assert sizes == sorted(set(sizes), reverse=True)
    for budget, size in zip(budgets, sizes, strict=True):
        plan = stages.plan(model, "random", Target(**{unit: size}), options=options)
        name = "target_bytes" if unit == "bytes" else "target_params"
        assert plan.budget == {**budget.to_json(), name: size, unit: size}
        assert plan.layers == stages.plan(model, "random", budget, options=options).layers
        more = stages.plan(model, "random", Target(**{unit: size - 1}), options=options)
        assert more.budget[unit] < size
    again = written(model, more, tmp_path / "again")
    assert getattr(again, unit)[1] == more.budget[unit]


def test_novices_count_their_vectors(statistics: Path, tmp_path: Path) -> None:
    for method in ("mone", "reap"):
        plan = stages.plan("demo", method, Target(bytes=12_000_000), statistics)
        sizes = written("demo", plan, tmp_path / method)
        assert sizes.bytes[1] == plan.budget["bytes"] <= 12_000_000
        one_more = Budget(keep=plan.budget["keep"] + 1)
        larger = stages.plan("demo", method, one_more, statistics)
        assert written("demo", larger, tmp_path / f"{method}+1").bytes[1] > 12_000_000


def test_padding_counts_as_it_is_written(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, writing = tiny("glm4_moe"), stages.Writing(pad=True)
    options = {"scope": "global"}
    size = 200_000
    plan = stages.plan(model, "random", Target(parameters=size), options=options, writing=writing)
    sizes = written(model, plan, tmp_path / "out", writing)
    assert sizes.parameters[1] == plan.budget["parameters"] <= size


def test_a_target_that_is_too_small_names_the_smallest(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny("olmoe")
    with pytest.raises(BudgetError, match="the smallest result of random has") as caught:
        stages.plan(model, "random", Target(bytes=1000))
    smallest = int(caught.value.hint.split()[-1])
    plan = stages.plan(model, "random", Target(bytes=smallest))
    assert written(model, plan, tmp_path / "out").bytes[1] == smallest
    assert "2 must stay (top-k is 2)" in caught.value.problem or "top-k" in caught.value.problem


def test_a_target_above_the_model_removes_nothing(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = stages.plan(tiny("olmoe"), "random", Target(bytes=10**12))
    written(tiny("olmoe"), plan, tmp_path / "out")
    assert tensor_digests(tmp_path / "out") == tensor_digests(tiny("olmoe"))


DROPPERS = ["random", "frequency", "routing-score", "reap", "mone", "mone-ls", "moeits"]


@pytest.mark.parametrize("method", DROPPERS)
@pytest.mark.parametrize("scope", ["layer", "global", "importance"])
def test_pinned_stay_and_forbidden_go(method: str, scope: str, statistics: Path) -> None:
    options = {} if method == "moeits" else {"scope": scope}
    if method == "moeits" and scope != "layer":
        pytest.skip("its layers do not compete")
    free = stages.plan("demo", method, Budget(ratio=0.5), statistics, options=options)
    gone = sorted(set(range(32)) - set(free.layers[2].keep))[:2]
    kept = list(free.layers[4].keep)[:3]
    wishes = Constraints(
        (f"2:{','.join(map(str, gone))}",), (f"4:{','.join(map(str, kept))}", "5:0"), True
    )
    plan = stages.plan(
        "demo", method, Budget(ratio=0.5), statistics, options=options, constraints=wishes
    )
    assert set(gone) <= set(plan.layers[2].keep)
    assert not set(kept) & set(plan.layers[4].keep) and 0 not in plan.layers[5].keep
    assert sum(len(layer.keep) for layer in plan.layers.values()) == 6 * 16
    assert plan.budget["pinned"] == {"2": gone}
    assert plan.budget["forbidden"] == {"4": kept, "5": [0]}
    for layer, experts in plan.budget["protected"].items():
        assert set(experts) <= set(plan.layers[int(layer)].keep)
        assert f"experts {experts} are super experts: they stay" in plan.layers[int(layer)].notes


@pytest.mark.parametrize("method", DROPPERS)
def test_super_experts_are_never_dropped(method: str, tmp_path: Path, statistics: Path) -> None:
    """Statistics in which one expert of the third layer shouts once; also without statistics."""
    store = StatisticsStore.open(statistics)
    loud = stages.plan("demo", method, Budget(keep=8), statistics).layers[2]
    victim = sorted(set(range(32)) - set(loud.keep))[0]
    original = StatisticsStore.layer

    def louder(self: StatisticsStore, index: int) -> Any:
        layer = original(self, index)
        if index == 2:
            layer.part(Outputs).max_E[victim] = 1e6
        return layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StatisticsStore, "layer", louder)
        plan = stages.plan(
            "demo",
            method,
            Budget(keep=8),
            statistics,
            constraints=Constraints(protect_super=True),
        )
    assert plan.budget["protected"] == {"2": [victim]}
    assert victim in plan.layers[2].keep and len(plan.layers[2].keep) == 8
    assert plan.statistics == store.summary


def test_a_data_free_method_calibrates_for_its_protection(tmp_path: Path) -> None:
    wishes = Constraints(protect_super=True)
    done = stages.prune(
        "demo", "random", Budget(keep=16), tmp_path / "out", TEXT, constraints=wishes
    )
    assert "protected" in done.plan.budget and done.plan.statistics["data"]["tokens"] == 6 * 64


@dataclass(frozen=True)
class Deaf(Method):
    """Keeps the first experts, whatever anybody wants."""

    name: ClassVar[str] = "deaf"
    summary: ClassVar[str] = "for tests"
    source: ClassVar[str] = "none"
    budgets: ClassVar[tuple[str, ...]] = ("keep",)

    def plan_layer(self, view: LayerView, context: Context) -> LayerPlan:
        keep = tuple(range(context.budget.keep or 0))
        return LayerPlan(view.shape.layer, view.shape.experts, keep)


def test_a_method_that_does_not_know_constraints_is_refused(tiny: Callable[[str], Path]) -> None:
    fine = stages.plan(tiny("olmoe"), Deaf(), Budget(keep=4), constraints=Constraints(("*:1",)))
    assert fine.layers[0].keep == (0, 1, 2, 3)
    with pytest.raises(MoepruneError, match="deaf does not know --pin"):
        stages.plan(tiny("olmoe"), Deaf(), Budget(keep=4), constraints=Constraints(("1:7",)))
