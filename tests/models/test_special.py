"""What no other family has: towers, identity experts, tables over token ids, reset biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Llama4Config, Llama4ForConditionalGeneration

from families import load_tiny, tiny_config, tiny_model, token_ids
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import CheckpointError, UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import INDEX, Checkpoint
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.observe import observed
from moeprune.models.surgery import apply_plan
from moeprune.models.walk import Batch, Walk
from support import (
    aligned,
    experts_masked,
    logits,
    open_stock,
    plan_for,
    some_experts,
    tensor_digests,
    without,
)

Tiny = Callable[[str], Path]


def drop_two(shape: LayerShape) -> LayerPlan:
    return LayerPlan(shape.layer, shape.experts, without(shape, some_experts(shape, 2, seed=1)))


def planned(
    directory: Path, make: Callable[[LayerShape], LayerPlan] = drop_two
) -> tuple[Checkpoint, Plan]:
    checkpoint = Checkpoint.open(directory)
    sites = LayeredModel(checkpoint).sites.values()
    return checkpoint, plan_for(checkpoint, [make(site.shape) for site in sites])


def kept(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {index: layer.keep for index, layer in plan.layers.items()}


def rewritten(
    source: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> Path:
    """A copy of a checkpoint, as one file, with other tensors."""
    tensors: dict[str, Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    out.mkdir()
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(change(tensors), out / "model.safetensors", metadata={"format": "pt"})
    assert not (out / INDEX).exists()
    return out


# ---- llama4 --------------------------------------------------------------------------------------


def test_llama4_with_its_vision_tower(tmp_path: Path) -> None:
    """The text model is pruned inside the whole checkpoint, the tower is copied."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
        "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32,
        "projector_output_dim": 32,
    }  # fmt: skip
    config = Llama4Config(text_config=tiny_config("llama4_text"), vision_config=vision)
    whole = Llama4ForConditionalGeneration(config)
    text = tiny_model("llama4_text")
    whole.language_model.load_state_dict(text.state_dict())
    whole.save_pretrained(tmp_path / "a")
    checkpoint, plan = planned(tmp_path / "a")
    streamed = {}
    batch = Batch(token_ids(2, 24), torch.arange(48).view(2, 24))
    with Walk(LayeredModel(checkpoint), [batch], workers=1) as walk:
        walk.layers(["routing"])
        walk.logits(lambda index, value: streamed.update({index: value}))
    torch.testing.assert_close(streamed[0], logits(text), rtol=0, atol=1e-5)
    apply_plan(checkpoint, plan, tmp_path / "out")
    pruned = aligned(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    with experts_masked(text, kept(plan)):
        expected = logits(text)
    torch.testing.assert_close(logits(pruned), expected, rtol=0, atol=0)
    _, info = Llama4ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    before, after = tensor_digests(tmp_path / "a"), tensor_digests(tmp_path / "out")
    tower = [name for name in before if not name.startswith("language_model.")]
    assert len(tower) > 10
    assert {name: after[name] for name in tower} == {name: before[name] for name in tower}
    after_config = json.loads((tmp_path / "out/config.json").read_text())
    assert after_config["text_config"].pop("num_local_experts") == 6
    before_config = json.loads((tmp_path / "a/config.json").read_text())
    assert before_config["text_config"].pop("num_local_experts") == 8
    assert after_config == before_config


# ---- longcat -------------------------------------------------------------------------------------


def test_identity_experts_without_matrices(tiny: Tiny, tmp_path: Path) -> None:
    """As vendors store them; they stay without, and the others are what they would be with them."""

    def is_identity(name: str) -> bool:
        return ".experts.8." in name or ".experts.9." in name

    bare = rewritten(
        tiny("longcat_flash"),
        tmp_path / "bare",
        lambda tensors: {name: t for name, t in tensors.items() if not is_identity(name)},
    )
    for source, out in ((tiny("longcat_flash"), "full-out"), (bare, "bare-out")):
        apply_plan(*planned(source), tmp_path / out)
    full, found = tensor_digests(tmp_path / "full-out"), tensor_digests(tmp_path / "bare-out")
    assert {name for name in full if name not in found} == {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"
        for layer in range(3)
        for expert in (6, 7)
        for matrix in ("gate", "up")
    }
    assert found == {name: full[name] for name in found}


# ---- deepseek_v4 ---------------------------------------------------------------------------------

TABLE = "model.layers.0.ffn.gate.tid2eid"


def with_table(source: Path, out: Path, change: Callable[[Tensor], Tensor]) -> Path:
    return rewritten(source, out, lambda t: {**t, TABLE: change(t[TABLE])})


def test_the_tables_dtype_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    small = with_table(tiny("deepseek_v4"), tmp_path / "a", lambda table: table.int())
    apply_plan(*planned(small), tmp_path / "small")
    apply_plan(*planned(tiny("deepseek_v4")), tmp_path / "plain")
    one, two = (Checkpoint.open(tmp_path / name) for name in ("small", "plain"))
    assert (one.tensors[TABLE].dtype, two.tensors[TABLE].dtype) == ("I32", "I64")
    assert torch.equal(one.read(TABLE).long(), two.read(TABLE))


def test_a_table_that_names_no_expert(tiny: Tiny, tmp_path: Path) -> None:
    broken = with_table(tiny("deepseek_v4"), tmp_path / "a", lambda table: table + 1)
    with pytest.raises(CheckpointError, match=r"tid2eid.*outside 0\.\.7"):
        apply_plan(*planned(broken), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_novices_and_masks_leave_the_table_alone(tiny: Tiny, tmp_path: Path) -> None:
    def constants(shape: LayerShape) -> LayerPlan:
        plan = LayerPlan(shape.layer, 8, tuple(range(2, 8)), (0, 1), {}, torch.ones(2, 32))
        return replace(plan, mask=MaskEdit(0.5, None))

    apply_plan(*planned(tiny("deepseek_v4"), constants), tmp_path / "out")
    before, after = tensor_digests(tiny("deepseek_v4")), tensor_digests(tmp_path / "out")
    assert after[TABLE] == before[TABLE]


# ---- zaya ----------------------------------------------------------------------------------------


def test_zaya_with_another_last_bias(tiny: Tiny, tmp_path: Path) -> None:
    """transformers resets that bias when it loads: in the original and in the result alike."""

    def shifted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: t.clone() for name, t in tensors.items()}
        for name, tensor in found.items():
            if name.endswith("balancing_biases"):
                tensor[-1] = -0.25
        return found

    source = rewritten(tiny("zaya"), tmp_path / "a", shifted)
    checkpoint, plan = planned(source)
    apply_plan(checkpoint, plan, tmp_path / "out")
    original = load_tiny(source)
    with experts_masked(original, kept(plan)):
        expected = logits(original)
    torch.testing.assert_close(logits(open_stock(tmp_path / "out")), expected, rtol=0, atol=0)
    after = Checkpoint.open(tmp_path / "out")
    for index in range(4):
        biases = after.read(f"model.layers.{index}.mlp.gate.balancing_biases")
        assert biases.shape == (7,) and float(biases[-1]) == -0.25


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["dbrx", "llama4_text", "longcat_flash", "mixtral", "zaya"])
def test_observing_leaves_the_model_as_it_was(model_type: str, tiny: Tiny) -> None:
    model = LayeredModel(Checkpoint.open(tiny(model_type)))
    for site in model.sites.values():
        before = dict(vars(site.experts)), dict(vars(site.router))
        hooks = len(site.router._forward_hooks)
        implementation = getattr(model.model.config, "_experts_implementation", None)
        with pytest.raises(KeyError), observed(site, router_output=True):
            assert len(site.router._forward_hooks) > hooks
            raise KeyError
        assert (dict(vars(site.experts)), dict(vars(site.router))) == before
        assert len(site.router._forward_hooks) == hooks
        assert getattr(model.model.config, "_experts_implementation", None) == implementation


