"""Methods that delete experts by one score: scores against loops, and what all of them share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.rows import SMALL, Rows, collected, random_rows, view_of
from moeprune.core.accumulators import LIGHT
from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView, make_method
from moeprune.core.ranking import Ranking
from moeprune.core.shapes import LayerShape
from moeprune.errors import BudgetError
from moeprune.pipeline import stages
from support import experts_masked, logits, open_stock, tensor_digests

ROWS = random_rows(SMALL, 200, seed=3, never=[4])
ROWS.index_TK[:60, 0] = 1  # experts are used unevenly, as in the wild
ROWS.index_TK[:60, 1] = 2
COMPUTE = stages.Compute(dtype="float32", workers=2)

CASES: list[tuple[str, dict[str, Any]]] = [
    ("frequency", {}),
    ("frequency", {"statistic": "top1"}),
    ("routing-score", {}),
    ("routing-score", {"statistic": "sum-prob"}),
    ("ean", {}),
    ("weighted-frequency", {}),
    ("reap", {}),
    ("man", {}),
    ("msan", {}),
    *(
        ("saliency", {"b": b, "alpha": alpha, "beta": beta})
        for b in (0, 1)
        for alpha in (0, 1)
        for beta in (0, 1, 2)
    ),
]
PRESETS = {
    "frequency": (0, 0, 0),
    "ean": (0, 0, 1),
    "weighted-frequency": (0, 1, 0),
    "reap": (1, 1, 1),
    "man": (1, 0, 1),
    "msan": (1, 0, 2),
}
NAMES = sorted({name for name, _ in CASES} | {"random"})
cases = pytest.mark.parametrize(("name", "options"), CASES)


def method(name: str, **options: Any) -> Ranking:
    made = make_method(name, options)
    assert isinstance(made, Ranking)
    return made


def view(rows: Rows = ROWS, shape: LayerShape = SMALL) -> LayerView:
    return view_of(shape, collected(shape, rows, [20, 21, 150], LIGHT))


def routed(rows: Rows, expert: int) -> list[tuple[float, float]]:
    """(gate, output norm) of every token that was routed to an expert, in float64."""
    found = []
    for t, ids in enumerate(rows.index_TK.tolist()):
        for k, chosen in enumerate(ids):
            if chosen == expert:
                norm = math.sqrt(sum(x * x for x in rows.f_TEH[t, expert].double().tolist()))
                found.append((float(rows.gate_TK[t, k]), norm))
    return found


def slow(name: str, options: dict[str, Any], rows: Rows) -> list[float]:
    """The scores by loops over tokens."""
    experts = range(rows.f_TEH.shape[1])
    if options.get("statistic") == "top1":
        best = [
            ids[max(range(len(ids)), key=gates.__getitem__)]
            for ids, gates in zip(rows.index_TK.tolist(), rows.gate_TK.tolist(), strict=True)
        ]
        return [float(best.count(e)) for e in experts]
    if options.get("statistic") == "sum-prob":
        sums = [0.0 for _ in experts]
        for z in rows.logits_TR.double().tolist():
            total = sum(math.exp(value) for value in z)
            sums = [old + math.exp(value) / total for old, value in zip(sums, z, strict=True)]
        return sums
    if name == "routing-score":
        b, alpha, beta = 0, 1, 0
    elif name == "saliency":
        b, alpha, beta = options["b"], options["alpha"], options["beta"]
    else:
        b, alpha, beta = PRESETS[name]
    found = []
    for e in experts:
        tokens = routed(rows, e)
        total = sum(gate**alpha * norm**beta for gate, norm in tokens)
        found.append(total / max(1, len(tokens)) ** b)
    return found


@cases
def test_scores_and_choice_against_loops(name: str, options: dict[str, Any]) -> None:
    expected = slow(name, options, ROWS)
    counts = [len(routed(ROWS, e)) for e in range(6)]
    order = sorted(range(6), key=lambda e: (round(expected[e], 9), counts[e], e))
    for keep in range(2, 7):
        plan = method(name, **options).plan_layer(view(), Context(Budget(keep=keep)))
        plan.check(SMALL)
        [scores] = plan.scores.values()
        assert scores == pytest.approx(expected, rel=1e-5)
        assert list(plan.dropped) == sorted(order[: 6 - keep])
        assert not plan.replaced and plan.novices_NH is None
    if options.get("statistic") != "sum-prob":
        assert order[0] == 4 and scores[4] == 0.0  # nobody was routed to it


def test_the_named_members_are_members() -> None:
    for name, (b, alpha, beta) in PRESETS.items():
        one = method(name).plan_layer(view(), Context(Budget(keep=3)))
        two = method("saliency", b=b, alpha=alpha, beta=beta)
        other = two.plan_layer(view(), Context(Budget(keep=3)))
        assert one.keep == other.keep
        assert [*one.scores.values()] == [*other.scores.values()]


def test_random_depends_on_seed_layer_and_nothing_else() -> None:
    def kept(seed: int, layer: int = 0) -> tuple[int, ...]:
        shape = replace(SMALL, layer=layer, experts=64)
        bare = LayerView(shape, None, None)  # type: ignore[arg-type]
        return method("random").plan_layer(bare, Context(Budget(keep=16), seed)).keep

    assert kept(0) == kept(0)
    assert len({kept(0), kept(1), kept(0, layer=1)}) == 3
    assert kept(0)[:6] == (0, 3, 5, 6, 13, 15)  # on every machine, for ever


def test_random_is_uniform() -> None:
    shape = replace(SMALL, experts=16)
    times = [0] * 16
    for seed in range(400):
        bare = LayerView(shape, None, None)  # type: ignore[arg-type]
        for e in method("random").plan_layer(bare, Context(Budget(keep=4), seed)).keep:
            times[e] += 1
    assert sum(times) == 1600
    assert max(abs(n - 100) for n in times) < 5 * math.sqrt(100 * 0.75)


# what all of them share ---------------------------------------------------------------------------


def model_views(layers: int = 3, shape: LayerShape = SMALL, tokens: int = 120) -> list[LayerView]:
    """Layers whose outputs grow by a factor of three."""
    views = []
    for layer in range(layers):
        here = replace(shape, layer=layer)
        rows = random_rows(here, tokens, seed=layer, never=[layer] if layer < 2 else [])
        louder = replace(rows, f_TEH=rows.f_TEH * 3.0**layer)
        views.append(view_of(here, collected(here, louder, needs=LIGHT)))
    return views


@pytest.mark.parametrize("name", [*NAMES, "mone", "mone-ls"])
@pytest.mark.parametrize("scope", ["layer", "global", "importance"])
def test_larger_ratios_keep_subsets_and_nothing_to_remove_is_the_identity(
    name: str, scope: str
) -> None:
    views, before = model_views(), None
    chosen = method(name, scope=scope)
    for ratio in (0.0, 0.17, 0.34, 0.5, 0.6):
        plans = chosen.plan_model(views, Context(Budget(ratio=ratio)))
        kept = {i: set(plan.keep) for i, plan in plans.items()}
        if before is None:
            assert all(keep == set(range(6)) for keep in kept.values())
        else:
            assert all(kept[i] <= before[i] for i in kept)
        assert sum(map(len, kept.values())) == 3 * (6 - int(6 * ratio + 1e-9))
        before = kept


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.sampled_from([name for name in NAMES if name != "random"]))
def test_permuting_experts_permutes_the_choice(order: list[int], name: str) -> None:
    """New expert i is old expert order[i]; scores differ, so that no tie decides."""
    place = torch.empty(6, dtype=torch.long)
    place[list(order)] = torch.arange(6)
    rows = random_rows(SMALL, 60, seed=8)
    rows.index_TK[:30, 0] = 0
    rows.index_TK[:30, 1] = 5
    rows.index_TK[30:40, 0] = 3
    moved = replace(
        rows,
        index_TK=place[rows.index_TK],
        logits_TR=rows.logits_TR[:, order],
        h_TEI=rows.h_TEI[:, order],
        f_TEH=rows.f_TEH[:, order],
    )
    chosen = method(name)
    one = chosen.plan_layer(view(rows), Context(Budget(keep=3)))
    two = chosen.plan_layer(view(moved), Context(Budget(keep=3)))
    [scores] = one.scores.values()
    if len({round(score or 0.0, 6) for score in scores}) == 6:
        assert {order[e] for e in two.keep} == set(one.keep)


@pytest.mark.parametrize("name", NAMES)
def test_the_router_still_works(name: str) -> None:
    with pytest.raises(BudgetError, match=r"2 must stay .top-k is 2"):
        method(name).plan_layer(view(), Context(Budget(keep=1)))
    with pytest.raises(BudgetError, match=r"4 must stay .the floor is 4"):
        method(name, floor=4).plan_layer(view(), Context(Budget(keep=3)))
    grouped = replace(SMALL, groups=2, experts=8, top_groups=1)
    rows = random_rows(grouped, 80)
    plan = method(name).plan_layer(view(rows, grouped), Context(Budget(keep=4)))
    assert sorted(grouped.group_of(e) for e in plan.keep) == [0, 0, 1, 1]


def test_experts_whose_outputs_are_not_finite_go_first_with_a_warning() -> None:
    rows = random_rows(SMALL, 100, seed=2)
    bad = int(rows.index_TK[0, 0])
    rows.f_TEH[0, bad] = math.nan
    warnings: list[str] = []
    context = Context(Budget(keep=5), warn=warnings.append)
    assert method("reap").plan_layer(view(rows), context).dropped == (bad,)
    assert warnings == [
        f"layer 0: experts [{bad}] gave outputs that are not finite; they are dropped first"
    ]


# on real models -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("droppers") / "statistics"
    stages.calibrate(tiny("olmoe"), out, text, compute=COMPUTE)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_an_applied_plan_computes_what_it_says(
    name: str, tiny: Callable[[str], Path], statistics: Path, tmp_path: Path
) -> None:
    """Kept experts and their router rows, in a checkpoint that stock classes open."""
    model = tiny("olmoe")
    plan = stages.plan(model, name, Budget(ratio=0.5), statistics)
    assert stages.apply(model, plan, tmp_path / "out").experts == (32, 16)
    before, after = open_stock(model), open_stock(tmp_path / "out")
    keeps = {index: layer.keep for index, layer in plan.layers.items()}
    with experts_masked(before, keeps):
        torch.testing.assert_close(logits(after), logits(before), rtol=1e-4, atol=1e-4)
    identity = stages.plan(model, name, Budget(ratio=0.0), statistics)
    stages.apply(model, identity, tmp_path / "same")
    assert tensor_digests(tmp_path / "same") == tensor_digests(model)


def test_a_global_plan_is_recorded_with_its_options(
    tiny: Callable[[str], Path], statistics: Path, tmp_path: Path
) -> None:
    options = {"scope": "global", "statistic": "sum-prob"}
    plan = stages.plan(
        tiny("olmoe"), "routing-score", Budget(ratio=0.5), statistics, options=options
    )
    assert plan.options == {**options, "normalise": False, "floor": 0}
    assert sum(len(layer.keep) for layer in plan.layers.values()) == 16
    stages.save_plan(plan, tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert list(saved["layers"]["0"]["scores"]) == ["sum-prob"]
    assert plan.vectors() == {}
