"""Quantised checkpoints: read as what they stand for, edited byte for byte, or written as bf16."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantise
from families import save_tiny, token_ids
from moeprune import load
from moeprune.core.budget import Budget
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.errors import CheckpointError, MoepruneError, UnsupportedModelError
from moeprune.methods.moeits import MoEITS
from moeprune.models import quantised
from moeprune.models.byte_exact import renumbered
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.quantised import Quantisation, decode_fp8, decode_mxfp4
from moeprune.models.surgery import PROVENANCE, Writing, apply_plan
from moeprune.models.walk import Batch, Walk
from moeprune.pipeline.inspection import inspect
from moeprune.pipeline.planning import plan as make_plan
from support import (
    aligned,
    experts_masked,
    generator,
    logits,
    open_stock,
    plan_for,
    some_experts,
    tensor_digests,
    tree,
    without,
)

Twins = Callable[..., Path]

PER_EXPERT = ["deepseek_v3", "mixtral", "qwen3_moe"]
TOGETHER = ["gemma4_text", "granitemoe", "minimax_m3_vl_text"]
"""Families whose experts of a layer are one tensor on disk."""


def fused_too(name: str) -> object:
    return quantise.LINEAR.fullmatch(name) or re.search(
        r"experts\.\w+_proj$|_linear\.weight$", name
    )


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """A quantised tiny checkpoint; tests must not write into it."""
    made: dict[tuple[str, tuple[int, int]], Path] = {}

    def get(model_type: str, block: tuple[int, int] = (8, 8)) -> Path:
        key = model_type, block
        if key not in made:
            base = tmp_path_factory.mktemp(model_type)
            if model_type == "gpt_oss":
                wide = {"hidden_size": 64, "intermediate_size": 96}
                made[key] = quantise.mxfp4(save_tiny("gpt_oss", base / "plain", **wide), base / "q")
            else:
                save_tiny(model_type, base / "plain")
                made[key] = quantise.fp8(base / "plain", base / "q", block, fused_too)
        return made[key]

    return get


def dequantised_by_transformers(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    kind = json.loads((directory / "config.json").read_text())["quantization_config"]
    config = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[kind["quant_method"]]
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        quantization_config=config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def walked(directory: Path, dtype: torch.dtype) -> Tensor:
    found: dict[int, Tensor] = {}
    ids = token_ids(2, 24)
    batch = Batch(ids, torch.arange(ids.numel()).view_as(ids))
    with Walk(LayeredModel(Checkpoint.open(directory), dtype), [batch], 1) as running:
        running.layers([], lambda site, statistics: False)
        running.logits(lambda index, value: found.update({index: value}))
    return found[0]


def dropping(shape: LayerShape) -> LayerPlan:
    """Delete one expert of every group or, without groups, two: others in every layer."""
    gone = some_experts(shape, 1 if shape.groups > 1 else 2, seed=1)
    return LayerPlan(shape.layer, shape.experts, without(shape, gone))


def keeping(shape: LayerShape) -> LayerPlan:
    return LayerPlan(shape.layer, shape.experts, tuple(range(shape.experts)))


def masking(shape: LayerShape) -> LayerPlan:
    random = generator(7, shape.layer)
    scales = [
        torch.rand(shape.experts, n, generator=random) + 0.1
        for n in (shape.hidden, shape.intermediate)
    ]
    return replace(keeping(shape), mask=MaskEdit(0.5, None, shape.roles, *scales))


def replacing(shape: LayerShape) -> LayerPlan:
    vectors = torch.randn(1, shape.hidden, generator=generator(3, shape.layer)).bfloat16().float()
    gone = shape.layer % 2
    return LayerPlan(
        shape.layer, shape.experts, without(shape, [gone]), replaced=(gone,), novices_NH=vectors
    )


def plan_of(directory: Path, make: Callable[[LayerShape], LayerPlan]) -> tuple[Checkpoint, Plan]:
    checkpoint = Checkpoint.open(directory)
    sites = LayeredModel(checkpoint).sites
    return checkpoint, plan_for(checkpoint, [make(site.shape) for site in sites.values()])


def edited(
    directory: Path,
    out: Path,
    make: Callable[[LayerShape], LayerPlan] = dropping,
    dequantize: bool = False,
) -> Plan:
    checkpoint, plan = plan_of(directory, make)
    apply_plan(checkpoint, plan, out, writing=Writing(dequantize=dequantize))
    return plan


def changed(
    directory: Path, out: Path, edit: Callable[[quantise.Tensors], Any], **config: Any
) -> Path:
    """A copy of a checkpoint after ``edit`` of its tensors, with other keys of the quantisation."""
    tensors = quantise.load_tensors(directory)
    edit(tensors)
    old = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    return quantise.write(directory, out, tensors, {**old, **config} or None)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 24), (8, 8), (64, 8)])
def test_fp8_is_decoded_as_transformers_does(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=generator(1))
    stored, scale = quantise.fp8_blocks(weight, (8, 8))
    expected = Fp8Dequantize(None)._dequantize_one(stored, scale, torch.float32)
    found = decode_fp8(stored, scale, (8, 8))
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, weight, rtol=0.07, atol=0.01)


@pytest.mark.parametrize("shape", [(33, 25), (24, 24), (7, 40), (3, 20, 17)])
def test_last_blocks_may_be_smaller(shape: tuple[int, ...]) -> None:
    stored, scale = quantise.fp8_blocks(torch.randn(shape, generator=generator(2)), (16, 8))
    found = decode_fp8(stored, scale, (16, 8))
    assert torch.equal(found, quantise.fp8_values(stored, scale, (16, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_decoded_as_transformers_does(dtype: torch.dtype) -> None:
    """Every byte under every exponent."""
    bytes_16 = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    blocks = bytes_16.expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    found = decode_mxfp4(blocks, scales).transpose(1, 2).to(dtype)
    assert torch.equal(found, expected)


def test_a_power_of_two_as_scale(tmp_path: Path) -> None:
    """F8_E8M0 scales, as written by ``scale_fmt: ue8m0``."""

    def edit(tensors: quantise.Tensors) -> None:
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[name] = tensors[name].log2().round().exp2().to(torch.float8_e8m0fnu)

    save_tiny("qwen3_moe", tmp_path / "a")
    base = quantise.fp8(tmp_path / "a", tmp_path / "b")
    scaled = changed(base, tmp_path / "c", edit, scale_fmt="ue8m0")
    expected = dequantised_by_transformers(scaled, torch.float32)
    assert torch.equal(walked(scaled, torch.float32), logits(expected))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_matrices_of_experts(model_type: str, twin: Twins, tmp_path: Path) -> None:
    """Read one by one as float32, the same as from the unquantised twin."""
    source = twin(model_type, (16, 16))
    quantise.plain(source, tmp_path / "plain")
    sides = []
    for directory in (source, tmp_path / "plain"):
        model = LayeredModel(Checkpoint.open(directory))
        layout = expert_layout(model)
        sides.append(
            {
                (layer, expert, role): DiskExperts(model.checkpoint, layout, site).matrix(
                    expert, role
                )
                for layer, site in model.sites.items()
                for expert in range(site.shape.experts)
                for role in site.shape.roles
            }
        )
    assert sides[0].keys() == sides[1].keys()
    for key, found in sides[0].items():
        assert found.dtype == torch.float32
        assert torch.equal(found, sides[1][key])


@pytest.mark.parametrize("model_type", ["granitemoe", "gpt_oss"])
def test_only_the_experts_bytes_are_read(
    model_type: str, twin: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LayeredModel(Checkpoint.open(twin(model_type)))
    layout = expert_layout(model)

    def whole(self: Checkpoint, name: str) -> Tensor:
        raise AssertionError(f"all of {name} was read")

    monkeypatch.setattr(Checkpoint, "read", whole)
    matrix = DiskExperts(model.checkpoint, layout, model.sites[1]).matrix(3, "down")
    shape = model.sites[1].shape
    assert matrix.shape == (shape.hidden, shape.intermediate)


# ---- the walk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*PER_EXPERT, "gpt_oss"])
def test_walk_is_transformers_dequantised_model(model_type: str, twin: Twins) -> None:
    model = dequantised_by_transformers(twin(model_type), torch.float32)
    assert torch.equal(walked(twin(model_type), torch.float32), logits(model))


@pytest.mark.parametrize("model_type", [*PER_EXPERT, "gpt_oss"])
def test_walk_in_bfloat16(model_type: str, twin: Twins, tmp_path: Path) -> None:
    """With the other weights in bf16 too: transformers leaves those as they are stored."""

    def edit(tensors: quantise.Tensors) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.float32 and not name.endswith("_scale_inv"):
                tensors[name] = tensor.bfloat16()

    source = changed(twin(model_type), tmp_path / "bf16", edit)
    model = dequantised_by_transformers(source, torch.bfloat16)
    assert torch.equal(walked(source, torch.bfloat16), logits(model))


@pytest.mark.parametrize("block", [(8, 8), (16, 16), (20, 12)])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", *TOGETHER])
def test_walk_where_transformers_is_wrong(
    model_type: str, block: tuple[int, int], twin: Twins, tmp_path: Path
) -> None:
    """Blocks that do not divide the matrices, and scales of experts that are stored together."""
    source = twin(model_type, block)
    expected = logits(open_stock(quantise.plain(source, tmp_path / "plain")))
    assert torch.equal(walked(source, torch.float32), expected)


def test_one_scale_per_matrix(tmp_path: Path) -> None:
    def edit(tensors: quantise.Tensors) -> None:
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[name] = tensors[name].flatten()[0]

    save_tiny("qwen3_moe", tmp_path / "a")
    base = quantise.fp8(tmp_path / "a", tmp_path / "b", (64, 64))
    single = changed(base, tmp_path / "c", edit, weight_block_size=None)
    assert torch.equal(walked(single, torch.float32), walked(base, torch.float32))
    assert torch.equal(
        walked(single, torch.float32), logits(dequantised_by_transformers(single, torch.float32))
    )


@pytest.mark.parametrize("shape", [(8,), (8, 1, 1)])
def test_one_scale_per_expert(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Of experts that are stored together; as the blocks of a whole matrix would be."""

    def edit(tensors: quantise.Tensors) -> None:
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[name] = tensors[name].reshape(shape)

    save_tiny("granitemoe", tmp_path / "a")
    chosen = re.compile(r".*_linear\.weight").match
    base = quantise.fp8(tmp_path / "a", tmp_path / "b", (128, 128), chosen)
    single = changed(base, tmp_path / "c", edit, weight_block_size=None)
    assert torch.equal(walked(single, torch.float32), walked(base, torch.float32))
    for directory in (base, single):
        edited(directory, tmp_path / f"{directory.name}-out")
    assert torch.equal(
        walked(tmp_path / "c-out", torch.float32), walked(tmp_path / "b-out", torch.float32)
    )


