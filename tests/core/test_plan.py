"""The plan as JSON: there and back, edited by hand, and broken in every way."""

from __future__ import annotations

import copy
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
from torch import Tensor

from moeprune.core.plan import FORMAT, LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import PlanError
from moeprune.files import json_bytes
from moeprune.models.store import read_plan, write_plan

SHAPES = {i: LayerShape(i, 6, 2, 8, 12) for i in (1, 2, 5)}
Edit = Callable[[dict[str, Any]], object]


def novices(layer: int, count: int) -> Tensor:
    return torch.arange(count * 8.0).view(count, 8) + 100 * layer


@pytest.fixture
def plan() -> Plan:
    """Novices in layer 1, deletion in layer 2, a scaled mask in layer 5."""
    mask = MaskEdit(0.5, None, scale_in_EH=torch.rand(6, 8), scale_mid_EI=torch.rand(6, 12))
    layers = {
        1: LayerPlan(
            1, 6, (0, 3, 5), (1, 2, 4), {"fusion": (1.0, 0.1, 0.2, 3.0, 0.3, 4.0)}, novices(1, 3)
        ),
        2: LayerPlan(2, 6, (0, 1), scores={"removed_at": (None, None, 0.0, 3.0, 2.0, 1.0)}),
        5: LayerPlan(5, 6, tuple(range(6)), mask=mask, notes=("a note", "another")),
    }
    return Plan(
        layers,
        "test",
        {"option": 1, "other": "x"},
        {"ratio": 0.5},
        {"name": "m", "fingerprint": "f"},
        {"sha256": "s"},
        7,
        ("a warning",),
        {"moeprune": "0"},
    )


def through_json(plan: Plan, edit: Edit = lambda data: None) -> Plan:
    data = json.loads(json_bytes(plan.to_json({"file": "v", "sha256": "x"})))
    edit(data)
    return Plan.from_json(data, plan.vectors())


def same(one: Plan, two: Plan) -> None:
    assert json_bytes(one.to_json(None)) == json_bytes(two.to_json(None))
    first, second = one.vectors(), two.vectors()
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for index, layer in one.layers.items():
        assert layer.mask is None or layer.mask.roles == two.layers[index].mask.roles  # type: ignore[union-attr]
        assert replace(layer, mask=None, novices_NH=None) == replace(
            two.layers[index], mask=None, novices_NH=None
        )


def test_there_and_back(plan: Plan) -> None:
    plan.check(SHAPES)
    back = through_json(plan)
    same(back, plan)
    same(through_json(back), plan)
    back.check(SHAPES)
    assert (back.method, back.seed, back.warnings) == ("test", 7, ("a warning",))
    assert back.layers[1].dropped == () and back.layers[2].dropped == (2, 3, 4, 5)
    assert set(plan.vectors()) == {
        "layers.1.novices",
        "layers.5.scale_in",
        "layers.5.scale_mid",
    }


@pytest.mark.parametrize("pattern", [(2, 4), (1, 2)])
def test_pattern_and_magnitude_masks(plan: Plan, pattern: tuple[int, int]) -> None:
    layer = LayerPlan(5, 6, tuple(range(6)), mask=MaskEdit(None, pattern, ("down",)))
    masked = replace(plan, layers={5: layer})
    masked.check(SHAPES)
    mask = through_json(masked).layers[5].mask
    assert mask == MaskEdit(None, pattern, ("down",), None, None)
    assert masked.vectors() == {}
    assert mask.scale("down", 0) is None


def test_the_scale_of_a_matrix(plan: Plan) -> None:
    mask = plan.layers[5].mask
    assert mask is not None and mask.scale_in_EH is not None and mask.scale_mid_EI is not None
    for role, table in (("gate", mask.scale_in_EH), ("up", mask.scale_in_EH)):
        found = mask.scale(role, 3)
        assert found is not None and torch.equal(found, table[3])
    down = mask.scale("down", 3)
    assert down is not None and torch.equal(down, mask.scale_mid_EI[3])