def test_descriptions_are_of_classes_that_exist(tiny: Tiny) -> None:
    """A class that transformers renames, or brings to its interface, is noticed here."""
    found = {
        type(site.experts).__name__: site.experts
        for name in ("dbrx", "llama4_text", "longcat_flash", "zaya")
        for site in LayeredModel(Checkpoint.open(tiny(name))).sites.values()
    }
    assert set(quirks.UNDECORATED) | set(quirks.FLAT_MATRICES) | {"ZayaExperts"} == set(found)
    for name in quirks.UNDECORATED:
        assert not hasattr(found[name], "config"), f"{name} follows the interface now"


def test_matrices_that_are_not_an_experts(tiny: Tiny, tmp_path: Path) -> None:
    """A flat matrix whose size is not E times I is refused by name."""
    name = "transformer.blocks.1.ffn.experts.mlp.v1"
    source = rewritten(tiny("dbrx"), tmp_path / "a", lambda t: {**t, name: t[name][:-8].clone()})
    model = LayeredModel(Checkpoint.open(source))
    with pytest.raises(UnsupportedModelError, match=r"v1: unexpected shape \[184, 32\]"):
        expert_layout(model)


def test_flat_matrices_are_read_one_expert_at_a_time(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LayeredModel(Checkpoint.open(tiny("dbrx")))
    site = next(iter(model.sites.values()))
    disk = DiskExperts(model.checkpoint, expert_layout(model), site)
    monkeypatch.setattr(Checkpoint, "read", lambda *args: pytest.fail("read whole"))
    assert [tuple(disk.matrix(3, role).shape) for role in ("gate", "down")] == [(24, 32), (32, 24)]
