"""Plans for servers that prune while they load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
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


def test_a_reader_of_riy_masks_what_deleting_leaves_out() -> None:
    """As its description says: [layer, expert] pairs get the logit -inf before the top-k."""
    profile = json.loads(export(PLAN, "riy"))
    assert profile["version"] == 1
    logits_TE = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    for index, layer in PLAN.layers.items():
        gone = [expert for layer_index, expert in profile["pruned_experts"] if layer_index == index]
        masked_TE = logits_TE.index_fill(1, torch.tensor(gone), float("-inf"))
        deleted_TK = logits_TE[:, list(layer.keep)].topk(2).indices
        assert torch.equal(masked_TE.topk(2).indices, torch.tensor(layer.keep)[deleted_TK])
        shared = [masked_TE.softmax(-1)[:, list(layer.keep)], logits_TE[:, layer.keep].softmax(-1)]
        torch.testing.assert_close(*shared)


def test_a_reader_of_ascend_keeps_the_first_of_each_list() -> None:
    """One layer a line, a full ranking, of which the ratio says how many go."""
    ratio = 0.4
    for line, (index, layer) in zip(
        export(PLAN, "ascend").decode().splitlines(), PLAN.layers.items(), strict=True
    ):
        ((name, ranking),) = json.loads(line).items()
        assert int(name) == index and sorted(ranking) == list(range(layer.experts))
        assert set(ranking[: round(layer.experts * (1 - ratio))]) == set(layer.keep)
