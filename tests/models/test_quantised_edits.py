"""Edits of quantised checkpoints: byte for byte, or written as bf16."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import quantise
from families import save_tiny
from moeprune import load
from moeprune.core.budget import Budget
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import UnsupportedModelError
from moeprune.methods.moeits import MoEITS
from moeprune.models.byte_exact import renumbered
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.surgery import PROVENANCE, apply_plan
from moeprune.pipeline.inspection import inspect
from moeprune.pipeline.planning import plan as make_plan
from quantised_cases import (
    PER_EXPERT,
    TOGETHER,
    Twins,
    changed,
    dequantised_by_transformers,
    dropping,
    edited,
    keeping,
    masking,
    plan_of,
    replacing,
    walked,
)
from support import (
    aligned,
    experts_masked,
    logits,
    open_stock,
    plan_for,
    tensor_digests,
    tree,
    without,
)

# ---- edits that keep every byte ------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*PER_EXPERT, *TOGETHER, "gpt_oss"])
def test_deletion_is_the_masked_original(model_type: str, twin: Twins, tmp_path: Path) -> None:
    source = twin(model_type, (16, 16))
    plan = edited(source, tmp_path / "out")
    keep = {index: layer.keep for index, layer in plan.layers.items()}
    assert len(set(keep.values())) > 1, "the layers should lose different experts"
    original = open_stock(quantise.plain(source, tmp_path / "original"))
    with experts_masked(original, keep):
        expected = logits(original)
    pruned = open_stock(quantise.plain(tmp_path / "out", tmp_path / "pruned"))
    assert torch.equal(logits(pruned), expected)
    assert torch.equal(walked(tmp_path / "out", torch.float32), expected)


@pytest.mark.parametrize("model_type", [*PER_EXPERT, "gpt_oss"])
def test_result_is_what_transformers_dequantises(
    model_type: str, twin: Twins, tmp_path: Path
) -> None:
    """No part of the package on this side: the new files, and transformers' own dequantisation."""
    plan = edited(twin(model_type), tmp_path / "out")
    original = aligned(dequantised_by_transformers(twin(model_type), torch.float32))
    with experts_masked(original, {index: layer.keep for index, layer in plan.layers.items()}):
        expected = logits(original)
    pruned = aligned(dequantised_by_transformers(tmp_path / "out", torch.float32))
    assert torch.equal(logits(pruned), expected)


def test_every_kept_byte_is_the_same(twin: Twins, tmp_path: Path) -> None:
    """Per-expert tensors, weights and scales alike, under their new numbers and nothing else."""
    source = twin("deepseek_v3", (16, 16))
    plan = edited(source, tmp_path / "out")
    before, after = tensor_digests(source), tensor_digests(tmp_path / "out")
    expected = {}
    for name, digest in before.items():
        match = re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.experts\.)(\d+)(\..*)", name)
        if match is None:
            expected[name] = digest
            continue
        keep = plan.layers[int(match[2])].keep
        if int(match[3]) in keep:
            expected[f"{match[1]}{keep.index(int(match[3]))}{match[4]}"] = digest
    routers = {name for name in expected if re.search(r"mlp\.gate\.", name)}
    assert after.keys() == expected.keys()
    assert {n for n in after if after[n] != expected[n]} == routers
    stored = {info.dtype for info in Checkpoint.open(tmp_path / "out").tensors.values()}
    assert stored == {"F8_E4M3", "F32"}
    assert sum("scale_inv" in name for name in after) == sum(
        digest[0] == "F8_E4M3" for digest in after.values()
    )


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss"])
def test_every_kept_row_is_the_same(model_type: str, twin: Twins, tmp_path: Path) -> None:
    plan = edited(twin(model_type), tmp_path / "out")
    before = quantise.load_tensors(twin(model_type))
    after = quantise.load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        expected = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        found = after[name].view(torch.uint8) if tensor.element_size() == 1 else after[name]
        if len(expected) == 8 and ".layers." in name:
            keep = plan.layers[int(name.split(".layers.")[1].split(".")[0])].keep
            expected = expected[list(keep)]
        assert torch.equal(found, expected), name


