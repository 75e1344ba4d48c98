"""Plans that rebuild experts, one of each kind, for any model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moeprune.core.edits import MaskEdit, Neurons
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.shapes import LayerShape
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.plan_weights import WeightsFolder
from support import generator, plan_for, some_experts, without

Make = Callable[[LayerShape], LayerPlan]


def whole(shape: LayerShape) -> LayerPlan:
    return LayerPlan(shape.layer, shape.experts, tuple(range(shape.experts)))


def deleting(shape: LayerShape) -> LayerPlan:
    gone = some_experts(shape, 1 if shape.groups > 1 else 2, seed=1)
    return LayerPlan(shape.layer, shape.experts, without(shape, gone))


def merging(shape: LayerShape) -> LayerPlan:
    """Every deleted expert is merged into the first kept one of its group, neurons shifted by 1."""
    layer = deleting(shape)
    entries, factors = [], []
    router_CE = torch.zeros(len(layer.keep), shape.experts)
    for position, expert in enumerate(layer.keep):
        group = [e for e in layer.dropped if shape.group_of(e) == shape.group_of(expert)]
        first = next(e for e in layer.keep if shape.group_of(e) == shape.group_of(expert))
        sources = [expert, *(group if expert == first else ())]
        for source in sources:
            router_CE[position, source] = 1 / len(sources)
            for neuron in range(shape.intermediate):
                shifted = (neuron + (source != expert)) % shape.intermediate
                entries.append((position, neuron, source, shifted))
                factors.append([1 / len(sources)] * 3)
    neurons = Neurons(
        shape.intermediate, torch.tensor(entries, dtype=torch.int32), torch.tensor(factors)
    )
    return replace(layer, neurons=neurons, router_CE=router_CE)


def chosen(shape: LayerShape, keep: tuple[int, ...], width: int) -> Tensor:
    random = generator(3, shape.layer)
    return torch.stack(
        [torch.randperm(shape.intermediate, generator=random)[:width].sort().values for _ in keep]
    )


def narrowing(shape: LayerShape) -> LayerPlan:
    layer = whole(shape)
    width = shape.intermediate // 2
    return replace(layer, neurons=Neurons.of_rows(chosen(shape, layer.keep, width), layer.keep))


def cutting(shape: LayerShape) -> LayerPlan:
    ranks = {role: tuple(3 + e for e in range(shape.experts)) for role in shape.roles}
    return replace(deleting(shape), ranks=ranks)


def masking(shape: LayerShape) -> LayerPlan:
    return replace(deleting(shape), mask=MaskEdit(0.5, None, shape.roles))


def storing(shape: LayerShape) -> LayerPlan:
    layer, random = whole(shape), generator(5, shape.layer)
    sizes = {"down": (shape.hidden, shape.intermediate)}
    made = {
        (e, role): 0.1
        * torch.randn(sizes.get(role, (shape.intermediate, shape.hidden)), generator=random)
        for e in layer.keep
        for role in shape.roles
    }
    return replace(layer, stored=WeightsFolder(torch.float32).store(shape.layer, made))


def answering(shape: LayerShape) -> LayerPlan:
    """Kept experts answer for deleted ones, in turn."""
    layer = deleting(shape)
    served = [e if e in layer.keep else layer.keep[e % len(layer.keep)] for e in range(8)]
    return replace(layer, served_by=tuple(served))


def offset(shape: LayerShape) -> LayerPlan:
    layer, random = deleting(shape), generator(9, shape.layer)
    return replace(
        layer, offsets_CH=0.3 * torch.randn(len(layer.keep), shape.hidden, generator=random)
    )


def answering_with_offsets(shape: LayerShape) -> LayerPlan:
    layer, width = answering(shape), shape.intermediate // 2
    neurons = Neurons.of_rows(chosen(shape, layer.keep, width), layer.keep)
    return replace(layer, offsets_CH=offset(shape).offsets_CH, neurons=neurons)


KINDS: dict[str, Make] = {
    "answer": answering,
    "offsets": offset,
    "answer-offsets-narrow": answering_with_offsets,
    "delete": deleting,
    "merge": merging,
    "narrow": narrowing,
    "ranks": cutting,
    "mask": masking,
    "stored": storing,
}


def plan_of(directory: Path, make: Make) -> tuple[Checkpoint, Plan]:
    checkpoint = Checkpoint.open(directory)
    sites = LayeredModel(checkpoint).sites
    return checkpoint, plan_for(checkpoint, [make(site.shape) for site in sites.values()])
