"""MoNE's ablations and the least-squares novice, against loops over tokens and a fitted model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.rows import SMALL, Rows, collected, random_rows, view_of
from methods.conftest import calibration_ids, experts_of, hidden_and_output, watch
from moeprune.core.budget import Budget
from moeprune.core.method import Context, make_method
from moeprune.core.plan import LayerPlan
from moeprune.methods.mone import MoNE
from moeprune.methods.mone_ls import MoNELS
from moeprune.models.runtime import load
from moeprune.pipeline import stages
from support import aligned, open_stock

ROWS = random_rows(SMALL, 300, seed=5, never=[4])
ROWS.index_TK[:60, 0] = 1  # experts are used unevenly, as in the wild
ROWS.index_TK[:60, 1] = 2


def planned(name: str, keep: int, rows: Rows = ROWS, **options: Any) -> LayerPlan:
    view = view_of(SMALL, collected(SMALL, rows, [50, 51, 200], MoNE.needs))
    plan = make_method(name, options).plan_layer(view, Context(Budget(keep=keep)))
    plan.check(SMALL)
    return plan


def routed(expert: int, rows: Rows = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Gates [n, 1] and outputs [n, H] of the tokens routed to an expert, float64."""
    gates, outputs = [], []
    for t, ids in enumerate(rows.index_TK.tolist()):
        for k, chosen in enumerate(ids):
            if chosen == expert:
                gates.append([float(rows.gate_TK[t, k])])
                outputs.append(rows.f_TEH[t, expert].double().numpy())
    return np.array(gates).reshape(-1, 1), np.array(outputs).reshape(-1, SMALL.hidden)


def test_the_factors_of_phi_alone() -> None:
    frequency, variance = [], []
    for e in range(6):
        g_n1, f_nH = routed(e)
        frequency.append(float(g_n1.sum()) / 300)
        spread = f_nH.var(axis=0, ddof=1).sum() if len(f_nH) > 1 else 0.0
        variance.append(math.sqrt(spread))
    for score, expected in (("frequency", frequency), ("variance", variance)):
        plan = planned("mone", 3, score=score)
        assert plan.scores == {score: pytest.approx(expected, rel=1e-5)}
        order = sorted(range(6), key=expected.__getitem__)
        assert list(plan.replaced) == sorted(order[:3])
    fusion = planned("mone", 3).scores["fusion"]
    assert fusion == pytest.approx([a * b for a, b in zip(frequency, variance, strict=True)], 1e-5)


def test_novices_by_their_formulas() -> None:
    plans = {
        kind: planned("mone", 0, novice=kind) for kind in ("zero", "gate-mean", "least-squares")
    }
    assert len({plan.replaced for plan in plans.values()}) == 1
    for e in range(6):
        g_n1, f_nH = routed(e)
        expected = {"zero": np.zeros(SMALL.hidden)}
        for kind, power in (("gate-mean", 1), ("least-squares", 2)):
            total = float((g_n1**power).sum())
            expected[kind] = (g_n1**power * f_nH).sum(axis=0) / total if total else expected["zero"]
        for kind, plan in plans.items():
            assert plan.novices_NH is not None
            np.testing.assert_allclose(plan.novices_NH[e], expected[kind], rtol=1e-4, atol=1e-4)


def test_the_least_squares_novice_against_a_fitted_one() -> None:
    """numpy's own least squares: rows g against rows g f, one unknown per dimension."""
    plan = planned("mone-ls", 2)
    errors = []
    for e in range(6):
        g_n1, f_nH = routed(e)
        if not len(g_n1):
            errors.append(0.0)
            continue
        v_1H, _, _, _ = np.linalg.lstsq(g_n1, g_n1 * f_nH, rcond=None)
        errors.append(float(((g_n1 * (f_nH - v_1H)) ** 2).sum()))
        if e in plan.replaced:
            assert plan.novices_NH is not None
            row = plan.novices_NH[plan.replaced.index(e)]
            np.testing.assert_allclose(row, v_1H[0], rtol=1e-4, atol=1e-4)
    assert plan.scores == {"error": pytest.approx(errors, rel=1e-4, abs=1e-6)}
    order = sorted(range(6), key=errors.__getitem__)
    assert list(plan.replaced) == sorted(order[:4]) and order[0] == 4
    assert plan.notes == ("experts [4] saw no token: their novices are zero vectors",)


def test_no_constant_errs_less() -> None:
    least = planned("mone-ls", 0)
    for novice in ("mean", "zero", "gate-mean"):
        other = planned("mone", 0, novice=novice)
        assert least.novices_NH is not None and other.novices_NH is not None
        for e in range(6):
            g_n1, f_nH = routed(e)
            one, two = (
                float((g_n1**2 * (f_nH - v.double().numpy()) ** 2).sum())
                for v in (least.novices_NH[e], other.novices_NH[e])
            )
            assert one <= two * (1 + 1e-6)


def test_a_constant_expert_has_no_error_and_goes_first() -> None:
    rows = random_rows(SMALL, 300, seed=5)
    rows.f_TEH[:, 3] = 1.5
    plan = planned("mone-ls", 5, rows)
    assert plan.replaced == (3,)
    assert plan.novices_NH is not None
    torch.testing.assert_close(plan.novices_NH, torch.full((1, 8), 1.5), rtol=1e-5, atol=0)


def test_novices_of_outputs_that_are_not_finite_are_zero() -> None:
    rows = replace(ROWS, f_TEH=ROWS.f_TEH.clone())
    rows.f_TEH[:, 1] = math.inf
    for name in ("mone", "mone-ls"):
        plan = planned(name, 4, rows)
        assert plan.replaced[0] == 1 and plan.novices_NH is not None
        assert not plan.novices_NH[0].any()
        assert (
            "experts [1] gave outputs that are not finite: their novices are zero" in plan.notes[1]
        )


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_the_score_is_the_error_that_is_made(
    model_type: str, tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    """Replace the expert of the first layer that is used most, and measure the block's output."""
    model = tiny(model_type)
    compute = stages.Compute(dtype="float32", workers=2)
    stages.calibrate(model, tmp_path / "statistics", text, MoNELS.needs, compute)
    plan = stages.plan(model, "mone-ls", Budget(keep=0), tmp_path / "statistics")
    scores = [score or 0.0 for score in plan.layers[0].scores["error"]]
    most = max(range(8), key=scores.__getitem__)
    novices_NH = plan.layers[0].novices_NH
    assert novices_NH is not None
    keep = tuple(e for e in range(8) if e != most)
    layer = LayerPlan(0, 8, keep, (most,), novices_NH=novices_NH[most][None])
    stages.apply(model, replace(plan, layers={0: layer}), tmp_path / "out")
    ids_NL = calibration_ids(model, text)
    before = watch(open_stock(model), ids_NL)[0]
    after = watch(aligned(load(tmp_path / "out", dtype=torch.float32)), ids_NL)[0]
    measured = float((before.y_TH.double() - after.y_TH.double()).square().sum())
    assert measured == pytest.approx(scores[most], rel=1e-3)
    if model_type == "olmoe":
        tokens, slots = torch.nonzero(before.index_TK == most, as_tuple=True)
        with torch.no_grad():
            _, f_nH = hidden_and_output(experts_of(open_stock(model), 0), most, before.x_TH[tokens])
        g_n1 = before.gate_TK[tokens, slots].double()[:, None]
        direct = float((g_n1 * (f_nH.double() - novices_NH[most].double())).square().sum())
        assert direct == pytest.approx(scores[most], rel=1e-4)
