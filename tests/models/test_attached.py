"""Attached prediction layers follow the layers' plan, or go, or are refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from families import load_tiny, moe_layers, save_tiny, token_ids
from heads import HEADS, attach, head_of, read_all
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError, PlanError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.attached import DROP, check_equal_counts, find_attached, without_heads
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.counts import kept_counts
from moeprune.models.editing import Sizes, Writing
from moeprune.models.layout import expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import PROVENANCE, apply_plan
from moeprune.models.walk import Batch, Walk
from moeprune.pipeline.inspection import inspect
from support import aligned, logits, plan_for, some_experts, tensor_digests, without

Tiny = Callable[[str], Path]

every_head = pytest.mark.parametrize("model_type", sorted(HEADS))


def shapes(checkpoint: Checkpoint) -> list[LayerShape]:
    return [site.shape for _, site in sorted(LayeredModel(checkpoint).sites.items())]


def dropping(directory: Path) -> Plan:
    """Delete one expert of every group or, without groups, two: others in every layer."""
    checkpoint = Checkpoint.open(directory)
    layers = []
    for shape in shapes(checkpoint):
        gone = some_experts(shape, 1 if shape.groups > 1 else 2, seed=1)
        layers.append(LayerPlan(shape.layer, shape.experts, without(shape, gone)))
    return plan_for(checkpoint, layers)


def cut(source: Path, out: Path, mtp: str) -> Sizes:
    """Delete experts."""
    return apply_plan(Checkpoint.open(source), dropping(source), out, writing=Writing(mtp=mtp))


def with_head(model_type: str, tiny: Tiny, tmp_path: Path, **changes: Any) -> Path:
    """The tiny checkpoint with its head; ``changes`` edit the head's tensors."""
    source = tiny(model_type)
    head = head_of(source, HEADS[model_type])
    return attach(source, tmp_path / "with-head", changes.get("edit", dict)(head))


def expected_head(head: dict[str, Tensor], keep: tuple[int, ...], total: int) -> dict[str, Tensor]:
    """What is left of a head when a layer keeps ``keep``, by its names alone."""
    found = {}
    for name, tensor in head.items():
        single = re.search(r"\.experts\.(\d+)\.", name)
        if single is not None:
            if int(single[1]) in keep:
                number = keep.index(int(single[1]))
                found[name.replace(single[0], f".experts.{number}.")] = tensor
        elif re.search(r"\.experts\.|_linear\.|\.router\.(layer|proj|gate)\.", name) or re.search(
            r"\.gate\.|expert_bias|per_expert_scale", name
        ):
            assert tensor.shape[0] == total, name
            found[name] = tensor[list(keep)]
        else:
            found[name] = tensor
    return found


@every_head
def test_head_is_pruned_as_the_last_layer(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    source = with_head(model_type, tiny, tmp_path)
    plan = dropping(source)
    sizes = apply_plan(Checkpoint.open(source), plan, tmp_path / "out")
    head = head_of(tiny(model_type), HEADS[model_type])
    last = plan.layers[max(plan.layers)]
    expected = expected_head(head, last.keep, last.experts)
    after = read_all(tmp_path / "out")
    found = {name: after[name] for name in after if not name.startswith("model.layers.3.")}
    found = {name: t for name, t in found.items() if name in head or name in expected}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    edited = {n for n in head if n not in expected or head[n].shape != expected[n].shape}
    assert edited
    counts = sizes.attached
    assert set(counts) == {"pruned", "copied"}
    assert sum(counts.values()) == len(head)
    assert counts["pruned"] >= len(edited)
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text())["attached"] == counts