def test_scores_that_are_not_numbers_become_null(plan: Plan) -> None:
    odd = replace(plan.layers[2], scores={"s": (math.nan, math.inf, -math.inf, None, 1.5, 0.0)})
    back = through_json(replace(plan, layers={2: odd}))
    assert back.layers[2].scores == {"s": (None, None, None, None, 1.5, 0.0)}


def test_on_disk(plan: Plan, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / "plan.json")
    same(read_plan(tmp_path / "plan.json"), plan)
    same(read_plan(tmp_path), plan)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(PlanError, match="needs its vectors"):
        read_plan(tmp_path)


# by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expert", [1, 2, 4])
def test_a_replaced_expert_can_be_pinned(plan: Plan, expert: int) -> None:
    def pin(data: dict[str, Any]) -> None:
        layer = data["layers"]["1"]
        layer["replaced"].remove(expert)
        layer["keep"] = sorted([*layer["keep"], expert])

    pinned = through_json(plan, pin)
    pinned.check(SHAPES)
    layer = pinned.layers[1]
    assert expert in layer.keep
    assert layer.novices_NH is not None
    for row, e in enumerate(layer.replaced):
        assert torch.equal(layer.novices_NH[row], novices(1, 3)[[1, 2, 4].index(e)])
    same(through_json(pinned), pinned)  # and it can be saved again


def test_all_replaced_experts_can_be_pinned(plan: Plan) -> None:
    def pin(data: dict[str, Any]) -> None:
        data["layers"]["1"] |= {"replaced": [], "keep": list(range(6))}

    pinned = through_json(plan, pin)
    pinned.check(SHAPES)
    assert pinned.layers[1].novices_NH is None
    assert "layers.1.novices" not in pinned.vectors()


def test_a_deleted_expert_can_be_forbidden_or_kept(plan: Plan) -> None:
    def swap(data: dict[str, Any]) -> None:
        data["layers"]["2"]["keep"] = [0, 4]

    swapped = through_json(plan, swap)
    swapped.check(SHAPES)
    assert swapped.layers[2].dropped == (1, 2, 3, 5)


def set_layer(index: int, **values: Any) -> Edit:
    return lambda data: data["layers"][str(index)].update(values)


def set_mask(**values: Any) -> Edit:
    return lambda data: data["layers"]["5"]["mask"].update(values)