def test_sizes_count_weights(twin: Twins, tmp_path: Path) -> None:
    """Scales are no parameters, and a byte of MXFP4 is two of them."""
    for model_type in ("qwen3_moe", "gpt_oss"):
        source = twin(model_type)
        checkpoint, plan = plan_of(source, dropping)
        sizes = apply_plan(checkpoint, plan, tmp_path / model_type)
        twins = [
            quantise.plain(directory, tmp_path / f"{model_type}-{number}")
            for number, directory in enumerate((source, tmp_path / model_type))
        ]
        assert sizes.parameters == tuple(Checkpoint.open(twin_).numel for twin_ in twins)
        assert sizes.bytes == (checkpoint.nbytes, Checkpoint.open(tmp_path / model_type).nbytes)
        facts = inspect(source)
        assert facts["parameters"] == sizes.parameters[0]
        assert facts["active_parameters"] == inspect(twins[0])["active_parameters"]
        assert facts["quantization"] == ("mxfp4" if model_type == "gpt_oss" else "fp8")
        assert facts["supported"] and inspect(twins[0])["quantization"] is None


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_moeits_reads_quantised_weights(model_type: str, twin: Twins, tmp_path: Path) -> None:
    """The same decision as for the unquantised twin, carried out on the quantised files."""
    source = twin(model_type, (16, 16))
    plans = [
        make_plan(directory, MoEITS(), Budget(keep=5))
        for directory in (source, quantise.plain(source, tmp_path / "plain"))
    ]
    assert plans[0].layers == plans[1].layers
    apply_plan(Checkpoint.open(source), plans[0], tmp_path / "out")
    kept = {name for name in tensor_digests(tmp_path / "out") if ".experts." in name}
    assert not any(re.search(r"experts\.[567]\.", name) for name in kept)
    assert walked(tmp_path / "out", torch.float32).isfinite().all()


# ---- scales of inputs, lists of modules, routers -------------------------------------------------


def test_scales_of_inputs_follow_their_experts(tmp_path: Path) -> None:
    """One per expert, under either name; transformers loads only one of them."""

    def extra(stem: str) -> quantise.Tensors:
        value = float(int(hashlib.sha256(stem.encode()).hexdigest()[:4], 16))
        return {
            stem + "activation_scale": torch.tensor(value),
            stem + "input_scale": torch.tensor([value]),
        }

    save_tiny("qwen3_moe", tmp_path / "plain")
    source = quantise.fp8(
        tmp_path / "plain", tmp_path / "a", extra=extra, activation_scheme="static"
    )
    plan = edited(source, tmp_path / "out")
    before, after = quantise.load_tensors(source), quantise.load_tensors(tmp_path / "out")
    keep = plan.layers[2].keep
    for number, expert in enumerate(keep):
        for last in ("activation_scale", "input_scale"):
            stem = "model.layers.2.mlp.experts.{}.up_proj." + last
            assert torch.equal(after[stem.format(number)], before[stem.format(expert)])
    assert not any(re.search(r"experts\.[67]\.", name) for name in after)
    assert torch.equal(
        walked(tmp_path / "out", torch.float32),
        logits(aligned(load(tmp_path / "out"))),
    )
    edited(source, tmp_path / "bf16", dequantize=True)
    open_stock(tmp_path / "bf16")  # nothing is left over


