"""Affine novices on models: planned, written, opened with and without moeprune, verified."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.rows import SMALL, collected, random_rows, view_of
from methods.conftest import calibration_ids, watch
from moeprune.core.budget import Budget
from moeprune.core.method import Context
from moeprune.core.plan import LayerPlan
from moeprune.errors import MoepruneError, PlanError
from moeprune.methods.mone_affine import MoNEAffine
from moeprune.models.runtime import load
from moeprune.models.store import read_plan
from moeprune.pipeline import stages
from moeprune.pipeline.verification import verify
from support import aligned, logits, open_stock

COMPUTE = stages.Compute(dtype="float32", workers=2)
RANK = 3


@pytest.fixture(scope="module")
def statistics(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("statistics") / model_type
            stages.calibrate(tiny(model_type), made[model_type], text, MoNEAffine.needs, COMPUTE)
        return made[model_type]

    return get


def test_the_choice_is_by_the_error_over_the_tokens() -> None:
    rows = random_rows(SMALL, 400, seed=6, never=[4])
    view = view_of(SMALL, collected(SMALL, rows, [100, 101], MoNEAffine.needs))
    plan = MoNEAffine(rank=2, damping=0.0).plan_layer(view, Context(Budget(keep=2)))
    plan.check(SMALL)
    assert plan.novices_NH is not None and plan.novices_NH.shape == (4, 5 * SMALL.hidden)
    errors = [score or 0.0 for score in plan.scores["error"]]
    assert list(plan.replaced) == sorted(sorted(range(6), key=errors.__getitem__)[:4])
    assert 4 in plan.replaced and errors[4] == 0.0
    for row, e in enumerate(plan.replaced):
        v_H, a_rH, bt_rH = plan.novices_NH[row].double().view(5, -1).split([1, 2, 2])
        hit_TK = rows.index_TK == e
        x_nH, g_n = rows.x_TH[hit_TK.any(dim=1)].double(), rows.gate_TK[hit_TK].double()
        f_nH = rows.f_TEH[hit_TK.any(dim=1), e].double()
        off_nH = g_n[:, None] * (f_nH - v_H - x_nH @ a_rH.T @ bt_rH)
        assert float(off_nH.square().sum()) == pytest.approx(errors[e], rel=1e-4, abs=1e-6)


def test_a_rank_that_saves_nothing_is_refused() -> None:
    view = view_of(SMALL, collected(SMALL, random_rows(SMALL, 20), needs=MoNEAffine.needs))
    with pytest.raises(MoepruneError, match="rank 5 saves nothing: an expert is 8 x 12"):
        MoNEAffine(rank=5).plan_layer(view, Context(Budget(keep=2)))


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_written_opened_and_verified(
    model_type: str,
    tiny: Callable[[str], Path],
    statistics: Callable[[str], Path],
    text: stages.Text,
    tmp_path: Path,
) -> None:
    """One by one and fused: what was planned is computed by ours, by stock, and after saving."""
    model, out = tiny(model_type), tmp_path / "out"
    options = {"rank": RANK}
    plan = stages.plan(
        model, "mone-affine", Budget(keep=5), statistics(model_type), options=options
    )
    stages.save_plan(plan, tmp_path / "plan.json")
    again = read_plan(tmp_path / "plan.json")
    for index, layer in again.layers.items():
        assert layer.novices_NH is not None and layer.novices_NH.shape == (3, 7 * 32)
        assert torch.equal(layer.novices_NH, plan.layers[index].novices_NH)  # type: ignore[arg-type]
    stages.apply(model, again, out)
    assert json.loads((out / "config.json").read_text())["approximate_rank"] == RANK

    ids_NL = calibration_ids(model, text)
    before, after = open_stock(model), aligned(load(out, dtype=torch.float32))
    one, two = watch(before, ids_NL)[0], watch(after, ids_NL)[0]
    layer = plan.layers[0]
    assert layer.novices_NH is not None
    expected_TH = one.y_TH.double()
    difference_TH = two.y_TH.double() - expected_TH
    lost = 0.0
    for expert in layer.replaced:
        lost += layer.scores["error"][expert] or 0.0
    # several novices of a token add up: the error lies below the square of the summed roots
    assert 0 < float(difference_TH.square().sum()) <= 3.01 * lost

    stock = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(logits(stock.eval()), logits(after), rtol=1e-4, atol=1e-4)
    stock.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(logits(saved), logits(after), rtol=1e-4, atol=1e-4)

    report = verify(out, against=model, plan=tmp_path / "plan.json")
    assert not [finding for finding in report.findings if finding.level == "error"]


def test_one_novice_makes_the_error_that_was_scored(
    tiny: Callable[[str], Path],
    statistics: Callable[[str], Path],
    text: stages.Text,
    tmp_path: Path,
) -> None:
    model = tiny("olmoe")
    options = {"rank": RANK}
    plan = stages.plan(model, "mone-affine", Budget(keep=0), statistics("olmoe"), options=options)
    whole = plan.layers[0]
    scores = [score or 0.0 for score in whole.scores["error"]]
    most = max(range(8), key=scores.__getitem__)
    assert whole.novices_NH is not None
    keep = tuple(e for e in range(8) if e != most)
    layer = LayerPlan(0, 8, keep, (most,), novices_NH=whole.novices_NH[most][None])
    stages.apply(model, replace(plan, layers={0: layer}), tmp_path / "out")
    ids_NL = calibration_ids(model, text)
    before = watch(open_stock(model), ids_NL)[0]
    after = watch(aligned(load(tmp_path / "out", dtype=torch.float32)), ids_NL)[0]
    measured = float((before.y_TH.double() - after.y_TH.double()).square().sum())
    assert measured == pytest.approx(scores[most], rel=1e-3)
    constant = stages.plan(model, "mone-ls", Budget(keep=4), statistics("olmoe"))
    assert scores[most] < (constant.layers[0].scores["error"][most] or 0.0)


def test_maps_of_different_ranks_are_refused(
    tiny: Callable[[str], Path], statistics: Callable[[str], Path], tmp_path: Path
) -> None:
    made = [
        stages.plan(
            tiny("olmoe"),
            "mone-affine",
            Budget(keep=6),
            statistics("olmoe"),
            options={"rank": rank},
        )
        for rank in (1, 2)
    ]
    mixed = replace(made[0], layers={0: made[0].layers[0], 1: made[1].layers[1]})
    with pytest.raises(PlanError, match="maps of ranks 1, 2"):
        stages.apply(tiny("olmoe"), mixed, tmp_path / "out")
