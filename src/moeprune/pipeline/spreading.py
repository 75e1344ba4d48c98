"""Planning by several processes: each plans some of the layers, unless layers compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from safetensors.torch import save

from moeprune.core.method import Context, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.plan_json import layer_to_json, layer_vectors
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError
from moeprune.files import json_bytes, sha256_bytes
from moeprune.models.ranks import Ranks, dealt
from moeprune.pipeline.kept_plan import Decision, KeptLayers
from moeprune.pipeline.views import Views


def plan_together(
    method: Method,
    views: Views,
    context: Context,
    ranks: Ranks,
    kept: KeptLayers | None = None,
) -> dict[int, LayerPlan]:
    """``method.plan_model`` on all layers, the same in every process. All call it.

    Where layers compete, rank 0 decides and the others wait. Where they do not, ``kept`` is where
    this process finds what it decided before an interruption, and keeps what it decides now.

    Raises:
        MoepruneError: what the method raises; or it keeps matrices, which stay where they are made.
    """
    if ranks.size > 1:
        context = replace(context, store=_refuse_to_store)
    if method.competes:
        found: tuple[dict[int, LayerPlan], list[str]] | None = None
        if ranks.first:
            said: list[str] = []
            found = method.plan_model(views, replace(context, warn=said.append)), said
        layers, said = ranks.broadcast(found)
        _repeat(said, context.warn)
        return layers
    own = views.only(_own(views, ranks))
    parts = ranks.gather(_one_by_one(method, own, context, kept))
    everybody = sorted((part for some in parts for part in some), key=_layer)
    for _, warnings in everybody:
        _repeat(warnings, context.warn)
    return {layer.layer: layer for layer, _ in everybody}


def _one_by_one(
    method: Method, views: Views, context: Context, kept: KeptLayers | None
) -> list[Decision]:
    """``Method.plan_model``, each layer kept when it is decided."""
    indices = [shape.layer for shape in views.shapes]
    known = {} if kept is None else kept.found(indices)
    decided: list[Decision] = []
    for number, index in enumerate(indices):
        decision = known.get(index)
        if decision is None:
            said: list[str] = []
            listening = replace(context, warn=said.append)
            decision = method.plan_layer(views.at(index), listening), said
            if kept is not None:
                kept.save_when_due(*decision)
        decided.append(decision)
        views.told(number + 1)
    return decided


def _layer(part: Decision) -> int:
    return part[0].layer


def _repeat(said: list[str], warn: Callable[[str], None]) -> None:
    for text in said:
        warn(text)


def _own(views: Views, ranks: Ranks) -> set[int]:
    """The layers that this process plans."""
    shapes = views.shapes
    return {
        shapes[i].layer for i in dealt([_cost(shape) for shape in shapes], ranks.size)[ranks.rank]
    }


def _cost(shape: LayerShape) -> float:
    return math.prod((shape.experts, shape.hidden, shape.intermediate))


def _refuse_to_store(layer: int, matrices: Mapping[tuple[int, str], Any]) -> NoReturn:
    raise MoepruneError(
        "this method makes new matrices, which one process keeps for the plan",
        "plan in one process, without torchrun",
    )


def check_agreement(layer: LayerPlan, ranks: Ranks) -> None:
    """Raise unless all processes decided the same about a layer. All call it.

    They decide from the same statistics; machines of different kinds may round differently.

    Raises:
        MoepruneError: they did not.
    """
    if ranks.size == 1:
        return
    tensors = {name: tensor.contiguous().cpu() for name, tensor in layer_vectors(layer).items()}
    decided = sha256_bytes(json_bytes(layer_to_json(layer)) + save(tensors))
    if len({*ranks.gather(decided)}) > 1:
        raise MoepruneError(
            f"processes decide differently about layer {layer.layer}: their machines differ",
            "start them on machines of one kind",
        )