def test_scales_of_inputs_of_experts_together(twin: Twins, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj_activation_scale"
    single = "model.layers.1.mlp.experts.gate_up_proj_input_scale"

    def edit(tensors: quantise.Tensors) -> None:
        tensors |= {name: torch.arange(8.0), single: torch.ones(1)}

    source = changed(twin("minimax_m3_vl_text"), tmp_path / "a", edit)
    plan = edited(source, tmp_path / "out")
    after = quantise.load_tensors(tmp_path / "out")
    assert after[name].tolist() == list(plan.layers[1].keep)
    assert after[single].tolist() == [1.0]


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "model.layers.9.mlp.experts.0.up_proj.zero_point"),
        ("qwen3_moe", "model.layers.1.mlp.experts.8.up_proj.input_scale"),
        ("minimax_m3_vl_text", "model.layers.1.mlp.experts.down_proj_zero_point"),
        ("minimax_m3_vl_text", "model.layers.1.mlp.experts.down_proj_input_scale"),
    ],
    ids=["another layer", "another expert", "another name", "another size"],
)
def test_tensors_of_nobody_are_refused(
    model_type: str, name: str, twin: Twins, tmp_path: Path
) -> None:
    source = changed(twin(model_type), tmp_path / "a", lambda t: t.update({name: torch.ones(3)}))
    with pytest.raises(UnsupportedModelError, match=re.escape(name)):
        edited(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_tensors_of_nobody_are_refused(twin: Twins, tmp_path: Path) -> None:
    """Values and scales that transformers has no parameter for, beside the experts' own."""
    stem = "model.layers.1.mlp.experts.side_proj"

    def edit(tensors: quantise.Tensors) -> None:
        tensors[stem], tensors[stem + "_scale_inv"] = quantise.fp8_blocks(
            torch.ones(8, 8, 8), (8, 8)
        )

    source = changed(twin("minimax_m3_vl_text"), tmp_path / "a", edit)
    with pytest.raises(UnsupportedModelError, match=re.escape(stem)):
        edited(source, tmp_path / "out")


def test_unknown_tensors_of_an_expert_follow_it(twin: Twins, tmp_path: Path) -> None:
    stem = "model.layers.1.mlp.experts.{}.up_proj.zero_point"
    side = "model.layers.1.mlp.experts.{}.side_proj.weight"

    def edit(tensors: quantise.Tensors) -> None:
        for e in range(8):
            tensors[stem.format(e)] = torch.tensor([float(e)])
            pair = quantise.fp8_blocks(torch.full((8, 8), e + 1.0), (8, 8))
            tensors[side.format(e)], tensors[side.format(e) + "_scale_inv"] = pair

    source = changed(twin("qwen3_moe"), tmp_path / "a", edit)
    plan = edited(source, tmp_path / "out")
    after = quantise.load_tensors(tmp_path / "out")
    found = {name: t.item() for name, t in after.items() if name.endswith("zero_point")}
    assert found == {stem.format(i): e for i, e in enumerate(plan.layers[1].keep)}
    for number, expert in enumerate(plan.layers[1].keep):
        assert after[side.format(number) + "_scale_inv"].item() == pytest.approx((expert + 1) / 448)
        assert side.format(number) in after


def test_module_lists_are_renumbered(tmp_path: Path) -> None:
    """Some experts are not quantised at all, and the list says which."""
    odd = re.compile(r".*layers\.[12]\.mlp\.experts\.[13]\..*")
    save_tiny("qwen3_moe", tmp_path / "plain")
    skip = ["lm_head", "model.layers.*.mlp.gate"]
    skip += [f"model.layers.{layer}.mlp.experts.{e}" for layer in (1, 2) for e in (1, 3)]
    skip += ["model.layers.1.mlp.experts.1.up_proj"]
    source = quantise.fp8(
        tmp_path / "plain",
        tmp_path / "a",
        chosen=lambda name: quantise.LINEAR.fullmatch(name) and not odd.fullmatch(name),
        skip=skip,
        ignored_layers=["model.layers.2.mlp.experts.3.down_proj"],
    )

    def make(shape: LayerShape) -> LayerPlan:
        keep = without(shape, (0, 1) if shape.layer == 1 else (2, 5))
        return LayerPlan(shape.layer, shape.experts, keep)

    edited(source, tmp_path / "out", make)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = json.loads((source / "config.json").read_text())["quantization_config"]
    expected["modules_to_not_convert"] = [
        "lm_head",
        "model.layers.*.mlp.gate",
        "model.layers.1.mlp.experts.1",  # was 3; 1 is gone
        "model.layers.2.mlp.experts.1",
        "model.layers.2.mlp.experts.2",
    ]
    expected["ignored_layers"] = ["model.layers.2.mlp.experts.2.down_proj"]
    assert config["quantization_config"] == expected
    tensors = quantise.load_tensors(tmp_path / "out")
    for entry in expected["modules_to_not_convert"][2:]:
        assert tensors[f"{entry}.up_proj.weight"].dtype == torch.float32
    assert walked(tmp_path / "out", torch.float32).isfinite().all()


@pytest.mark.parametrize(
    "entry",
    [
        "experts.3",
        "model.layers.*.mlp.experts.3",
        "re:.*experts\\.(0|1)\\..*",
        "model.layers.7.mlp.experts.3.up_proj",
        "model.layers.1.mlp.experts.[0-3]",
    ],
)
def test_patterns_over_expert_numbers_are_refused(entry: str, twin: Twins, tmp_path: Path) -> None:
    source = changed(
        twin("qwen3_moe"), tmp_path / "a", lambda t: None, modules_to_not_convert=[entry]
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(repr(entry))):
        edited(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    edited(source, tmp_path / "same", keeping)
    edited(source, tmp_path / "bf16", dequantize=True)


@pytest.mark.parametrize(
    "entry",
    [
        "lm_head",
        "model.layers.3.self_attn",
        "model.layers.3.mlp.shared_experts.0.up_proj",
        "model.layers.*.block_sparse_moe.experts.*.w1",
        "re:.*experts\\.[0-9]+\\.down_proj",
        "re:.*experts\\.\\d{1,3}\\..*",
        "model.layers.3.mlp.experts",
    ],
)
def test_names_of_no_expert_stay(entry: str) -> None:
    assert renumbered({"ignore": [entry, {"deep": [entry]}]}, {}) == {
        "ignore": [entry, {"deep": [entry]}]
    }


@pytest.mark.parametrize(("block", "fits"), [((4, 32), False), ((8, 8), True), ((128, 128), True)])
def test_a_quantised_router(block: tuple[int, int], fits: bool, tmp_path: Path) -> None:
    """Its rows can go only where all of them share their scales, before and after."""
    save_tiny("qwen3_moe", tmp_path / "plain")
    source = quantise.fp8(
        tmp_path / "plain", tmp_path / "a", block, lambda name: name.endswith("mlp.gate.weight")
    )
    if fits:
        plan = edited(source, tmp_path / "out")
        original = open_stock(quantise.plain(source, tmp_path / "b"))
        with experts_masked(original, {i: layer.keep for i, layer in plan.layers.items()}):
            expected = logits(original)
        assert torch.equal(walked(tmp_path / "out", torch.float32), expected)
        return
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.gate\.weight") as told:
        edited(source, tmp_path / "out")
    assert "--dequantize" in told.value.hint
    assert not (tmp_path / "out").exists()
    edited(source, tmp_path / "bf16", dequantize=True)
    kept = edited(quantise.plain(source, tmp_path / "b", torch.bfloat16), tmp_path / "c")
    assert kept.layers.keys() == {0, 1, 2, 3}
    assert tensor_digests(tmp_path / "bf16") == tensor_digests(tmp_path / "c")


# ---- edits that change values --------------------------------------------------------------------


@pytest.mark.parametrize("make", [masking, replacing])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_changed_values_are_refused(
    model_type: str, make: Callable[[LayerShape], LayerPlan], twin: Twins, tmp_path: Path
) -> None:
    before = tree(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"experts|input_linear") as told:
        edited(twin(model_type), tmp_path / "out", make)
    assert ("MXFP4" if model_type == "gpt_oss" else "F8_E4M3") in told.value.problem
    assert ("_scales" if model_type == "gpt_oss" else "scale_inv") in told.value.problem
    assert "--dequantize" in told.value.hint
    assert tree(tmp_path) == before


def test_masks_of_what_is_not_quantised(tmp_path: Path) -> None:
    """Only the down matrices are quantised, and only the others are masked."""
    save_tiny("qwen3_moe", tmp_path / "plain")
    source = quantise.fp8(
        tmp_path / "plain", tmp_path / "a", chosen=re.compile(r".*experts.*down_proj.*").match
    )

    def make(shape: LayerShape) -> LayerPlan:
        layer = masking(shape)
        assert layer.mask is not None
        return replace(layer, mask=replace(layer.mask, roles=("gate", "up")))

    edited(source, tmp_path / "out", make)
    before, after = tensor_digests(source), tensor_digests(tmp_path / "out")
    assert {n for n in before if before[n] != after[n]} == {
        n for n in before if re.search(r"experts\.\d\.(gate|up)_proj\.weight$", n)
    }


@pytest.mark.parametrize("make", [keeping, dropping, masking, replacing])
@pytest.mark.parametrize("model_type", [*PER_EXPERT, *TOGETHER, "gpt_oss"])
def test_dequantised_is_the_edited_bf16_twin(
    model_type: str, make: Callable[[LayerShape], LayerPlan], twin: Twins, tmp_path: Path
) -> None:
    """Tensor by tensor what the same edit makes of the model dequantised beforehand."""
    source = twin(model_type, (16, 16))
    checkpoint, plan = plan_of(source, make)
    sizes = apply_plan(checkpoint, plan, tmp_path / "out", writing=Writing(dequantize=True))
    twin_ = Checkpoint.open(quantise.plain(source, tmp_path / "twin", torch.bfloat16))
    expected = apply_plan(twin_, plan_for(twin_, list(plan.layers.values())), tmp_path / "expected")
    assert tensor_digests(tmp_path / "out") == tensor_digests(tmp_path / "expected")
    assert replace(sizes, bytes=expected.bytes) == expected
    assert sizes.bytes == (checkpoint.nbytes, expected.bytes[1])
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("out", "expected")]
    assert configs[0] == configs[1]
    assert "quantization_config" not in configs[0]
    provenance = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    assert provenance["dequantized_from"] == ("mxfp4" if model_type == "gpt_oss" else "fp8")
    if make is not replacing:
        assert logits(open_stock(tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("model_type", [*PER_EXPERT, "gpt_oss"])
def test_dequantised_is_transformers_own_model(
    model_type: str, twin: Twins, tmp_path: Path
) -> None:
    """Every weight of a stock class, where transformers dequantises to bf16 itself."""
    edited(twin(model_type), tmp_path / "out", keeping, dequantize=True)
    expected = dequantised_by_transformers(twin(model_type), torch.bfloat16).state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].bfloat16(), tensor.bfloat16()), name


def test_plain_checkpoints_are_not_dequantised(twin: Twins, tmp_path: Path) -> None:
    plain = quantise.plain(twin("qwen3_moe"), tmp_path / "plain")
    with pytest.raises(UnsupportedModelError, match="is not quantised"):
        edited(plain, tmp_path / "out", dequantize=True)
    assert not (tmp_path / "out").exists()
    edited(plain, tmp_path / "out")
    assert json.loads((tmp_path / "out" / PROVENANCE).read_text())["dequantized_from"] is None
