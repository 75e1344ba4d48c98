"""MoNE: scores against loops, exact counts, and the error that one novice really makes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from core.rows import SMALL, Rows, collected, random_rows, view_of
from families import tiny_model
from methods.conftest import (
    batch_of,
    calibration_ids,
    experts_of,
    hidden_and_output,
    readable,
    watch,
)
from moeprune.core.accumulators import Outputs, Routing
from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import PlanError
from moeprune.methods.mone import MoNE
from moeprune.models.runtime import load
from moeprune.models.store import StatisticsStore
from moeprune.pipeline import stages
from support import aligned, logits, open_stock, outputs_replaced, tensor_digests

RoutingTerm = Literal["gate-mass", "conditional", "count"]
ROWS = random_rows(SMALL, 300, seed=2)
COMPUTE = stages.Compute(dtype="float32", workers=2)


def planned(rows: Rows, keep: int, shape: LayerShape = SMALL, **options: str) -> LayerPlan:
    view = view_of(shape, collected(shape, rows, [50, 51, 200], MoNE.needs))
    plan = MoNE(**options).plan_layer(view, Context(Budget(keep=keep)))  # type: ignore[arg-type]
    plan.check(shape)
    return plan


def naive_phi(rows: Rows, routing: RoutingTerm) -> list[float]:
    phi = []
    for e in range(SMALL.experts):
        outputs, gates = [], []
        for t, (ids, weights) in enumerate(zip(rows.index_TK, rows.gate_TK, strict=True)):
            for k, chosen in enumerate(ids.tolist()):
                if chosen == e:
                    outputs.append(rows.f_TEH[t, e].double().numpy())
                    gates.append(float(weights[k]))
        spread = 0.0
        if len(outputs) > 1:
            spread = float(np.sqrt(np.var(outputs, axis=0, ddof=1).sum()))
        use = {
            "gate-mass": sum(gates) / len(rows.x_TH),
            "conditional": sum(gates) / max(1, len(gates)),
            "count": len(gates) / len(rows.x_TH),
        }[routing]
        phi.append(spread * use)
    return phi


@pytest.mark.parametrize("routing", ["gate-mass", "conditional", "count"])
def test_scores_and_choice_against_loops(routing: RoutingTerm) -> None:
    rows = random_rows(SMALL, 300, seed=2, never=[4])
    rows.index_TK[:40, 0] = 1  # experts are used unevenly, as in the wild
    rows.index_TK[:40, 1] = 2
    phi = naive_phi(rows, routing)
    order = sorted(range(6), key=phi.__getitem__)
    for keep in range(7):
        plan = planned(rows, keep, routing=routing)
        assert plan.scores["fusion"] == pytest.approx(phi, rel=1e-5)
        assert list(plan.replaced) == sorted(order[: 6 - keep])
        assert sorted([*plan.keep, *plan.replaced]) == list(range(6))
    assert order[0] == 4


def test_the_three_routing_terms_are_three() -> None:
    found = {r: naive_phi(ROWS, r) for r in ("gate-mass", "conditional", "count")}
    assert len({tuple(round(x, 6) for x in phi) for phi in found.values()}) == 3


def test_novices_are_the_mean_outputs() -> None:
    plan = planned(ROWS, 2)
    assert plan.novices_NH is not None and plan.novices_NH.dtype == torch.float32
    for row, e in enumerate(plan.replaced):
        tokens = (e == ROWS.index_TK).any(dim=1)
        mean_H = ROWS.f_TEH[tokens, e].double().mean(dim=0).float()
        torch.testing.assert_close(plan.novices_NH[row], mean_H, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, -2.5])
def test_a_constant_expert_goes_first(constant: float) -> None:
    rows = random_rows(SMALL, 300, seed=2)
    rows.f_TEH[:, 3] = constant
    plan = planned(rows, 5)
    assert plan.replaced == (3,)
    assert plan.novices_NH is not None
    torch.testing.assert_close(plan.novices_NH, torch.full((1, 8), constant), rtol=1e-6, atol=0)
    assert plan.scores["fusion"][3] < 1e-5 * min(
        phi for e, phi in enumerate(plan.scores["fusion"]) if e != 3 and phi is not None
    )


def test_an_unseen_expert_goes_first_and_becomes_zero() -> None:
    plan = planned(random_rows(SMALL, 300, never=[1, 5]), 3)
    assert {1, 5} < set(plan.replaced) and len(plan.replaced) == 3
    assert plan.notes == ("experts [1, 5] saw no token: their novices are zero vectors",)
    assert plan.novices_NH is not None
    zero = [not bool(row.any()) for row in plan.novices_NH]
    assert zero == [e in (1, 5) for e in plan.replaced]
    assert [plan.scores["fusion"][e] for e in (1, 5)] == [0.0, 0.0]
    assert planned(random_rows(SMALL, 300, never=[1, 5]), 6).notes == ()


def test_ties_break_by_tokens_and_then_by_id() -> None:
    """Every output is zero, so every phi is 0; the counts are 2, 1, 2, 1, 2, 0."""
    rows = random_rows(SMALL, 4)
    rows.f_TEH.zero_()
    rows.index_TK.copy_(torch.tensor([[0, 2], [0, 4], [2, 1], [4, 3]]))
    order = [5, 1, 3, 0, 2, 4]
    for keep in range(7):
        assert list(planned(rows, keep).replaced) == sorted(order[: 6 - keep])


def test_routing_groups_set_no_bounds() -> None:
    grouped = replace(SMALL, groups=2)
    rows = random_rows(SMALL, 300, never=[0, 1, 2])
    assert planned(rows, 3, grouped).replaced == (0, 1, 2)


def test_outputs_that_are_not_finite_are_replaced_first_with_a_warning() -> None:
    rows = random_rows(SMALL, 300, seed=2)
    used = int(ROWS.index_TK[0, 0])
    rows.f_TEH[0, used] = math.nan
    for scope in ("layer", "global"):
        warnings: list[str] = []
        view = view_of(SMALL, collected(SMALL, rows, needs=MoNE.needs))
        method = MoNE(scope=scope)  # type: ignore[arg-type]
        plan = method.plan_model([view], Context(Budget(keep=5), warn=warnings.append))[0]
        assert plan.replaced == (used,)
        [warning] = warnings
        assert f"experts [{used}] gave outputs that are not finite" in warning


# all layers together ------------------------------------------------------------------------------


def layered_views() -> list[LayerView]:
    """Three layers whose outputs grow by a factor of ten; not all of their experts are used."""
    views = []
    for layer, never in enumerate(([1, 2, 3, 4], [], [5])):
        shape = replace(SMALL, layer=layer)
        rows = random_rows(shape, 200, seed=layer, never=never)
        views.append(view_of(shape, collected(shape, replace(rows, f_TEH=rows.f_TEH * 10**layer))))
    return views


@pytest.mark.parametrize("budget", [Budget(ratio=0.5), Budget(keep=2), Budget(ratio=0.3)])
def test_global_scope_ranks_scores_divided_by_their_layers_mean(budget: Budget) -> None:
    views = layered_views()
    plans = MoNE(scope="global").plan_model(views, Context(budget))
    each = {"0.5": 3, "2": 4, "0.3": 1}[str(budget.ratio or budget.keep)]
    ranked = []
    for view in views:
        phi = MoNE().plan_layer(view, Context(budget)).scores["fusion"]
        mean = sum(x for x in phi if x is not None) / 6
        ranked += [(x / mean, view.shape.layer, e) for e, x in enumerate(phi) if x is not None]
    expected = sorted(ranked)[: 3 * each]
    assert len(ranked) == 18
    for layer, plan in plans.items():
        plan.check(views[layer].shape)
        assert list(plan.replaced) == sorted(e for _, at, e in expected if at == layer)
    assert sum(len(plan.replaced) for plan in plans.values()) == 3 * each


def test_global_scope_is_not_layer_scope() -> None:
    views = layered_views()
    budget = Context(Budget(ratio=0.5))
    plans = MoNE(scope="global").plan_model(views, budget)
    assert len(plans[0].replaced) == 4  # all that nobody used
    assert {len(p.replaced) for p in MoNE().plan_model(views, budget).values()} == {3}
    for plan in plans.values():
        assert plan.novices_NH is not None and len(plan.novices_NH) == len(plan.replaced)


def test_global_scope_leaves_every_layer_an_expert_unless_none_is_kept() -> None:
    silent = random_rows(SMALL, 200)
    silent.f_TEH.zero_()
    views = [view_of(SMALL, collected(SMALL, silent, needs=MoNE.needs)), *layered_views()[1:]]
    plans = MoNE(scope="global").plan_model(views, Context(Budget(ratio=0.5)))
    assert len(plans[0].replaced) == 5
    assert sum(len(plan.replaced) for plan in plans.values()) == 9
    plans = MoNE(scope="global").plan_model(views, Context(Budget(keep=0)))
    assert [len(plan.replaced) for plan in plans.values()] == [6, 6, 6]


# on real models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Statistics of a family's tiny checkpoint."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("statistics") / model_type
            stages.calibrate(tiny(model_type), made[model_type], text, MoNE.needs, COMPUTE)
        return made[model_type]

    return get


def test_a_model_with_a_zero_expert_in_every_layer_computes_as_before(
    text: stages.Text, tmp_path: Path
) -> None:
    original = tiny_model("olmoe")
    for layer in range(4):
        experts_of(original, layer).down_proj.data[layer + 2] = 0.0
    original.save_pretrained(tmp_path / "model")
    model = readable(tmp_path / "model")
    stages.calibrate(model, tmp_path / "statistics", text, MoNE.needs, COMPUTE)
    plan = stages.plan(model, "mone", Budget(keep=7), tmp_path / "statistics")
    counts = [
        StatisticsStore.open(tmp_path / "statistics").layer(i).part(Routing).count_E[i + 2]
        for i in range(4)
    ]
    assert min(counts) > 0  # they are used, and yet go first
    assert {i: layer.replaced for i, layer in plan.layers.items()} == {
        i: (i + 2,) for i in range(4)
    }
    stages.apply(model, plan, tmp_path / "out")
    after = aligned(load(tmp_path / "out", dtype=torch.float32))
    before = open_stock(model)
    ids_NL = calibration_ids(model, text)
    seen, novice = watch(before, ids_NL), watch(after, ids_NL)
    for layer in seen:
        torch.testing.assert_close(novice[layer].y_TH, seen[layer].y_TH, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", ["olmoe", "qwen3_moe"])
def test_the_error_of_one_novice_is_what_the_sums_say(
    model_type: str,
    tiny: Callable[[str], Path],
    statistics: Callable[[str], Path],
    text: stages.Text,
    tmp_path: Path,
) -> None:
    """F9: sum |y - y'|^2 = sum g^2 |f - v|^2, measured three ways in every layer."""
    model, store = tiny(model_type), StatisticsStore.open(statistics(model_type))
    ids_NL = calibration_ids(model, text)
    before = open_stock(model)
    seen = watch(before, ids_NL)
    errors = []
    for layer in store.layers:
        most_used = int(store.layer(layer).part(Routing).count_E.argmax())
        plan = stages.plan(model, "mone", Budget(keep=0), statistics(model_type))
        everything = plan.layers[layer]
        assert everything.novices_NH is not None
        v_H = everything.novices_NH[most_used]
        replaced = LayerPlan(
            layer,
            8,
            tuple(e for e in range(8) if e != most_used),
            (most_used,),
            novices_NH=v_H[None],
        )
        stages.apply(model, replace(plan, layers={layer: replaced}), tmp_path / str(layer))
        novice = aligned(load(tmp_path / str(layer), dtype=torch.float32))
        one, two = seen[layer], watch(novice, ids_NL)[layer]
        assert torch.equal(one.index_TK, two.index_TK)  # its router is untouched
        assert torch.equal(one.gate_TK, two.gate_TK) and torch.equal(one.x_TH, two.x_TH)
        measured = float((one.y_TH.double() - two.y_TH.double()).square().sum())

        tokens, slots = torch.nonzero(one.index_TK == most_used, as_tuple=True)
        with torch.no_grad():
            _, f_nH = hidden_and_output(experts_of(before, layer), most_used, one.x_TH[tokens])
        distance_n = (f_nH.double() - v_H.double()).square().sum(dim=1)
        direct = float((one.gate_TK[tokens, slots].double().square() * distance_n).sum())

        outputs, routing = (store.layer(layer).part(kind) for kind in (Outputs, Routing))
        v = v_H.double()
        from_sums = float(
            outputs.gate_sq_norm_sq_E[most_used]
            - 2 * v @ outputs.gated_EH[most_used]
            + v.square().sum() * routing.gate_sq_E[most_used]
        )
        assert len(tokens) > 100 and direct > 0
        assert measured == pytest.approx(direct, rel=1e-4)
        assert from_sums == pytest.approx(direct, rel=1e-4)
        errors.append(measured)
    assert len(errors) == len(seen) == 4