# ---- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_load(model_type: str, twin: Twins, tmp_path: Path) -> None:
    source = twin(model_type, (16, 16))
    edited(source, tmp_path / "pruned")
    for directory in (source, tmp_path / "pruned"):
        model = load(directory, dtype=torch.float32)
        expected = open_stock(quantise.plain(directory, tmp_path / f"plain-{directory.name}"))
        assert torch.equal(logits(aligned(model)), logits(expected))
        assert not hasattr(model.config, "quantization_config")
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert load(source).dtype == torch.float32
    assert load(source, dtype="bfloat16").dtype == torch.bfloat16


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


# ---- what cannot be read -------------------------------------------------------------------------


FOREIGN: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq"},
    "bitsandbytes": {"load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "quark": {"quant_method": "quark"},
    "mxfp8": {"quant_method": "mxfp8"},
    "an unknown format": {},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_quantisations_are_refused_by_name(name: str, twin: Twins, tmp_path: Path) -> None:
    plain = quantise.plain(twin("qwen3_moe"), tmp_path / "plain")
    source = quantise.write(plain, tmp_path / "a", quantise.load_tensors(plain), FOREIGN[name])
    facts = inspect(source)
    assert facts["quantization"] == name
    assert not facts["supported"] and name in facts["reason"]
    model = LayeredModel(Checkpoint.open(source))
    for refused in (
        model.load_resident,
        lambda: model.load_layer(0),
        lambda: expert_layout(model),
        lambda: edited(source, tmp_path / "out"),
    ):
        with pytest.raises(UnsupportedModelError, match=name) as told:
            refused()
        assert told.value.hint == "use the bf16 checkpoint"
    assert not (tmp_path / "out").exists()


def rename(old: str, new: str) -> Callable[[quantise.Tensors], None]:
    def edit(tensors: quantise.Tensors) -> None:
        tensors |= {n.replace(old, new): tensors.pop(n) for n in [*tensors] if old in n}

    return edit


def cut_scales(tensors: quantise.Tensors) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    tensors[name] = tensors[name][:, :-1]


def as_bytes(tensors: quantise.Tensors) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name].view(torch.int8)


