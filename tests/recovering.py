"""Tiny teachers with the embedded tokenizer, and students of every kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from moeprune.core.edits import MaskEdit
from moeprune.core.merging import Groups, merged_plan
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.models.loading import LayeredModel
from moeprune.models.surgery import apply_plan
from support import generator, plan_for, some_experts, without


def with_tokenizer(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_path() / name, directory / name)
    return directory


def _masked(shape: LayerShape) -> LayerPlan:
    return LayerPlan(
        shape.layer, shape.experts, tuple(range(shape.experts)), mask=MaskEdit(0.5, None)
    )


def _dropped(shape: LayerShape) -> LayerPlan:
    return LayerPlan(shape.layer, shape.experts, some_experts(shape, 5))


def _uneven(shape: LayerShape) -> LayerPlan:
    return LayerPlan(shape.layer, shape.experts, some_experts(shape, 4 + shape.layer % 3))


def _novices(shape: LayerShape) -> LayerPlan:
    keep = some_experts(shape, 4)
    replaced = without(shape, keep)
    noise = generator(shape.layer)
    vectors = 0.1 * torch.randn(len(replaced), shape.hidden, generator=noise)
    return LayerPlan(shape.layer, shape.experts, keep, replaced, novices_NH=vectors)


def _merged(shape: LayerShape) -> LayerPlan:
    cores = some_experts(shape, 5)
    core_of = [e if e in cores else cores[e % 2] for e in range(shape.experts)]
    use_E = torch.rand(shape.experts, generator=generator(shape.layer))
    order = {e: torch.arange(shape.intermediate) for e in range(shape.experts)}
    return merged_plan(shape, Groups.weighted(core_of, use_E), order, "slice", {})


KINDS: dict[str, Callable[[LayerShape], LayerPlan]] = {
    "masked": _masked, "dropped": _dropped, "uneven": _uneven, "novices": _novices,
    "merged": _merged,
}  # fmt: skip


def prune(teacher: Path, kind: str, out: Path) -> Path:
    """One of ``KINDS``."""
    checkpoint = Checkpoint.open(teacher)
    shapes = [site.shape for site in LayeredModel(checkpoint).sites.values()]
    apply_plan(checkpoint, plan_for(checkpoint, [KINDS[kind](s) for s in shapes]), out)
    return out
