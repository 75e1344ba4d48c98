"""A plan with every kind of edit, to disk and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeprune.core.edits import EditedExperts, Neurons
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import OutputError, PlanError
from moeprune.models.plan_weights import WeightsFile, WeightsFolder, folder_of
from moeprune.models.store import read_plan, write_plan

SHAPE = LayerShape(layer=1, experts=4, top_k=2, hidden=6, intermediate=8)
KEEP = (0, 2)


class Random:
    """Matrices that differ by expert and role."""

    def matrix(self, expert: int, role: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(10 * expert + len(role))
        size = (6, 8) if role == "down" else (8, 6)
        return torch.randn(*size, generator=generator)


def whole_plan(folder: WeightsFolder) -> Plan:
    rebuilt = LayerPlan(
        layer=1,
        experts=4,
        keep=KEEP,
        neurons=Neurons.of_rows(torch.tensor([[0, 3, 5, 6], [7, 1, 2, 3]]), KEEP),
        router_CE=torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.25]]),
        offsets_CH=torch.arange(12.0).reshape(2, 6),
        ranks={"gate": (2, 3, 4, 4)},
    )
    serving = LayerPlan(layer=2, experts=4, keep=KEEP, served_by=(0, 0, 2, 2))
    matrices = {(e, "down"): Random().matrix(e, "down") for e in KEEP}
    stored = LayerPlan(layer=3, experts=4, keep=KEEP, stored=folder.store(3, matrices))
    layers = {1: rebuilt, 2: serving, 3: stored}
    return Plan(layers, "test", {}, {}, {}, {}, seed=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    write_plan(whole_plan(WeightsFolder(torch.float32)), path)
    return path


def test_round_trip(path: Path) -> None:
    before, after = whole_plan(WeightsFolder(torch.float32)), read_plan(path)
    after.check({index: replace(SHAPE, layer=index) for index in (1, 2, 3)})
    assert after.to_json(None) == before.to_json(None)
    vectors = before.vectors()
    assert after.vectors().keys() == vectors.keys()
    assert all(torch.equal(after.vectors()[name], tensor) for name, tensor in vectors.items())
    for index in (1, 3):
        for expert in KEEP:
            for role in ("gate", "up", "down"):
                old, new = (
                    plan.layers[index].edited(Random()).matrix(expert, role)
                    for plan in (before, after)
                )
                assert torch.equal(old, new)


def test_folder_of_matrices_is_deleted_with_the_last_plan() -> None:
    plan = whole_plan(WeightsFolder(torch.float32))
    stored = plan.layers[3].stored
    assert isinstance(stored, WeightsFile)
    file = stored.path
    assert file.is_file()
    del plan, stored
    assert not file.exists()


def test_rebuilt_layers_cannot_be_edited_by_hand(path: Path) -> None:
    data = json.loads(path.read_text())
    data["layers"]["1"]["keep"] = [0, 1]
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="cannot be edited by hand"):
        read_plan(path)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_matrices_must_be_those_of_the_plan(damage: str, path: Path) -> None:
    [file] = folder_of(path).iterdir()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(PlanError, match=r"layer-00003\.safetensors"):
        read_plan(path)


def test_an_existing_folder_of_matrices_is_not_replaced(path: Path) -> None:
    path.unlink()
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(OutputError, match="exists"):
        write_plan(whole_plan(WeightsFolder(torch.float32)), path)


def test_a_merged_expert_is_the_sum_of_its_neurons() -> None:
    index = [[0, j, e, (j + e) % 8] for e in (0, 1) for j in range(8)]
    factor = torch.tensor([[0.25, 0.5, 2.0]]).expand(16, 3)
    neurons = Neurons(8, torch.tensor(index, dtype=torch.int32), factor)
    made = EditedExperts(Random(), (0,), neurons)
    for role, share in (("gate", 0.25), ("up", 0.5), ("down", 2.0)):
        expected = torch.zeros(8, 6)
        for _, j, e, source in index:
            old = Random().matrix(e, role)
            expected[j] += share * (old.T if role == "down" else old)[source]
        expected = expected.T if role == "down" else expected
        torch.testing.assert_close(made.matrix(0, role), expected)


def test_a_cut_rank_is_the_nearest_matrix() -> None:
    made = EditedExperts(Random(), KEEP, ranks={"up": (2, 2, 2, 2)}).matrix(2, "up")
    old = Random().matrix(2, "up")
    singular = torch.linalg.svdvals(old.double())
    assert int(torch.linalg.matrix_rank(made, rtol=1e-5)) == 2
    error = float((old - made).double().square().sum())
    assert error == pytest.approx(float(singular[2:].square().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"router_CE": torch.zeros(2, 3)}, "router rows"),
        ({"offsets_CH": torch.zeros(1, 6)}, "offsets"),
        ({"served_by": (0, 1, 2, 2)}, "served_by"),
        ({"ranks": {"gate": (1, 1, 0, 1)}}, "ranks"),
        ({"neurons": Neurons(9, torch.zeros(1, 4), torch.ones(1, 3))}, "width 9"),
        ({"neurons": Neurons(8, torch.tensor([[0, 0, 4, 0]]), torch.ones(1, 3))}, "not exist"),
        ({"neurons": Neurons(8, torch.tensor([[0, 0, 0, 0]]), torch.ones(1, 3))}, "empty"),
    ],
)
def test_edits_that_make_no_sense(change: dict[str, object], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        replace(LayerPlan(1, 4, KEEP), **change).check(SHAPE)
