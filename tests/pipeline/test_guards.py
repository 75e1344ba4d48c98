"""What must be refused, or survive, where options of different parts meet."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.rows import SMALL, collected, random_rows, view_of
from families import save_tiny
from moeprune import Budget, Constraints
from moeprune.core.edits import Neurons
from moeprune.core.method import Context, make_method
from moeprune.core.ops.neurons import above_threshold, standardised
from moeprune.core.plan import LayerPlan
from moeprune.core.targets import Target
from moeprune.errors import BudgetError, MoepruneError, OutputError
from moeprune.files import refuse_existing
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.depth import Shallower
from moeprune.models.loading import LayeredModel
from moeprune.models.projection import project_layer
from moeprune.pipeline import stages
from moeprune.pipeline.arena.state import open_run
from moeprune.pipeline.asking import accept
from moeprune.pipeline.steps import Step, Steps


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mixtral."""
    return save_tiny("mixtral", tmp_path_factory.mktemp("guards") / "model")


@pytest.mark.parametrize("name", ["slim", "flap", "angular"])
def test_what_chooses_no_experts_has_no_wishes_about_them(name: str) -> None:
    """Their ``keep`` counts neurons or layers."""
    method = make_method(name)
    with pytest.raises(BudgetError, match="does not choose experts"):
        accept(method, Target(bytes=1000), Constraints())
    with pytest.raises(MoepruneError, match="removes no experts"):
        accept(method, Budget(keep=64), Constraints(pin=("0:1",)))


@pytest.mark.parametrize(("name", "scope"), [("moe-i2", "importance"), ("stun", "global")])
def test_a_target_needs_a_total_where_layers_compete(name: str, scope: str) -> None:
    method = make_method(name, {"scope": scope})
    with pytest.raises(BudgetError, match="cannot be given a total") as told:
        accept(method, Target(bytes=1000), Constraints())
    assert "scope=layer" in told.value.hint


def test_infinite_outputs_go_first() -> None:
    rows = random_rows(SMALL, 200)
    rows.f_TEH[0, int(rows.index_TK[0, 0])] = math.inf
    bad = int(rows.index_TK[0, 0])
    warnings: list[str] = []
    view = view_of(SMALL, collected(SMALL, rows))
    keep = SMALL.experts - 1
    plan = make_method("reap").plan_layer(view, Context(Budget(keep=keep), warn=warnings.append))
    assert plan.dropped == (bad,)
    assert f"experts [{bad}]" in warnings[0]


def test_every_expert_keeps_a_channel() -> None:
    scores = [torch.rand(4, 64)]
    assert int(above_threshold(scores, 252)[0].sum()) == 4
    with pytest.raises(BudgetError, match="each needs one"):
        above_threshold(scores, 253)


def test_one_unknown_channel_leaves_the_others_their_order() -> None:
    scores = torch.rand(2, 16, dtype=torch.float64)
    known = standardised(scores[:, 1:])
    scores[0, 0] = math.nan
    found = standardised(scores)
    assert found[0, 0].isnan()
    torch.testing.assert_close(found[0, 1:], known[0])


def test_statistics_of_merged_experts_are_no_slice() -> None:
    statistics = collected(SMALL, random_rows(SMALL, 20))
    keep = tuple(range(SMALL.top_k))
    plan = LayerPlan(SMALL.layer, SMALL.experts, keep)
    smaller = replace(SMALL, experts=len(keep))
    assert project_layer(statistics, plan, smaller).shape == smaller
    rows = torch.arange(SMALL.intermediate).expand(len(keep), -1)
    for merged in (
        replace(plan, neurons=Neurons.of_rows(rows, keep)),
        replace(plan, router_CE=torch.ones(len(keep), SMALL.experts)),
        replace(plan, ranks={"up": (2,) * SMALL.experts}),
    ):
        with pytest.raises(MoepruneError, match="deleted or masked"):
            project_layer(statistics, merged, smaller)


def test_a_folder_of_matrices_can_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "plan.weights"
    folder.mkdir()
    (folder / "layer-00003.safetensors").write_bytes(b"x")
    refuse_existing(folder, force=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="does not look like"):
        refuse_existing(folder, force=True)


def test_force_waits_for_the_lock(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with open_run(out, {"model": "a"}) as run:
        run.save()
        before = (out / "compare.json").read_bytes()
        with (
            pytest.raises(MoepruneError, match="another process"),
            open_run(out, {"model": "b"}, force=True),
        ):
            pass
        assert (out / "compare.json").read_bytes() == before


def test_steps_are_not_kept_around_the_output(model: Path, tmp_path: Path) -> None:
    method = make_method("random")
    steps = Steps(model, [Step(method, Budget(ratio=0.25))], tmp_path / "run" / "final")
    steps.keep = tmp_path / "run"
    with pytest.raises(OutputError, match="keep-steps") as told:
        steps.run()
    assert "kept in" in told.value.problem and not (tmp_path / "run").exists()


def test_statistics_do_not_replace_their_model(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    stages.prune(model, "random", Budget(ratio=0.25), source)
    before = sorted(path.name for path in source.iterdir())
    with pytest.raises(OutputError, match="is the model itself"):
        stages.calibrate(source, source, force=True)
    assert sorted(path.name for path in source.iterdir()) == before


def test_thresholds_move_with_their_layers(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(model, source)
    config = json.loads((model / "config.json").read_text())
    config["expert_skipping"] = {"0": {"beta": 0.1}, "2": {"beta": 0.3}, "3": {"beta": 0.4}}
    (source / "config.json").write_text(json.dumps(config))
    found = Shallower(LayeredModel(Checkpoint.open(source)), (1, 2)).config(config)
    assert found["expert_skipping"] == {"0": {"beta": 0.1}, "1": {"beta": 0.4}}
