"""Planning by several processes: each plans some of the layers, unless layers compete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from safetensors.torch import save

from moeprune.core.method import Context, LayerView, Method
from moeprune.core.plan import LayerPlan
from moeprune.core.plan_json import layer_to_json, layer_vectors
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError
from moeprune.files import json_bytes, sha256_bytes
from moeprune.models.ranks import Ranks, dealt
from moeprune.pipeline.views import Views


def plan_together(
    method: Method, views: Views, context: Context, ranks: Ranks
) -> dict[int, LayerPlan]:
    """``method.plan_model`` on all layers, the same in every process. All call it.

    Where layers compete, rank 0 decides and the others wait.

    Raises:
        MoepruneError: what the method raises; or it keeps matrices, which stay where they are made.
    """
    if ranks.size == 1:
        return method.plan_model(views, context)
    context = replace(context, store=_refuse_to_store)
    if method.competes:
        found: tuple[dict[int, LayerPlan], list[str]] | None = None
        if ranks.first:
            said: list[str] = []
            found = method.plan_model(views, replace(context, warn=said.append)), said
        layers, said = ranks.broadcast(found)
        _repeat(said, context.warn)
        return layers
    own = _own(views, ranks)
    parts = [_planned(method, view, context) for view in views.only(own)]
    everybody = sorted((part for some in ranks.gather(parts) for part in some), key=_layer)
    for _, warnings in everybody:
        _repeat(warnings, context.warn)
    return {layer.layer: layer for layer, _ in everybody}


def _planned(method: Method, view: LayerView, context: Context) -> tuple[LayerPlan, list[str]]:
    said: list[str] = []
    return method.plan_layer(view, replace(context, warn=said.append)), said


def _layer(part: tuple[LayerPlan, list[str]]) -> int:
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
