"""Tiny quantised checkpoints, edits of them, and what transformers makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

import quantise
from families import token_ids
from moeprune.core.plan import LayerPlan, MaskEdit, Plan
from moeprune.core.shapes import LayerShape
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import apply_plan
from moeprune.models.walk import Batch, Walk
from support import (
    generator,
    plan_for,
    some_experts,
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
