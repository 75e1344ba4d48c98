"""Merging real models: files, stock classes, and a model that loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import experts_modules, load_tiny, tiny_model, token_ids
from methods.conftest import readable
from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.plan import LayerPlan, Plan
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.memory_edits import edit_in_memory
from moeprune.models.runtime import load
from moeprune.models.walk import Batch, Walk
from moeprune.pipeline import stages
from support import aligned, logits, matrices, open_stock, router_of, tensor_digests

COMPUTE = stages.Compute(dtype="float32", workers=2)
NEEDS = ("routing", "inputs", "hidden", "outputs", "router", "sample")
CELLS: dict[str, dict[str, Any]] = {
    "m-smoe": {},
    "hc-smoe": {"align": "weights", "router": "mean"},
    "ream": {"propagate": "dense"},
    "dern": {"router": "add", "threshold": -1.0},
}
NAMES = pytest.mark.parametrize("method", CELLS)

Statistics = Callable[[str], Path]


@pytest.fixture(scope="module")
def statistics(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path_factory: pytest.TempPathFactory
) -> Statistics:
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp("statistics") / model_type
            stages.calibrate(tiny(model_type), made[model_type], text, NEEDS, COMPUTE)
        return made[model_type]

    return get


def rebuilt(model: Path, plan: Plan) -> dict[int, dict[str, Tensor]]:
    """By hand: what a stock module of each layer should hold."""
    original = load_tiny(model)
    found = {}
    for name, experts in experts_modules(original).items():
        layer = plan.layers[next(int(p) for p in name.split(".") if p.isdecimal())]

        class Old:
            def matrix(self, expert: int, role: str, experts: Any = experts) -> Tensor:
                return matrices(experts, expert)[role].detach().float()

        edited = layer.edited(Old())
        router = router_of(original, name).weight.detach()
        rows = router[list(layer.keep)]
        if layer.router_CE is not None:
            rows = (layer.router_CE.double() @ router.double()).float()
        found[layer.layer] = {
            "router": rows,
            **{
                f"{role}.{position}": edited.matrix(expert, role)
                for position, expert in enumerate(layer.keep)
                for role in ("gate", "up", "down")
            },
        }
    return found


@NAMES
@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe", "mixtral"])
def test_stock_classes_open_a_smaller_file_with_what_the_plan_says(
    method: str,
    model_type: str,
    tiny: Callable[[str], Path],
    statistics: Statistics,
    tmp_path: Path,
) -> None:
    model = tiny(model_type)
    plan = stages.plan(
        model, method, Budget(ratio=0.5), statistics(model_type), options=CELLS[method]
    )
    sizes = stages.apply(model, plan, tmp_path / "out")
    assert sizes.experts[1] * 2 == sizes.experts[0]
    assert sizes.bytes[1] < 0.8 * sizes.bytes[0]
    size = [
        sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (model, tmp_path / "out")
    ]
    assert size[1] < 0.8 * size[0]
    after = open_stock(tmp_path / "out")
    expected = rebuilt(model, plan)
    for name, experts in experts_modules(after).items():
        layer = next(int(p) for p in name.split(".") if p.isdecimal())
        for position in range(4):
            for role, found in matrices(experts, position).items():
                torch.testing.assert_close(found, expected[layer][f"{role}.{position}"])
        torch.testing.assert_close(router_of(after, name).weight, expected[layer]["router"])
    assert logits(after).isfinite().all()


@NAMES
def test_removing_nothing_gives_the_same_bytes(
    method: str, tiny: Callable[[str], Path], statistics: Statistics, tmp_path: Path
) -> None:
    plan = stages.plan(
        tiny("olmoe"), method, Budget(ratio=0.0), statistics("olmoe"), options=CELLS[method]
    )
    assert plan.vectors() == {}
    stages.apply(tiny("olmoe"), plan, tmp_path / "out")
    assert tensor_digests(tmp_path / "out") == tensor_digests(tiny("olmoe"))


@NAMES
@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v2", "nemotron_h"])
def test_biases_routing_groups_and_experts_without_gate(
    method: str,
    model_type: str,
    tiny: Callable[[str], Path],
    statistics: Statistics,
    tmp_path: Path,
) -> None:
    model = tiny(model_type)
    plan = stages.plan(
        model, method, Budget(ratio=0.5), statistics(model_type), options=CELLS[method]
    )
    stages.apply(model, plan, tmp_path / "out")
    for layer in plan.layers.values():
        assert len(layer.keep) == 4
        if model_type == "deepseek_v2":
            assert sum(e < 4 for e in layer.keep) == 2
    assert logits(open_stock(tmp_path / "out")).isfinite().all()


@NAMES
def test_the_same_plan_twice(
    method: str, tiny: Callable[[str], Path], statistics: Statistics
) -> None:
    plans = [
        stages.plan(
            tiny("olmoe"), method, Budget(keep=3), statistics("olmoe"), options=CELLS[method]
        )
        for _ in range(2)
    ]
    assert plans[0].to_json(None) == plans[1].to_json(None)
    one, two = (plan.vectors() for plan in plans)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# a model that loses nothing -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every two neighbouring experts, the second is the first with permuted neurons."""
    model = tiny_model("olmoe")
    generator = torch.Generator().manual_seed(3)
    for name, experts in experts_modules(model).items():
        half = experts.gate_up_proj.shape[1] // 2
        for e in range(0, 8, 2):
            order = torch.randperm(half, generator=generator)
            experts.gate_up_proj.data[e + 1] = experts.gate_up_proj.data[e][
                torch.cat((order, order + half))
            ]
            experts.down_proj.data[e + 1] = experts.down_proj.data[e][:, order]
        rows = router_of(model, name).weight.data
        rows[1::2] = 0.9 * rows[0::2] + 0.1 * rows[1::2]  # alike, but not the same
    directory = tmp_path_factory.mktemp("doubled") / "model"
    model.save_pretrained(directory)
    return readable(directory)