def without(*path: str) -> Edit:
    def edit(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return edit


BROKEN: dict[str, tuple[Edit, str]] = {
    "expert added to replaced": (
        set_layer(1, replaced=[1, 2, 3, 4], keep=[0, 5]),
        r"layers\.1: expert 3 is in 'replaced' but has no vector",
    ),
    "expert replaced where none were": (
        set_layer(2, replaced=[5]),
        r"layers\.2: expert 5 is in 'replaced' but has no vector",
    ),
    "kept twice": (set_layer(2, keep=[0, 0, 1]), "layer 2: 'keep' must be ascending"),
    "replaced twice": (set_layer(1, replaced=[1, 1, 4]), "layer 1: 'replaced' must be ascending"),
    "out of order": (set_layer(2, keep=[1, 0]), "layer 2: 'keep' must be ascending"),
    "both": (set_layer(1, keep=[0, 1, 3, 5]), "layer 1: expert 1 is both kept and replaced"),
    "too large": (set_layer(2, keep=[0, 6]), r"layer 2: 'keep' names an expert outside 0\.\.5"),
    "negative": (set_layer(2, keep=[-1, 0]), r"layer 2: 'keep' names an expert outside 0\.\.5"),
    "too few": (set_layer(2, keep=[3]), "layer 2: 1 experts remain, but 2 are selected"),
    "other size": (set_layer(2, experts=8), "layer 2: made for 8 experts, found 6"),
    "ids as text": (set_layer(2, keep=["0", "1"]), r"layers\.2: 'keep' is not a list of expert"),
    "ids as booleans": (set_layer(2, keep=[True, False]), r"layers\.2: 'keep' is not a list"),
    "ids as floats": (set_layer(2, keep=[0.0, 1.0]), r"layers\.2: 'keep' is not a list"),
    "no list": (set_layer(2, keep=3), r"layers\.2: 'keep' is missing or not list"),
    "keep missing": (without("layers", "2", "keep"), r"layers\.2: 'keep' is missing"),
    "experts missing": (without("layers", "2", "experts"), r"layers\.2: 'experts' is missing"),
    "experts as text": (set_layer(2, experts="6"), r"layers\.2: 'experts' is missing or not int"),
    "rows missing": (without("layers", "1", "novice_rows"), r"layers\.1: 'novice_rows' names 0"),
    "rows twice": (set_layer(1, novice_rows=[1, 2, 2]), r"layers\.1: 'novice_rows' names 2"),
    "rows longer": (set_layer(1, novice_rows=[1, 2, 4, 5]), r"'novice_rows' names 4 .*\[3, 8\]"),
    "rows elsewhere": (set_layer(2, novice_rows=[1]), r"layers\.2: its vectors 'novices' are miss"),
    "scores a number": (set_layer(1, scores={"fusion": 1}), r"layers\.1\.scores: 'fusion' is miss"),
    "scores as text": (set_layer(1, scores={"a": ["x"]}), r"scores: 'a' is not a list of numbers"),
    "scores missing": (without("layers", "1", "scores"), r"layers\.1: 'scores' is missing"),
    "notes a number": (set_layer(1, notes=1), r"layers\.1: 'notes' is missing or not list"),
    "notes of numbers": (set_layer(1, notes=[1]), r"layers\.1: 'notes' is not a list of strings"),
    "unknown layer": (
        lambda data: data["layers"].update({"3": data["layers"]["2"]}),
        "names layer 3, which is not an MoE layer",
    ),
    "layer name": (lambda data: data["layers"].update(x={}), r"layers\.x is not a layer index"),
    "layer twice": (lambda data: data["layers"].update({"02": {}}), r"layers\.02 is not a layer"),
    "layer huge": (lambda data: data["layers"].update({"9" * 5000: {}}), "is not a layer index"),
    "layer empty": (lambda data: data["layers"].update({"2": []}), r"layers\.2 is not .* object"),
    "layers a list": (lambda data: data.update(layers=[]), "plan: 'layers' is missing or not dict"),
    "method": (lambda data: data.update(method=None), "plan: 'method' is missing or not str"),
    "seed": (lambda data: data.update(seed=True), "plan: 'seed' is missing or not int"),
    "model": (without("model"), "plan: 'model' is missing"),
    "warnings": (lambda data: data.update(warnings=3), "plan: 'warnings' is missing or not list"),
    "format": (lambda data: data.update(format="x"), f"'format' is not '{FORMAT}'"),
    "infinite option": (
        lambda data: data["options"].update(x=math.inf),
        "what JSON cannot: Out of",
    ),
    "infinite score": (set_layer(1, scores={"a": [math.nan]}), "what JSON cannot: Out of range"),
    "half a character": (set_layer(1, notes=["\ud800"]), "what JSON cannot: .* surrogates"),
    "mask null": (set_layer(5, mask=None), r"layers\.5: 'mask' is missing or not dict"),
    "mask both": (set_mask(pattern="2:4"), "layer 5: a mask has either a ratio or a pattern"),
    "mask neither": (without("layers", "5", "mask", "ratio"), "either a ratio or a pattern"),
    "mask ratio": (set_mask(ratio=1.0), r"layers\.5\.mask: ratio is not a number in \[0, 1\)"),
    "mask ratio nan": (set_mask(ratio=math.nan), r"ratio is not a number in \[0, 1\)"),
    "mask ratio huge": (set_mask(ratio=10**400), r"ratio is not a number in \[0, 1\)"),
    "mask ratio bool": (set_mask(ratio=False), r"ratio is not a number in \[0, 1\)"),
    "mask ratio text": (set_mask(ratio="0.5"), r"ratio is not a number in \[0, 1\)"),
    "mask pattern": (set_mask(ratio=None, pattern="2-4"), r"mask: bad pattern '2-4'"),
    "mask pattern huge": (set_mask(ratio=None, pattern="1:" + "9" * 5000), "bad pattern"),
    "mask pattern size": (set_mask(ratio=None, pattern="2:5"), "pattern 2:5 does not fit rows of"),
    "mask pattern all": (set_mask(ratio=None, pattern="4:4"), "pattern 4:4 does not fit"),
    "mask role": (set_mask(roles=["gate", "sideways"]), "experts have no 'sideways' matrix"),
    "mask roles": (set_mask(roles="down"), r"layers\.5\.mask: 'roles' is missing or not list"),
    "mask scale": (set_mask(scales=["scale_out"]), r"layers\.5\.mask: unknown scale 'scale_out'"),
    "mask elsewhere": (
        lambda data: data["layers"]["2"].update(mask=data["layers"]["5"]["mask"]),
        r"layers\.2\.mask: its vectors 'scale_in' are missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_mistakes_are_named(plan: Plan, case: str) -> None:
    edit, message = BROKEN[case]
    with pytest.raises(PlanError, match=message):
        through_json(plan, edit).check(SHAPES)


def test_vectors_left_behind_are_noticed(plan: Plan) -> None:
    data = plan.to_json(None)
    for layer, name in ((1, "novices"), (5, "scale_in")):
        one = {**data, "layers": {str(layer): data["layers"][str(layer)]}}
        with pytest.raises(PlanError, match=f"its vectors '{name}' are missing") as caught:
            Plan.from_json(one, {})
        assert "copy both" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.1.novices", torch.zeros(3, 9), "novices of shape .3, 9., expected one row of 8"),
        ("layers.1.novices", torch.zeros(2, 8), "'novice_rows' names 3 experts"),
        ("layers.1.novices", torch.tensor(1.0), "'novice_rows' names 3 experts"),
        ("layers.5.scale_in", torch.zeros(6, 9), "mask scales of shape .6, 9."),
        ("layers.5.scale_mid", torch.zeros(12), "mask scales of shape .12."),
    ],
)
def test_vectors_of_another_size(plan: Plan, name: str, tensor: Tensor, message: str) -> None:
    data = plan.to_json(None)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(data, plan.vectors() | {name: tensor}).check(SHAPES)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["0", "1", "2:4", "down", "scale_in", FORMAT, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
PLACES = ("keep", "replaced", "novice_rows", "scores", "mask", "notes", "experts")
MASK_PLACES = ("roles", "ratio", "pattern", "scales")


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_arbitrary_json_is_a_plan_error(data: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(data, {})


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_arbitrary_values_anywhere_are_a_plan_error_or_harmless(data: st.DataObject) -> None:
    mask = MaskEdit(0.5, None, scale_in_EH=torch.ones(6, 8))
    layer = LayerPlan(1, 6, (0, 3, 5), (1, 2, 4), {"s": (1.0,) * 6}, novices(1, 3), mask, ("n",))
    whole = Plan({1: layer}, "m", {}, {}, {}, {}, 0)
    json_plan = copy.deepcopy(whole.to_json(None))
    targets: list[tuple[dict[str, Any], str]] = [(json_plan, key) for key in json_plan]
    targets += [(json_plan["layers"]["1"], key) for key in PLACES]
    targets += [(json_plan["layers"]["1"]["mask"], key) for key in MASK_PLACES]
    for _ in range(data.draw(st.integers(1, 3))):
        place, key = data.draw(st.sampled_from(targets))
        place[key] = data.draw(JSON | st.lists(st.integers(-1, 6), max_size=6))
    try:
        plan = Plan.from_json(json_plan, whole.vectors())
        plan.check(SHAPES)
    except PlanError as error:
        assert error.problem.startswith(("plan", "not a plan"))
        return
    same(through_json(plan), plan)  # what is accepted is a plan that can be saved
