"""Layers left out on disk, against the original whose layers hand on what they get.

The reference runs the whole original; a dropped layer's output is thrown away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import heads
from families import load_tiny, moe_model_types, save_tiny
from moeprune.core.plan import LayerPlan, Plan
from moeprune.errors import MoepruneError, PlanError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes, Writing
from moeprune.models.loading import LayeredModel, find_layers
from moeprune.models.surgery import apply_plan
from moeprune.pipeline.verification import verify
from support import logits, open_stock, plan_for, tensor_digests, tree

Tiny = Callable[[str], Path]
FAMILIES = [name for name in moe_model_types() if name not in quirks.REFUSED]

FIRST, MIDDLE, LAST = (0,), (1, 2), (-1,)

REFUSED: dict[tuple[str, tuple[int, ...]], str] = {
    ("beam", FIRST): "attn_residual_add_idx",
    ("beam", MIDDLE): "attn_residual_add_idx",
    ("gemma4_text", FIRST): "embed_tokens_per_layer",
    ("gemma4_text", MIDDLE): "embed_tokens_per_layer",
    ("gemma4_text", LAST): "not homogeneous",
    ("hy_v4", MIDDLE): "layer 3 uses the index of layer 1",
    ("inkling2_text", FIRST): "attention_input",
    ("inkling2_text", MIDDLE): "not stored under one name",
    ("inkling2_text", LAST): "not stored under one name",
    ("jamba", FIRST): "feed_forward",
    ("jamba", MIDDLE): "mamba",
    ("minimax", FIRST): "slope_rate",
    ("minimax", MIDDLE): "slope_rate",
    ("minimax", LAST): "slope_rate",
    ("zaya", FIRST): "other parameters",
}
"""What a family's configuration cannot say; everything else must be exact."""


def without(source: Path, dropped: Sequence[int], out: Path, **writing: Any) -> Sizes:
    checkpoint = Checkpoint.open(source)
    plan = replace(plan_for(checkpoint, []), drop_layers=tuple(dropped))
    return apply_plan(checkpoint, plan, out, writing=Writing(**writing))


