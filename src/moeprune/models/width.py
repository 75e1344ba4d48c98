"""The width of all experts in config.json: which key holds it is proved, never guessed.

A key is taken if the model that transformers builds from the changed configuration differs from the
model before in the experts' matrices only, and those have the new width.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from moeprune.core.plan import LayerPlan, Plan
from moeprune.errors import MoepruneError, PlanError, UnsupportedModelError
from moeprune.models.loading import LayeredModel, find_layers, skeleton
from moeprune.models.sites import find_sites

_NEVER = ("hidden_size", "vocab_size", "num_hidden_layers", "max_position_embeddings")
"""Keys that hold no width of an expert, whatever their value."""

_Path = tuple[str, ...]


def new_width(model: LayeredModel, layers: Mapping[int, LayerPlan]) -> int | None:
    """The width to which a plan narrows all experts; None if it leaves it as it is.

    Raises:
        PlanError: layers would have experts of different widths.
    """
    before = {index: site.shape.intermediate for index, site in model.sites.items()}
    after = {i: layers[i].width(n) if i in layers else n for i, n in before.items()}
    if before == after:
        return None
    if len(set(after.values())) > 1:
        least, most = (pick(after, key=lambda i: (after[i], i)) for pick in (min, max))
        raise PlanError(
            f"the plan gives experts {after[least]} neurons in layer {least} and {after[most]} in "
            f"layer {most}; config.json knows one width",
            "narrow the experts of all layers alike",
        )
    return next(iter(after.values()))


def set_width(model: LayeredModel, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """``config`` with the width to which ``plan`` narrows all experts.

    Raises:
        PlanError: layers would have experts of different widths.
        UnsupportedModelError: no key of config.json changes the width of the experts alone.
    """
    width = new_width(model, plan.layers)
    if width is None:
        return config
    changes = _proved(model, width)
    config = copy.deepcopy(config)
    for path, value in changes.items():
        _put(config, path, value)
    return config


def _proved(model: LayeredModel, width: int) -> dict[_Path, int]:
    """What to change in config.json so that experts have another width and nothing else changes."""
    raw = model.checkpoint.config
    old = next(iter(model.sites.values())).shape.intermediate
    numbers = {path: value for path, value in _numbers(raw) if path[-1] not in _NEVER}
    keys = [path for path, value in numbers.items() if value == old]
    shared = [path for path in numbers if "shared" in path[-1] and numbers[path] > 0]
    whole = [p for p in shared if p not in keys and numbers[p] * old % width == 0]
    others: list[str] = []
    for extra, path in product([None, *whole], keys):
        # shared experts may be a multiple of the routed ones' width: more of them are as wide
        change = {path: width} | ({extra: numbers[extra] * old // width} if extra else {})
        wrong = _changed_elsewhere(model, change, width)
        if wrong is not None and not wrong:
            return change
        others += wrong or []
    if others:
        raise UnsupportedModelError(
            f"the key of config.json that holds the width of the experts also sizes {others[0]}",
            _other_widths(model, numbers, shared, old),
        )
    raise UnsupportedModelError(f"config.json does not hold the width of the experts, {old}")


def _other_widths(
    model: LayeredModel, numbers: Mapping[_Path, int], shared: list[_Path], old: int
) -> str:
    for path in shared:
        fits = [w for w in range(1, old) if numbers[path] * old % w == 0]
        change = {p: fits[-1] for p in numbers if numbers[p] == old} if fits else {}
        for key, width in change.items():
            both = {key: width, path: numbers[path] * old // width}
            if _changed_elsewhere(model, both, width) == []:
                return f"take a width that divides {numbers[path] * old}: " + ", ".join(
                    str(w) for w in fits[-4:]
                )
    return "take a method that deletes experts or zeroes weights"


def _changed_elsewhere(
    model: LayeredModel, change: Mapping[_Path, int], width: int
) -> list[str] | None:
    """Tensors other than the experts' that ``change`` gives another shape; None if it does not
    give the experts the new width, or no model."""
    raw = copy.deepcopy(dict(model.checkpoint.config))
    for path, value in change.items():
        _put(raw, path, value)
    try:
        with tempfile.TemporaryDirectory() as folder:  # a file may spell what JSON cannot
            (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
            config = type(model.config).from_pretrained(folder)
        new = skeleton(model.checkpoint, config, model.dtype)
        sites = find_sites(new, find_layers(new)[0])
    except MoepruneError:
        return None
    except Exception:  # whatever a configuration class makes of a number it did not expect
        return None
    if {i: site.shape.intermediate for i, site in sites.items()} != dict.fromkeys(
        model.sites, width
    ):
        return None
    experts = tuple(f"{site.experts_name}." for site in sites.values())
    before, after = (
        {name: tuple(t.shape) for name, t in [*m.named_parameters(), *m.named_buffers()]}
        for m in (model.model, new)
    )
    names = before.keys() | after.keys()
    return sorted(
        name
        for name in names
        if before.get(name) != after.get(name) and not name.startswith(experts)
    )


def _numbers(part: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, int]]:
    for key, value in sorted(part.items()):
        if isinstance(value, Mapping) and key not in ("per_layer_config", "vision_config"):
            yield from _numbers(value, (*path, key))
        elif isinstance(value, int) and not isinstance(value, bool):
            yield (*path, key), value


def _put(config: dict[str, Any], path: _Path, value: int) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value
