"""NAEE against brute force on the model's own blocks, and what dynamic skipping leaves out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import moeprune
from core.toy_block import Toy, slow_error
from families import experts_modules, save_tiny, token_ids
from methods.conftest import calibration_ids, readable
from moeprune.core.accumulators import TokenSample
from moeprune.core.budget import Budget
from moeprune.core.method import Context, make_method
from moeprune.core.plan import Plan
from moeprune.core.shapes import LayerShape
from moeprune.core.skipping import Skipping
from moeprune.errors import BudgetError, MoepruneError, PlanError, UnsupportedModelError
from moeprune.methods.naee import NAEE
from moeprune.models.store import StatisticsStore
from moeprune.pipeline import stages
from support import experts_masked, layer_of, logits, open_stock, tensor_digests

COMPUTE = stages.Compute(dtype="float32", workers=2)
SHAPE = LayerShape(layer=0, experts=6, top_k=2, hidden=8, intermediate=12)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models with four experts, of which two are chosen."""
    saved: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in saved:
            key = {"mixtral": "num_local_experts", "ernie4_5_moe": "moe_num_experts"}
            count = {key.get(family, "num_experts"): 4}
            folder = tmp_path_factory.mktemp(family)
            saved[family] = readable(save_tiny(family, folder, **count))
        return saved[family]

    return get


def block_of(model: PreTrainedModel, layer: int) -> Any:
    name = next(name for name in experts_modules(model) if layer_of(name) == layer)
    return model.get_submodule(name.rpartition(".")[0])


def output(model: PreTrainedModel, layer: int, x_SH: Tensor) -> Tensor:
    with torch.no_grad():
        made = block_of(model, layer)(x_SH[None])
    return made[0] if isinstance(made, tuple) else made


