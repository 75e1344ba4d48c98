"""Equal numbers, multiples and warnings on top of what a method decides."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from families import save_tiny
from moeprune.core.budget import Budget
from moeprune.core.plan import LayerPlan, Plan
from moeprune.methods import moeits
from moeprune.models import counts, quirks
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.pipeline import stages
from support import open_stock


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


def kept(plan: Plan) -> list[int]:
    return [len(layer.keep) for _, layer in sorted(plan.layers.items())]


def test_uniform_keeps_the_mean_and_computes_nothing_twice(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven = stages.plan(mixtral, "moeits", Budget(tau=1.0))
    assert len(set(kept(uneven))) > 1
    calls = []
    kernel = moeits.pairwise_nmi
    monkeypatch.setattr(
        moeits, "pairwise_nmi", lambda *args, **kw: (calls.append(1), kernel(*args, **kw))[1]
    )
    plan = stages.plan(mixtral, "moeits", Budget(tau=1.0), uniform=True)
    number = math.ceil(sum(kept(uneven)) / 4)
    assert kept(plan) == [number] * 4
    assert len(calls) == 3 * 4  # matrices x layers
    assert plan.layers == stages.plan(mixtral, "moeits", Budget(keep=number)).layers
    assert plan.budget == {"tau": 1.0, "uniform": True}
    assert any(f"made uniform: {number} in every layer" in text for text in plan.warnings)
    stages.apply(mixtral, plan, tmp_path / "out")
    open_stock(tmp_path / "out")


def test_uniform_leaves_an_equal_plan_alone(mixtral: Path) -> None:
    plan = stages.plan(mixtral, "moeits", Budget(keep=5), uniform=True)
    assert plan.layers == stages.plan(mixtral, "moeits", Budget(keep=5)).layers
    assert not any("uniform" in text for text in plan.warnings)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_a_threshold_with_multiples_removes_a_prefix_of_what_it_would(
    mixtral: Path, tau: float
) -> None:
    free = stages.plan(mixtral, "moeits", Budget(tau=tau))
    even = stages.plan(mixtral, "moeits", Budget(tau=tau, multiple_of=2))
    for index, layer in even.layers.items():
        asked = len(free.layers[index].keep)
        assert len(layer.keep) == asked + asked % 2
        assert set(layer.keep) >= set(free.layers[index].keep)


def test_uneven_plans_become_checkpoints(mixtral: Path, tmp_path: Path) -> None:
    done = stages.prune(mixtral, "moeits", Budget(tau=1.0), tmp_path / "out")
    model = LayeredModel(Checkpoint.open(tmp_path / "out"))
    assert [site.shape.experts for _, site in sorted(model.sites.items())] == kept(done.plan)
    facts = stages.inspect(tmp_path / "out")
    assert facts["supported"]


def test_numbers_that_a_kernel_does_not_know_are_told(
    mixtral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LayeredModel(Checkpoint.open(mixtral))
    monkeypatch.setitem(quirks.KERNEL_COUNTS, "mixtral", frozenset({4, 8}))
    layer = LayerPlan(0, 8, (0, 1, 2, 3, 4))
    assert counts.kernel_warnings(model, {0: replace(layer, keep=(0, 1, 2, 3))}) == []
    assert counts.kernel_warnings(model, {0: replace(layer, keep=tuple(range(8)))}) == []
    [text] = counts.kernel_warnings(model, {0: layer})
    assert "4, 8 experts, not 5" in text
    plan = stages.plan(mixtral, "moeits", Budget(keep=5))
    assert text in plan.warnings


def test_an_uneven_model_can_be_made_uniform(mixtral: Path, tmp_path: Path) -> None:
    """No layer can keep more than the smallest has."""
    stages.prune(mixtral, "moeits", Budget(tau=1.0), tmp_path / "uneven")
    before = LayeredModel(Checkpoint.open(tmp_path / "uneven")).sites.values()
    smallest = min(site.shape.experts for site in before)
    plan = stages.plan(tmp_path / "uneven", "moeits", Budget(ratio=0.0), uniform=True)
    assert kept(plan) == [smallest] * 4
    stages.apply(tmp_path / "uneven", plan, tmp_path / "out")
    open_stock(tmp_path / "out")