def passing(model: PreTrainedModel, dropped: Sequence[int]) -> PreTrainedModel:
    """``model`` in which some layers hand on what they get."""

    def skip(forward: Callable[..., Any]) -> Callable[..., Any]:
        def skipped(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if isinstance(output, Tensor):
                return args[0]
            # what layers hand on beside the stream: router states (zaya), indices (glm, hunyuan)
            return args[0], args[1] if len(args) > 1 else kwargs["prev_topk_indices"]

        return skipped

    layers = find_layers(model)[1]
    for index in dropped:
        layers[index].forward = skip(layers[index].forward)
    return model


@pytest.mark.parametrize("which", [FIRST, MIDDLE, LAST], ids=["first", "middle", "last"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_exact_or_refused(
    model_type: str, which: tuple[int, ...], tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny(model_type)
    original = load_tiny(source)
    count = len(find_layers(original)[1])
    dropped = tuple(sorted(index % count for index in which))
    reason = REFUSED.get((model_type, which))
    before = tree(source)
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match=reason):
            without(source, dropped, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    sizes = without(source, dropped, tmp_path / "out")
    smaller = open_stock(tmp_path / "out")
    assert len(find_layers(smaller)[1]) == count - len(dropped)
    expected = logits(passing(original, dropped))
    torch.testing.assert_close(logits(smaller), expected, rtol=0, atol=0)
    after = Checkpoint.open(tmp_path / "out")
    assert sizes.parameters == (Checkpoint.open(source).numel, after.numel)
    assert sizes.bytes[1] == after.nbytes < sizes.bytes[0]
    sites = LayeredModel(after).sites.values()
    assert sizes.experts[1] == sum(site.shape.experts for site in sites)
    assert tree(source) == before


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_verify_agrees(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    without(tiny(model_type), (1, 2), tmp_path / "out")
    result = verify(tmp_path / "out", against=tiny(model_type))
    assert result.passed(), result.findings
    assert result.comparison["logits"]["difference"] == 0
    assert result.comparison["tensors_compared"] == len(Checkpoint.open(tmp_path / "out").tensors)


def test_verify_says_where_a_layer_cannot_be_passed_by(tiny: Tiny, tmp_path: Path) -> None:
    """Layers of zaya hand the router's states on beside the stream: no logits to compare with."""
    without(tiny("zaya"), (1, 2), tmp_path / "out")
    result = verify(tmp_path / "out", against=tiny("zaya"))
    assert result.passed(), result.findings
    assert "more than one state" in result.skipped["against-logits"]


def test_verify_sees_another_layer_in_its_place(tiny: Tiny, tmp_path: Path) -> None:
    without(tiny("mixtral"), (1, 2), tmp_path / "out")
    plan = tmp_path / "out" / "moeprune_plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"drop_layers": [0, 1]}))
    found = {finding.rule for finding in verify(tmp_path / "out", tiny("mixtral")).findings}
    assert {"against-tensors", "against-logits"} <= found


def test_tensors_move_up_byte_for_byte(tiny: Tiny, tmp_path: Path) -> None:
    without(tiny("olmoe"), (1,), tmp_path / "out")
    before, after = tensor_digests(tiny("olmoe")), tensor_digests(tmp_path / "out")
    moved = {0: 0, 2: 1, 3: 2}
    expected = {}
    for name, digest in before.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in moved:
                continue
            parts[2] = str(moved[int(parts[2])])
        expected[".".join(parts)] = digest
    assert after == expected
    record = json.loads((tmp_path / "out" / "moeprune.json").read_text())
    assert record["dropped_layers"] == [1]


def test_the_configuration_says_which_layers_are_left(tiny: Tiny, tmp_path: Path) -> None:
    for family, dropped, entries in (
        ("deepseek_v3", (0,), {"num_hidden_layers": 3, "first_k_dense_replace": 0}),
        ("qwen2_moe", (0,), {"num_hidden_layers": 3, "mlp_only_layers": [0]}),
        ("llama4_text", (2,), {"moe_layers": [1, 2], "no_rope_layers": [1, 1, 0]}),
        ("longcat_flash", (1,), {"num_layers": 2}),
        ("laguna", (0, 2), {"num_attention_heads_per_layer": [2, 2]}),
        ("dots3_note_text", (1,), {"per_layer_config": {key: {"head_dim": 16} for key in "12"}}),
    ):
        out = tmp_path / family
        without(tiny(family), dropped, out)
        config = json.loads((out / "config.json").read_text())
        assert {key: config[key] for key in entries} == entries, family
        old, new = (path / "generation_config.json" for path in (tiny(family), out))
        assert not old.exists() or old.read_bytes() == new.read_bytes()


def test_a_period_of_dense_layers_becomes_a_list(tmp_path: Path) -> None:
    """Every second layer has experts: without one of them, no period says which."""
    source = save_tiny("qwen3_moe", tmp_path / "in", decoder_sparse_step=2)
    assert sorted(LayeredModel(Checkpoint.open(source)).sites) == [1, 3]
    without(source, (2,), tmp_path / "out")
    assert sorted(LayeredModel(Checkpoint.open(tmp_path / "out")).sites) == [1, 2]
    expected = logits(passing(load_tiny(source), (2,)))
    assert torch.equal(logits(open_stock(tmp_path / "out")), expected)


def test_refusals(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="no layer with experts would remain"):
        without(source, (1, 2, 3), tmp_path / "out")
    for dropped, why in (
        ((4,), "ascending ids of 4"),
        ((2, 1), "ascending"),
        ((1, 1), "ascending"),
        ((0, 1, 2, 3), "leaves no layer"),
    ):
        with pytest.raises(PlanError, match=why):
            without(source, dropped, tmp_path / "out")
    checkpoint = Checkpoint.open(source)
    plan = plan_for(checkpoint, [LayerPlan(1, 8, (0, 1, 2, 4))])
    with pytest.raises(PlanError, match="cannot edit the experts of others"):
        apply_plan(checkpoint, replace(plan, drop_layers=(2,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_indexes_that_another_layer_uses(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="layer 2 uses the index of layer 1"):
        without(tiny("glm_moe_dsa"), (1,), tmp_path / "out")


def test_quantised_modules_get_their_new_numbers(
    twin: Callable[[str], Path], tmp_path: Path
) -> None:
    source = twin("deepseek_v3")
    without(source, (1,), tmp_path / "out")
    assert verify(tmp_path / "out", against=source).passed()
    before, after = tensor_digests(source), tensor_digests(tmp_path / "out")
    for name in after:
        if ".layers.2." in name:
            assert after[name] == before[name.replace(".layers.2.", ".layers.3.")]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_next"])
def test_prediction_layers_move_up_or_go(model_type: str, tiny: Tiny, tmp_path: Path) -> None:
    """Kept whole under the number behind the last layer, or left out with ``--mtp drop``."""
    prefix = heads.HEADS[model_type]
    head = heads.head_of(tiny(model_type), prefix)
    source = heads.attach(tiny(model_type), tmp_path / "in", head)
    without(source, (1,), tmp_path / "out")
    stored = heads.read_all(tmp_path / "out")
    place = prefix.replace("model.layers.4.", "model.layers.3.")
    for name, tensor in head.items():
        assert torch.equal(stored[name.replace(prefix, place)], tensor)
    assert verify(tmp_path / "out", against=source).passed()
    without(source, (1,), tmp_path / "no", mtp="drop")
    assert len(heads.read_all(tmp_path / "no")) == len(stored) - len(head)
    assert torch.equal(
        logits(open_stock(tmp_path / "no")), logits(passing(load_tiny(tiny(model_type)), (1,)))
    )


def test_plans_carry_layers() -> None:
    plan = Plan({}, "angular", {}, {}, {"fingerprint": "f"}, {}, 0, drop_layers=(2, 3))
    assert Plan.from_json(plan.to_json(None), {}).drop_layers == (2, 3)
    assert "drop_layers" not in replace(plan, drop_layers=()).to_json(None)
    for bad in ("1", [True], [0.5], {"1": 2}):
        with pytest.raises(MoepruneError, match="drop_layers"):
            Plan.from_json(plan.to_json(None) | {"drop_layers": bad}, {})