def brute_force(
    model: PreTrainedModel, layer: int, x_SH: Tensor, keep: int, experts: int, groups: int = 1
) -> tuple[float, tuple[int, ...]]:
    """The subset to keep, by running the block with all other experts masked."""
    full = output(model, layer, x_SH)
    size = experts // groups
    found = []
    for kept in combinations(range(experts), keep):
        if any(sum(e // size == g for e in kept) != keep // groups for g in range(groups)):
            continue
        with experts_masked(model, {layer: kept}):
            found.append((float((output(model, layer, x_SH) - full).norm()), kept))
    return min(found)


def planned(
    directory: Path, text: stages.Text, work: Path, **options: Any
) -> tuple[Plan, StatisticsStore]:
    store = stages.calibrate(directory, work / "stats", text, compute=COMPUTE)
    plan = stages.plan(
        directory, "naee", Budget(ratio=0.5), work / "stats", options=options, compute=COMPUTE
    )
    return plan, store


@pytest.mark.parametrize(
    ("family", "experts", "groups"),
    [
        ("mixtral", 4, 1),
        ("olmoe", 4, 1),
        ("ernie4_5_moe", 4, 1),
        ("deepseek_v3", 8, 2),
        ("gpt_oss", 8, 1),
    ],
)
def test_the_kept_subset_is_the_best_on_the_real_block(
    family: str,
    experts: int,
    groups: int,
    few: Callable[[str], Path],
    tiny: Callable[[str], Path],
    text: stages.Text,
    tmp_path: Path,
) -> None:
    directory = few(family) if experts == 4 else tiny(family)
    plan, store = planned(directory, text, tmp_path)
    model = open_stock(directory)
    if family not in ("deepseek_v3", "ernie4_5_moe"):  # their routers compute in float32
        model = model.double()
        model.set_experts_implementation("eager")  # the others have no float64
    assert plan.layers
    for index, layer in plan.layers.items():
        assert layer.experts == experts
        x_SH = store.layer(index).part(TokenSample).x_SH.to(model.dtype)
        loss, kept = brute_force(model, index, x_SH, experts // 2, experts, groups)
        assert layer.keep == kept
        assert float(layer.notes[0].split()[4].rstrip(":")) == pytest.approx(loss, rel=1e-4)


def slow_greedy(toy: Toy, remove: int) -> set[int]:
    gone: set[int] = set()
    for _ in range(remove):
        left = [e for e in range(toy.shape.experts) if e not in gone]
        errors = {e: slow_error(toy, [x for x in left if x != e]) for e in left}
        gone.add(min(left, key=lambda e: errors[e]))
    return gone


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_removes_one_after_the_other(seed: int) -> None:
    toy = Toy(SHAPE, tokens=60, seed=seed)
    layer = NAEE(search="greedy").plan_layer(toy.view(), Context(Budget(keep=3)))
    assert set(layer.dropped) == slow_greedy(toy, 3)


def test_what_is_too_much_to_try_is_searched_by_a_beam_and_told() -> None:
    told: list[str] = []
    context = Context(Budget(keep=3), warn=told.append)
    view = Toy(SHAPE).view()
    exact = NAEE(search="exhaustive").plan_layer(view, context)
    assert not told and "best of all" in exact.notes[0]
    wide = NAEE(search="exhaustive", limit=19, width=20).plan_layer(view, context)
    assert len(told) == 1 and "20 subsets" in told[0]
    assert wide.keep == exact.keep and "width 20" in wide.notes[0]
    assert "width 1" in NAEE(limit=19).plan_layer(view, context).notes[0]


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(6)), st.sampled_from(["auto", "greedy"]), st.integers(2, 6))
def test_permuted_experts_permute_the_plan(order: list[int], search: Any, keep: int) -> None:
    method, context = NAEE(search=search), Context(Budget(keep=keep))
    plain = method.plan_layer(Toy(SHAPE).view(), context)
    other = method.plan_layer(Toy(SHAPE).permuted(order).view(), context)
    assert {order[e] for e in other.keep} == set(plain.keep)
    assert len(other.keep) == keep


def test_an_expert_without_tokens_goes_first() -> None:
    toy = Toy(SHAPE, never=(4,))
    view = toy.view()
    sample = view.need().part(TokenSample)
    sample.gate_SK /= sample.gate_SK.sum(dim=1, keepdim=True)
    for search in ("auto", "greedy"):
        layer = NAEE(search=search).plan_layer(view, Context(Budget(keep=5)))  # type: ignore[arg-type]
        assert layer.dropped == (4,)
        assert layer.scores["alone"][4] == 0.0


def test_pinned_experts_stay_and_forbidden_ones_go() -> None:
    view = Toy(SHAPE).view()
    first, second = NAEE().plan_layer(view, Context(Budget(keep=3))).dropped[:2]
    kept = NAEE().plan_layer(view, Context(Budget(keep=3))).keep[0]
    fixed = Context(
        Budget(keep=3), pinned={0: frozenset({first, second})}, forbidden={0: frozenset({kept})}
    )
    layer = NAEE().plan_layer(view, fixed)
    assert {first, second} <= set(layer.keep) and kept in layer.dropped and len(layer.keep) == 3
    with pytest.raises(BudgetError, match="pinned"):
        NAEE().plan_layer(view, Context(Budget(keep=3), pinned={0: frozenset(range(4))}))


def test_a_router_that_cannot_be_followed_is_refused() -> None:
    view = Toy(SHAPE).view()
    view.need().part(TokenSample).gate_SK.sqrt_()
    with pytest.raises(UnsupportedModelError, match="layer 0: its router could not be followed"):
        NAEE().plan_layer(view, Context(Budget(keep=3)))


def test_gates_on_inputs_are_refused() -> None:
    view = Toy(SHAPE).view()
    block = replace(view.need_block(), gated_inputs=True)  # type: ignore[type-var]
    with pytest.raises(UnsupportedModelError, match="what goes into an expert"):
        NAEE().plan_layer(replace(view, block=lambda: block), Context(Budget(keep=3)))


def test_ratio_zero_is_the_identity(
    tiny: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    directory = tiny("mixtral")
    stages.calibrate(directory, tmp_path / "stats", text, compute=COMPUTE)
    for name in ("naee", "moe-i2", "stun"):
        plan = stages.plan(directory, name, Budget(ratio=0.0), tmp_path / "stats", compute=COMPUTE)
        stages.apply(directory, plan, tmp_path / name)
        assert tensor_digests(tmp_path / name) == tensor_digests(directory)


def slow_skipping(
    gate_TK: Tensor, thresholds: Mapping[str, Any], seen: list[int]
) -> list[list[float]]:
    made = []
    for row in gate_TK.tolist():
        left = [g if g >= thresholds["beta"] * max(row) else 0.0 for g in row]
        seen[0] += sum(g == 0.0 for g in left)
        scale = sum(row) / sum(left) if thresholds["renormalise"] else 1.0
        made.append([g * scale for g in left])
    return made


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_skipping_travels_with_the_checkpoint_and_leaves_slots_out(
    family: str, few: Callable[[str], Path], text: stages.Text, tmp_path: Path
) -> None:
    plan, _ = planned(few(family), text, tmp_path, skipping=True)
    stages.save_plan(plan, tmp_path / "plan.json")
    stages.apply(few(family), tmp_path / "plan.json", tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    table = config["expert_skipping"]
    assert sorted(map(int, table)) == sorted(plan.layers)
    assert all(one["renormalise"] == (family == "mixtral") for one in table.values())
    model = open_stock(tmp_path / "small")
    ids_NL = calibration_ids(few(family), text)
    before = logits(model, ids_NL)
    skipping = moeprune.skip_experts(model)
    after = logits(model, ids_NL)
    assert not torch.equal(before, after)
    first = min(plan.layers)  # nothing before it has changed: half of the tokens lose one slot
    assert 0.22 < skipping.skipped[first] / skipping.slots[first] < 0.28
    counted = dict(skipping.skipped)
    skipping.remove()
    assert torch.equal(logits(model, ids_NL), before)

    seen = {int(index): [0] for index in table}

    def slowly(index: str) -> Any:
        def change(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (*args[:2], torch.tensor(slow_skipping(args[2], table[index], seen[int(index)])))

        return change

    for name, experts in experts_modules(model).items():
        experts.register_forward_pre_hook(slowly(str(layer_of(name))))
    torch.testing.assert_close(logits(model, ids_NL), after, rtol=1e-4, atol=1e-5)
    assert counted == {index: number[0] for index, number in seen.items()}


def test_a_threshold_of_zero_skips_nothing(few: Callable[[str], Path]) -> None:
    model = open_stock(few("mixtral"))
    before = logits(model)
    layers = sorted(layer_of(name) for name in experts_modules(model))
    skipping = moeprune.skip_experts(model, {index: Skipping(0.0, False) for index in layers})
    assert torch.equal(logits(model), before)
    assert skipping.share == 0.0 and skipping.slots[layers[0]] == token_ids(2, 24).numel() * 2


def test_skipping_needs_thresholds(few: Callable[[str], Path]) -> None:
    model = open_stock(few("mixtral"))
    with pytest.raises(MoepruneError, match="no thresholds"):
        moeprune.skip_experts(model)
    with pytest.raises(MoepruneError, match="layer 99"):
        moeprune.skip_experts(model, {99: Skipping(0.5, True)})


@pytest.mark.parametrize(
    "data", [None, {}, {"beta": True, "renormalise": True}, {"beta": -1, "renormalise": True},
             {"beta": 10**400, "renormalise": True},
             {"beta": float("nan"), "renormalise": False}, {"beta": 0.5, "renormalise": 1}]
)  # fmt: skip
def test_thresholds_are_checked(data: Any) -> None:
    with pytest.raises(PlanError, match="somewhere"):
        Skipping.from_json(data, "somewhere")


def dense_and_pruned(
    model: PreTrainedModel, ids_NL: Tensor, kept: Mapping[int, Sequence[int]], layer: int
) -> tuple[Tensor, Tensor]:
    """A block's dense output, and its input behind layers that lost experts; all tokens [T, H]."""
    caught: list[Tensor] = []
    block = block_of(model, layer)

    def keep(module: Any, args: tuple[Tensor, ...], made: Any) -> None:
        made = made[0] if isinstance(made, tuple) else made
        caught.extend((args[0].flatten(0, -2), made.flatten(0, -2)))

    handle = block.register_forward_hook(keep)
    logits(model, ids_NL)
    with experts_masked(model, {i: ids for i, ids in kept.items() if i < layer}):
        logits(model, ids_NL)
    handle.remove()
    _, target_TH, x_TH, _ = caught
    return target_TH, x_TH


def test_progressive_takes_inputs_behind_pruned_layers_and_targets_of_the_unpruned_model(
    few: Callable[[str], Path], text: stages.Text
) -> None:
    directory = few("mixtral")
    method = make_method("naee", {"mode": "progressive"})
    plan = stages.plan(directory, method, Budget(ratio=0.5), None, text, compute=COMPUTE)
    dense = stages.plan(directory, method, Budget(ratio=0.0), None, text, compute=COMPUTE)
    assert all(layer.keep == (0, 1, 2, 3) for layer in dense.layers.values())
    model = open_stock(directory)
    ids_NL = calibration_ids(directory, text)
    kept = {index: layer.keep for index, layer in plan.layers.items()}
    for index, chosen in kept.items():
        target_TH, x_TH = dense_and_pruned(model, ids_NL, kept, index)
        found = []
        for ids in combinations(range(4), 2):
            with experts_masked(model, {index: ids}):
                made_TH = output(model, index, x_TH)[0]
            found.append((float((made_TH - target_TH).norm()), ids))
        assert chosen == min(found)[1]
        # the sample is 512 of the tokens
        share = (512 / len(x_TH)) ** 0.5
        error = float(plan.layers[index].notes[0].split()[4].rstrip(":"))
        assert error == pytest.approx(share * min(found)[0], rel=0.1)


def test_progressive_needs_text_and_no_statistics(tiny: Callable[[str], Path]) -> None:
    method = NAEE(mode="progressive")
    assert method.sequential and method.compares == ("sample",)
    assert not NAEE().sequential and not NAEE().compares
    with pytest.raises(MoepruneError, match="naee edits each layer"):
        stages.plan(tiny("mixtral"), method, Budget(ratio=0.5), "anything", compute=COMPUTE)