def walked(model: Path, layers: dict[int, LayerPlan]) -> Tensor:
    """Logits of the model with these edits made in memory."""
    whole = LayeredModel(Checkpoint.open(model))
    found: list[Tensor] = []
    ids = token_ids(2, 24)
    with Walk(whole, [Batch(ids, torch.arange(ids.numel()).view_as(ids))], 1) as walk:

        def visit(site: Any, statistics: Any) -> bool:
            edit_in_memory(whole, site, layers[site.shape.layer])
            return True

        walk.layers(("routing",), visit)
        walk.logits(lambda index, out: found.append(out))
    return found[0]


# what is ranked by use could keep both experts of a pair
CORES = Constraints(pin=("*:0,2,4,6",))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("m-smoe", {}),
        ("hc-smoe", {"align": "weights"}),
        ("hc-smoe", {"align": "activations"}),
        ("ream", {"propagate": "dense", "grouping": "nearest"}),
    ],
)
def test_half_of_a_doubled_model_computes_the_same(
    method: str, options: dict[str, Any], doubled: Path, text: stages.Text, tmp_path: Path
) -> None:
    stages.calibrate(doubled, tmp_path / "statistics", text, NEEDS, COMPUTE)
    plan = stages.plan(
        doubled,
        method,
        Budget(ratio=0.5),
        tmp_path / "statistics",
        options={**options, "router": "original"},
        constraints=CORES,
    )
    pairs = {frozenset((e, e + 1)) for e in range(0, 8, 2)}
    layers = {}
    for index, layer in plan.layers.items():
        assert layer.served_by is not None
        groups = {
            frozenset(e for e in range(8) if layer.served_by[e] == core) for core in layer.keep
        }
        assert groups == pairs
        layers[index] = layer
    expected = logits(load_tiny(doubled))
    torch.testing.assert_close(walked(doubled, layers), expected, rtol=1e-4, atol=1e-4)
    sizes = stages.apply(doubled, plan, tmp_path / "half")
    assert sizes.experts == (32, 16) and sizes.bytes[1] < 0.8 * sizes.bytes[0]
    half = aligned(load(tmp_path / "half", dtype=torch.float32))
    torch.testing.assert_close(logits(half), expected, rtol=1e-4, atol=1e-4)


def test_ream_sees_what_it_merged(
    tiny: Callable[[str], Path], text: stages.Text, statistics: Statistics, tmp_path: Path
) -> None:
    """Later layers score what earlier merges made of the text; the first layer sees the same."""
    merged = stages.plan(tiny("olmoe"), "ream", Budget(ratio=0.5), text=text, compute=COMPUTE)
    dense = stages.plan(
        tiny("olmoe"),
        "ream",
        Budget(ratio=0.5),
        statistics("olmoe"),
        options={"propagate": "dense"},
    )
    first, last = min(merged.layers), max(merged.layers)
    assert merged.layers[first].scores["saliency"] == pytest.approx(
        dense.layers[first].scores["saliency"], rel=1e-4
    )
    assert merged.layers[last].scores["saliency"] != pytest.approx(
        dense.layers[last].scores["saliency"], rel=1e-2
    )
    stages.apply(tiny("olmoe"), merged, tmp_path / "out")
    step = replace(merged, layers={first: merged.layers[first]})
    assert len(step.layers) == 1
    stages.calibrate(tmp_path / "out", tmp_path / "after", text, ("outputs",), COMPUTE)
    assert logits(open_stock(tmp_path / "out")).isfinite().all()
