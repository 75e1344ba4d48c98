"""Checkpoints that stock classes cannot express, for ``prepare.py``: made from plans by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import moeprune

sys.path.insert(0, str(Path(__file__).parent.parent))

from edit_kinds import answering, offset
from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from support import generator, plan_for, some_experts, without

RANK = 4


def novices(shape: LayerShape) -> LayerPlan:
    """Other experts, and another number of them, become constants in every layer."""
    gone = some_experts(shape, (3 if shape.layer % 2 else 4) // shape.groups, seed=shape.layer)
    value_NH = 0.3 * torch.randn(len(gone), shape.hidden, generator=generator(11, shape.layer))
    return LayerPlan(
        shape.layer, shape.experts, without(shape, gone), replaced=gone, novices_NH=value_NH
    )


def maps(shape: LayerShape) -> LayerPlan:
    """Novices that are maps of low rank."""
    layer = novices(shape)
    size = (len(layer.replaced), (1 + 2 * RANK) * shape.hidden)
    value_NW = 0.1 * torch.randn(size, generator=generator(12, shape.layer))
    return replace(layer, novices_NH=value_NW)


def uneven(shape: LayerShape) -> LayerPlan:
    """Other experts, and another number of them, go in every layer; all stay in every fourth."""
    number = (2, 3, 4, 0)[shape.layer % 4] // shape.groups
    gone = some_experts(shape, number, seed=shape.layer)
    return LayerPlan(shape.layer, shape.experts, without(shape, gone))


def answers(shape: LayerShape) -> LayerPlan:
    """Kept experts answer for others, and add constants."""
    return replace(answering(shape), offsets_CH=offset(shape).offsets_CH)


SPECIAL: dict[str, Callable[[LayerShape], LayerPlan]] = {
    "novices": novices,
    "maps": maps,
    "uneven": uneven,
    "answers": answers,
}


def write_special(original: Path, kind: str, out: Path) -> Path:
    """Apply a plan of that kind to a checkpoint with eight experts per layer."""
    checkpoint = Checkpoint.open(original)
    sites = LayeredModel(checkpoint).sites
    layers = [SPECIAL[kind](site.shape) for site in sites.values()]
    moeprune.apply(original, plan_for(checkpoint, layers), out)
    return out