@every_head
def test_the_rest_is_what_it_would_be_without_a_head(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Stock transformers opens the result; every other tensor has the same bytes."""
    source = with_head(model_type, tiny, tmp_path)
    head = head_of(tiny(model_type), HEADS[model_type])
    apply_plan(Checkpoint.open(source), dropping(source), tmp_path / "out")
    bare = tiny(model_type)
    apply_plan(Checkpoint.open(bare), dropping(bare), tmp_path / "bare")
    with_it, without_it = tensor_digests(tmp_path / "out"), tensor_digests(tmp_path / "bare")
    assert {n: d for n, d in with_it.items() if n not in head} == without_it
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("out", "bare")]
    assert configs[0] == configs[1]
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    root = HEADS[model_type].partition("layers.0.")[0]
    assert all(name.startswith(root) for name in info.pop("unexpected_keys"))
    assert not any(info.values()), info
    torch.testing.assert_close(
        logits(aligned(model)), logits(load_tiny(tmp_path / "bare")), rtol=0, atol=0
    )


@every_head
def test_drop_leaves_nothing_of_the_head(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    source = with_head(model_type, tiny, tmp_path)
    number = len(head_of(tiny(model_type), HEADS[model_type]))
    sizes = apply_plan(
        Checkpoint.open(source), dropping(source), tmp_path / "out", writing=Writing(mtp=DROP)
    )
    bare = tiny(model_type)
    apply_plan(Checkpoint.open(bare), dropping(bare), tmp_path / "bare")
    assert tensor_digests(tmp_path / "out") == tensor_digests(tmp_path / "bare")
    assert sizes.attached == {"dropped": number}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((tmp_path / "bare" / "config.json").read_text())
    counts = {key: config[key] for key in quirks.MTP_COUNT_KEYS if key in config}
    assert counts
    assert set(counts.values()) == {0}
    assert before | counts == config


def drawn(model: Any) -> Tensor:
    """What transformers' own prediction head draws from the model's last hidden state."""
    # the class knows its head by the published models' numbers of layers
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\."]
    head = aligned(MtpModel.from_pretrained(model))
    tokens = token_ids(1, 24)
    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        position_ids = torch.arange(24)[None]
        hidden = head.forward_layer(0, hidden, position_ids, None, input_ids=tokens)
        found: Tensor = head._project_to_logits(hidden)
    return found


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_transformers_own_head_loads_what_is_kept(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Its prediction model is built with the new count, and computes as the masked original."""
    source = with_head(model_type, tiny, tmp_path)
    plan = dropping(source)
    apply_plan(Checkpoint.open(source), plan, tmp_path / "out")
    pruned = load_tiny(tmp_path / "out")
    found = drawn(pruned)
    head = head_of(tiny(model_type), HEADS[model_type])
    keep = plan.layers[3].keep
    gone = [e for e in range(8) if e not in keep]
    # the original, whose routers can choose the kept experts only: correction biases say so
    masked = {
        name: tensor.index_fill(0, torch.tensor(gone), -1e9) if "correction" in name else tensor
        for name, tensor in head.items()
    }
    original = attach(tiny(model_type), tmp_path / "masked", masked)
    model = load_tiny(original)
    for index in moe_layers(model):
        bias = model.model.layers[index].mlp.gate.e_score_correction_bias
        bias[[e for e in range(8) if e not in plan.layers[index].keep]] = -1e9
    expected = drawn(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.std() > 0.01


def test_several_heads(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("deepseek_v3")
    one = head_of(source, "model.layers.4.")
    two = {name.replace("layers.4.", "layers.5."): 2 * tensor for name, tensor in one.items()}
    both = attach(source, tmp_path / "both", one | two)
    plan = dropping(both)
    sizes = apply_plan(Checkpoint.open(both), plan, tmp_path / "out")
    after = read_all(tmp_path / "out")
    expected = expected_head(one | two, plan.layers[3].keep, 8)
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    assert {n for n in after if ".4." in n or ".5." in n} >= set(expected)
    assert sum(sizes.attached.values()) == len(one) + len(two)
    apply_plan(Checkpoint.open(both), plan, tmp_path / "dropped", writing=Writing(mtp=DROP))
    assert not [n for n in read_all(tmp_path / "dropped") if re.search(r"layers\.[45]\.", n)]


def test_dense_head_is_copied(tiny: Tiny, tmp_path: Path) -> None:
    """MiMo's head is an ordinary layer: it has nothing that could go."""
    head = {
        "model.mtp.layers.0.mlp.gate_proj.weight": torch.randn(48, 32),
        "model.mtp.layers.0.self_attn.q_proj.weight": torch.randn(8, 32),
    }
    source = attach(tiny("mimo_v2_flash"), tmp_path / "a", head)
    sizes = apply_plan(Checkpoint.open(source), dropping(source), tmp_path / "out")
    after = read_all(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in head.items())
    assert sizes.attached == {"copied": 2}
    sizes = apply_plan(
        Checkpoint.open(source), dropping(source), tmp_path / "dropped", writing=Writing(mtp=DROP)
    )
    assert not set(head) & set(read_all(tmp_path / "dropped"))
    assert sizes.attached == {"dropped": 2}


# ---- plans that delete nothing -------------------------------------------------------------------


def replacing(shape: LayerShape) -> LayerPlan:
    gone = some_experts(shape, 2, seed=3)
    vectors = torch.ones(len(gone), shape.hidden)
    kept = without(shape, gone)
    return LayerPlan(shape.layer, shape.experts, kept, gone, novices_NH=vectors)


def masking(shape: LayerShape) -> LayerPlan:
    return LayerPlan(
        shape.layer, shape.experts, tuple(range(shape.experts)), mask=MaskEdit(0.5, None)
    )


@pytest.mark.parametrize("make", [replacing, masking])
@pytest.mark.parametrize("model_type", ["glm4_moe", "granitemoe"])
def test_novices_and_masks_leave_heads_alone(
    make: Callable[[LayerShape], LayerPlan], model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    source = with_head(model_type, tiny, tmp_path)
    checkpoint = Checkpoint.open(source)
    plan = plan_for(checkpoint, [make(shape) for shape in shapes(checkpoint)])
    sizes = apply_plan(checkpoint, plan, tmp_path / "out")
    head = head_of(tiny(model_type), HEADS[model_type])
    after = read_all(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in head.items())
    assert sizes.attached == {"copied": len(head)}
    apply_plan(checkpoint, plan, tmp_path / "dropped", writing=Writing(mtp=DROP))
    assert not set(head) & set(read_all(tmp_path / "dropped"))


def test_a_mask_beside_deletion_does_not_touch_the_head(tiny: Tiny, tmp_path: Path) -> None:
    source = with_head("glm4_moe", tiny, tmp_path)
    plan = dropping(source)
    both = {i: replace(layer, mask=MaskEdit(0.5, None)) for i, layer in plan.layers.items()}
    apply_plan(Checkpoint.open(source), replace(plan, layers=both), tmp_path / "out")
    expected = expected_head(head_of(tiny("glm4_moe"), "model.layers.4."), plan.layers[3].keep, 8)
    after = read_all(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    assert (after["model.layers.3.mlp.experts.0.down_proj.weight"] == 0).sum() == 32 * 24 / 2


# ---- what else such a checkpoint can do ----------------------------------------------------------


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_walking_ignores_heads(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    tokens = token_ids(2, 24)
    found = []
    for directory in (tiny(model_type), with_head(model_type, tiny, tmp_path)):
        model = LayeredModel(Checkpoint.open(directory), torch.float32)
        assert len(model.layers) == 4
        with Walk(model, [Batch(tokens, torch.arange(48).view(2, 24))], 1) as walk:
            walk.layers(["routing"])
            walk.logits(lambda _, value: found.append(value))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_inspect_names_heads(tiny: Tiny, tmp_path: Path) -> None:
    facts = inspect(with_head("qwen3_next", tiny, tmp_path))
    assert facts["supported"]
    assert facts["attached"] == ["mtp."]
    assert inspect(tiny("qwen3_next"))["attached"] == []


def test_companions_of_experts_follow_them(tiny: Tiny, tmp_path: Path) -> None:
    """Scales that the model's own layers do not have."""

    def scaled(head: dict[str, Tensor]) -> dict[str, Tensor]:
        scales = {
            name.replace(".weight", ".input_scale"): torch.full((1,), float(i))
            for i, name in enumerate(sorted(head))
            if ".experts." in name
        }
        return head | scales

    source = with_head("deepseek_v3", tiny, tmp_path, edit=scaled)
    plan = dropping(source)
    apply_plan(Checkpoint.open(source), plan, tmp_path / "out")
    head = scaled(head_of(tiny("deepseek_v3"), "model.layers.4."))
    expected = expected_head(head, plan.layers[3].keep, 8)
    after = read_all(tmp_path / "out")
    assert {n for n in after if n.startswith("model.layers.4.")} == set(expected)
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())


# ---- refusals ------------------------------------------------------------------------------------


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda head: {name.replace(old, new): tensor for name, tensor in head.items()}


def more(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda head: head | {name: torch.zeros(shape)}


def less(pattern: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda head: {name: t for name, t in head.items() if not re.search(pattern, name)}


def fused(head: dict[str, Tensor]) -> dict[str, Tensor]:
    block = "model.layers.4.mlp.experts."
    found = less(re.escape(block))(head)
    for role in ("gate", "up", "down"):
        parts = [head[f"{block}{e}.{role}_proj.weight"] for e in range(8)]
        found[f"{block}{role}_proj"] = torch.stack(parts)
    return found


NOT_UNDERSTOOD = {
    "router of another name": (renamed("mlp.gate.", "mlp.router."), r"mlp\.router\..*one entry"),
    "no router": (less(r"mlp\.gate\.weight"), r"mlp\.gate\.weight.*missing"),
    "no experts": (less(r"\.experts\."), r"mlp\.gate.*without experts"),
    "an expert short": (less(r"experts\.7\."), r"experts\.\*\.\w+.*not one for each of 8"),
    "an expert too many": (more("model.layers.4.mlp.experts.8.up_proj.weight", 24, 32), "not one"),
    "experts elsewhere": (renamed("mlp.experts.", "moe.experts."), r"moe\.experts.*laid out"),
    "fused where layers are not": (fused, r"experts\.\w+_proj.*one entry per expert"),
    "a bias nobody knows": (more("model.layers.4.mlp.temperature", 8), r"mlp\.temperature"),
    "a second router": (more("model.layers.4.gate.weight", 8, 32), r"4\.gate\.weight"),
}


@pytest.mark.parametrize("name", sorted(NOT_UNDERSTOOD))
def test_refuses_what_it_does_not_understand(name: str, tiny: Tiny, tmp_path: Path) -> None:
    edit, says = NOT_UNDERSTOOD[name]
    source = with_head("deepseek_v3", tiny, tmp_path, edit=edit)
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        apply_plan(Checkpoint.open(source), dropping(source), tmp_path / "out")
    assert "--mtp drop" in caught.value.hint
    assert not (tmp_path / "out").exists()
    apply_plan(
        Checkpoint.open(source), dropping(source), tmp_path / "out", writing=Writing(mtp=DROP)
    )
    assert not [n for n in read_all(tmp_path / "out") if n.startswith("model.layers.4.")]


def test_refuses_a_fused_head_of_another_size(tiny: Tiny, tmp_path: Path) -> None:
    def smaller(head: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t[:6] if len(t) == 8 and "block_sparse" in n else t for n, t in head.items()}

    source = with_head("granitemoe", tiny, tmp_path, edit=smaller)
    with pytest.raises(UnsupportedModelError, match=r"\[6, .*where the layers have 8"):
        apply_plan(Checkpoint.open(source), dropping(source), tmp_path / "out")


NO_HEAD = {
    "left over in a layer": "model.layers.2.mlp.experts.3.gate_proj.weight_scale",
    "another model's": "talker.model.layers.0.mlp.experts.3.gate_proj.weight",
}


@pytest.mark.parametrize("mtp", ["keep-pruned", DROP])
@pytest.mark.parametrize("name", sorted(NO_HEAD))
def test_refuses_experts_that_are_in_no_head(
    name: str, mtp: str, tiny: Tiny, tmp_path: Path
) -> None:
    """They are neither cut by a plan that was not made for them, nor left out."""
    key = NO_HEAD[name]
    source = attach(tiny("deepseek_v3"), tmp_path / "a", {key: torch.zeros(24, 32)})
    with pytest.raises(UnsupportedModelError, match=re.escape(key)):
        apply_plan(
            Checkpoint.open(source), dropping(source), tmp_path / "out", writing=Writing(mtp=mtp)
        )
    assert not (tmp_path / "out").exists()


def test_a_head_cannot_follow_layers_of_different_counts(tiny: Tiny, tmp_path: Path) -> None:
    source = with_head("qwen3_next", tiny, tmp_path)
    model = LayeredModel(Checkpoint.open(source))
    layout = expert_layout(model)
    by_layer = {index: site.shape for index, site in model.sites.items()}
    plan = dropping(source)
    uneven = replace(plan, layers=dict(plan.layers) | {1: LayerPlan(1, 8, (0, 2, 3, 5, 7))})
    kept = find_attached(model, layout, "keep-pruned", True)
    check_equal_counts(kept_counts(by_layer, plan), kept)
    with pytest.raises(PlanError, match=r"between 5 and 6 .* mtp\.") as caught:
        check_equal_counts(kept_counts(by_layer, uneven), kept)
    assert "--mtp drop" in caught.value.hint
    check_equal_counts(kept_counts(by_layer, uneven), find_attached(model, layout, DROP, True))


def test_choice_is_checked_first(tmp_path: Path, tiny: Tiny) -> None:
    source = tiny("mixtral")
    with pytest.raises(MoepruneError, match="unknown --mtp 'dorp'") as caught:
        apply_plan(
            Checkpoint.open(source), dropping(source), tmp_path / "out", writing=Writing(mtp="dorp")
        )
    assert "'drop'" in caught.value.hint


def test_a_class_that_loads_the_layer_has_no_head(tmp_path: Path) -> None:
    """The same names under a configuration with one layer more."""
    source = save_tiny("glm4_moe", tmp_path / "a", num_hidden_layers=5)
    model = LayeredModel(Checkpoint.open(source))
    assert not find_attached(model, expert_layout(model), "keep-pruned", True).heads
    assert apply_plan(model.checkpoint, dropping(source), tmp_path / "out").attached == {}


# ---- config.json ---------------------------------------------------------------------------------


def test_config_says_that_there_are_no_heads() -> None:
    config = {
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 2,
        "use_mtp": True,
        "layer_types": list("abcdef"),
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "text_config": {"num_hidden_layers": 3, "mtp_num_hidden_layers": 1, "layer_types": ["a"]},
        "mtp_config": {"num_nextn_predict_layers": 3},
    }
    without_heads(config)
    assert config == {
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 0,
        "use_mtp": False,
        "layer_types": list("abcd"),
        "eos_token_id": [1, 2, 3, 4, 5, 6],
        "text_config": {"num_hidden_layers": 3, "mtp_num_hidden_layers": 0, "layer_types": ["a"]},
        "mtp_config": {"num_nextn_predict_layers": 0},
    }


def test_config_that_says_nothing_gets_a_zero() -> None:
    plain: dict[str, Any] = {"model_type": "a"}
    without_heads(plain)
    assert plain["num_nextn_predict_layers"] == 0
    nested: dict[str, Any] = {"text_config": {}}
    without_heads(nested)
    assert nested == {"text_config": {"num_nextn_predict_layers": 0}}
