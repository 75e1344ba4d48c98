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
from moeprune.models.surgery import PROVENANCE, apply_plan
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
    apply_plan(checkpoint, plan, out, dequantize=dequantize)
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