def test_keeping_all_is_no_change(
    tiny: Callable[[str], Path], statistics: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny("olmoe")
    plan = stages.plan(model, "mone", Budget(keep=8), statistics("olmoe"))
    assert all(layer.replaced == () and layer.novices_NH is None for layer in plan.layers.values())
    assert plan.vectors() == {}
    stages.apply(model, plan, tmp_path / "out")
    assert tensor_digests(tmp_path / "out") == tensor_digests(model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((model / "config.json").read_text())


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("keep", [1, 5])
def test_an_applied_plan_computes_what_it_says(
    model_type: str,
    keep: int,
    tiny: Callable[[str], Path],
    statistics: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """Per-expert and fused checkpoints; fewer experts than top-k may keep their weights."""
    model = tiny(model_type)
    plan = stages.plan(model, "mone", Budget(keep=keep), statistics(model_type))
    assert stages.apply(model, plan, tmp_path / "out").experts == (32, 4 * keep)
    after = aligned(load(tmp_path / "out", dtype=torch.float32))
    before = open_stock(model)
    vectors = {}
    for index, layer in plan.layers.items():
        assert layer.novices_NH is not None
        vectors[index] = dict(zip(layer.replaced, layer.novices_NH, strict=True))
    with outputs_replaced(before, vectors):
        expected = logits(before)
    torch.testing.assert_close(logits(after), expected, rtol=1e-4, atol=1e-4)


def test_keeping_none_can_be_planned_but_is_no_checkpoint(
    tiny: Callable[[str], Path], statistics: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = stages.plan(tiny("olmoe"), "mone", Budget(keep=0), statistics("olmoe"))
    for layer in plan.layers.values():
        assert layer.keep == () and layer.replaced == tuple(range(8))
        assert layer.novices_NH is not None and layer.novices_NH.shape == (8, 32)
    with pytest.raises(PlanError, match="layer 0: all experts are replaced"):
        stages.apply(tiny("olmoe"), plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_batches_make_no_difference(
    tiny: Callable[[str], Path],
    text: stages.Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("qwen3_moe")
    plans, stores = [], []
    for tokens in (32, 160, 4096):
        with batch_of(monkeypatch, tokens):
            path = tmp_path / str(tokens)
            stores.append(stages.calibrate(model, path, text, MoNE.needs, COMPUTE))
            plans.append(stages.plan(model, "mone", Budget(ratio=0.5), path))
    for store, plan in zip(stores[1:], plans[1:], strict=True):
        for layer in stores[0].layers:
            one, two = stores[0].layer(layer), store.layer(layer)
            assert one.tokens == two.tokens == text.sequences * text.length
            for name, tensor in one.to_tensors().items():
                other = two.to_tensors()[name]
                if tensor.is_floating_point():
                    torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-4, msg=name)
                else:
                    assert torch.equal(tensor, other), name
            mine, theirs = plans[0].layers[layer], plan.layers[layer]
            assert (mine.keep, mine.replaced) == (theirs.keep, theirs.replaced)
            assert len(mine.replaced) == 4


def test_global_scope_with_multiples_keeps_a_multiple_in_every_layer() -> None:
    views = layered_views()
    free = MoNE(scope="global").plan_model(views, Context(Budget(ratio=0.5)))
    plans = MoNE(scope="global").plan_model(views, Context(Budget(ratio=0.5, multiple_of=2)))
    for layer, plan in plans.items():
        asked = len(free[layer].keep)
        assert len(plan.keep) == asked + asked % 2
        assert set(plan.replaced) <= set(free[layer].replaced)


def test_made_uniform_the_layers_no_longer_compete() -> None:
    assert MoNE(routing="count", scope="global").per_layer() == MoNE(routing="count")