UNREADABLE: dict[str, tuple[Callable[[quantise.Tensors], None], dict[str, Any], str]] = {
    "scales under another name": (
        rename("weight_scale_inv", "weight_scale"),
        {},
        r"weight_scale is stored as F32 without a counterpart that fp8",
    ),
    "scales without weights": (
        lambda tensors: tensors.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}),
        {},
        r"model\.norm\.weight_scale_inv",
    ),
    "too few scales": (cut_scales, {}, r"experts\.0\.up_proj\.weight_scale_inv: \[3, 3\]"),
    "another block": (lambda t: None, {"weight_block_size": [16, 16]}, r"blocks of \[16, 16\]"),
    "a block of nothing": (lambda t: None, {"weight_block_size": [0, 8]}, r"blocks of \[0, 8\]"),
    "no block": (lambda t: None, {"weight_block_size": None}, r"blocks of \[\d+, \d+\]"),
    "bytes": (as_bytes, {}, r"up_proj\.weight is stored as I8"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_weights_that_nobody_can_decode(case: str, twin: Twins, tmp_path: Path) -> None:
    edit, config, says = UNREADABLE[case]
    source = changed(twin("qwen3_moe"), tmp_path / "a", edit, **config)
    facts = inspect(source)
    assert facts["quantization"] == "fp8"
    assert re.search(says, facts["reason"])
    for refused in (
        LayeredModel(Checkpoint.open(source)).load_resident,
        lambda: edited(source, tmp_path / "out"),
        lambda: load(source),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            refused()
    assert not (tmp_path / "out").exists()


def test_fp8_that_the_config_does_not_mention(twin: Twins, tmp_path: Path) -> None:
    """transformers would take the stored numbers for weights."""
    tensors = quantise.load_tensors(twin("qwen3_moe"))
    source = quantise.write(twin("qwen3_moe"), tmp_path / "a", tensors, None)
    for refused in (
        LayeredModel(Checkpoint.open(source)).load_resident,
        lambda: load(source),
        lambda: edited(source, tmp_path / "out"),
    ):
        with pytest.raises(UnsupportedModelError, match=r"and config\.json names no quantisation"):
            refused()


def test_a_plain_cast_to_fp8_is_no_quantisation(twin: Twins, tmp_path: Path) -> None:
    """Without scales the stored numbers are the weights, for transformers as well."""
    tensors = quantise.load_tensors(quantise.plain(twin("qwen3_moe"), tmp_path / "a"))
    cast = {n: t.to(torch.float8_e4m3fn) if "experts" in n else t for n, t in tensors.items()}
    source = quantise.write(tmp_path / "a", tmp_path / "b", cast, None)
    assert torch.equal(walked(source, torch.float32), logits(open_stock(source)))
    edited(source, tmp_path / "out")
    assert inspect(tmp_path / "out")["supported"]


@pytest.mark.parametrize(
    "edit",
    [
        rename("down_proj_scales", "down_proj_exponents"),
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj_scales": torch.ones(1).byte()}),
        lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.ones(8, 96, 64)}),
    ],
    ids=["missing", "of another size", "and the weight as well"],
)
def test_mxfp4_of_parts_that_do_not_fit(
    edit: Callable[[quantise.Tensors], None], twin: Twins, tmp_path: Path
) -> None:
    source = changed(twin("gpt_oss"), tmp_path / "a", edit)
    with pytest.raises(UnsupportedModelError, match="down_proj_blocks"):
        edited(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damage_found_while_writing_leaves_nothing(
    twin: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Tensor:
        raise CheckpointError("damaged")

    checkpoint, plan = plan_of(twin("qwen3_moe"), dropping)
    monkeypatch.setattr(quantised, "read", broken)
    with pytest.raises(MoepruneError, match="damaged"):
        apply_plan(checkpoint, plan, tmp_path / "out", writing=Writing(dequantize=True))
    assert not tree(tmp_path)


def test_parts_by_name(twin: Twins) -> None:
    """A weight and its scales may stand in different files."""
    checkpoint = Checkpoint.open(twin("qwen3_moe"))
    found = Quantisation.of(checkpoint)
    files = checkpoint.tensors
    assert any(files[p.stored].file != files[p.scale].file for p in found.parts.values())
    assert set(found.parts) == {n for n in files if n + "_scale_inv" in files} | {
        n for n in files if n.endswith("_scale_inv")
    }
