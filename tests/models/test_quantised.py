"""Quantised checkpoints are read as what they stand for, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import quantise
from families import save_tiny
from moeprune import load
from moeprune.errors import CheckpointError, MoepruneError, UnsupportedModelError
from moeprune.models import quantised
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.layout import DiskExperts, expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.quantised import Quantisation, decode_fp8, decode_mxfp4
from moeprune.models.surgery import apply_plan
from moeprune.pipeline.inspection import inspect
from quantised_cases import (
    PER_EXPERT,
    TOGETHER,
    Twins,
    changed,
    dequantised_by_transformers,
    dropping,
    edited,
    plan_of,
    walked,
)
from support import (
    aligned,
    generator,
    logits,
    open_stock,
    tree,
)

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
