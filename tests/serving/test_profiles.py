"""Plans for servers that prune while they load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeprune.cli.app import app
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.plan import Plan
from moeprune.core.plan_json import layer_to_json
from moeprune.errors import PlanError
from moeprune.files import json_bytes
from moeprune.serving.profiles import export

PLAN = Plan(
    layers={1: LayerPlan(1, 5, (0, 2, 3)), 2: LayerPlan(2, 5, (1, 3, 4))},
    method="reap",
    options={},
    budget={"ratio": 0.4},
    model={"name": "some/model", "fingerprint": "f"},
    statistics={},
    seed=0,
)

GOLDEN = {
    "moeprune": {
        "format": "moeprune.profile/1",
        "method": "reap",
        "model": {"name": "some/model", "fingerprint": "f"},
        "layers": {
            "1": {"experts": 5, "keep": [0, 2, 3]},
            "2": {"experts": 5, "keep": [1, 3, 4]},
        },
    },
    "riy": {
        "version": 1,
        "model": "some/model",
        "pruned_experts": [[1, 1], [1, 4], [2, 0], [2, 2]],
    },
}


@pytest.mark.parametrize("profile", GOLDEN)
def test_golden(profile: str) -> None:
    assert json.loads(export(PLAN, profile)) == GOLDEN[profile]


def test_golden_lines() -> None:
    assert export(PLAN, "ascend") == b'{"1": [0, 2, 3, 1, 4]}\n{"2": [1, 3, 4, 0, 2]}\n'


def test_what_no_server_can_do() -> None:
    novices = {**PLAN.layers, 1: LayerPlan(1, 5, (0, 2, 3), replaced=(1,))}
    with pytest.raises(PlanError, match=r"layer 1: .* cannot make novices"):
        export(replace(PLAN, layers=novices))
    with pytest.raises(PlanError, match="decoder layers"):
        export(replace(PLAN, drop_layers=(0,)))
    uneven = {**PLAN.layers, 1: LayerPlan(1, 5, (0, 2))}
    with pytest.raises(PlanError, match="same number of experts"):
        export(replace(PLAN, layers=uneven), "ascend")
    assert json.loads(export(replace(PLAN, layers=uneven), "riy"))["pruned_experts"][0] == [1, 1]


def test_command(tmp_path: Path) -> None:
    assert "keep" in layer_to_json(PLAN.layers[1])
    plan, out = tmp_path / "plan.json", tmp_path / "profile.json"
    plan.write_bytes(json_bytes(PLAN.to_json(None)))
    run = CliRunner()
    asked = ["plan-export", str(plan), "--out", str(out)]
    assert run.invoke(app, asked).exit_code == 0
    assert json.loads(out.read_text()) == GOLDEN["moeprune"]
    assert run.invoke(app, asked).exit_code != 0, "an existing output stays"
    done = run.invoke(app, [*asked, "--force", "--format", "rly"])
    assert isinstance(done.exception, PlanError) and "did you mean 'riy'" in str(done.exception)
    assert json.loads(out.read_text()) == GOLDEN["moeprune"]
    done = run.invoke(app, [*asked, "--force", "--json"])
    assert json.loads(done.stdout) == {"path": str(out), "profile": "moeprune"}
