"""What an edit may do to a quantised checkpoint without quantising anything again.

Bytes of values and scales can be left out and given other names; they cannot be changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moeprune.core.plan import Plan
from moeprune.errors import UnsupportedModelError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import DiskTensor
from moeprune.models.quantised import Quantisation, Quantised
from moeprune.models.sites import MoESite

_EXPERT_MODULE = re.compile(r"(?P<head>.*experts\.)(?P<expert>\d+)(?P<tail>(\..*)?)")
_QUANTIFIER = re.compile(r"\[0-9\]|\{[\d,]*\}")
_NAMES_IDS = re.compile(r"(?<!shared_)experts.*?(?<!\w)\d+(?!\w)")
_WAY_OUT = "add --dequantize to write bf16, or take a method that only deletes experts"


def refuse_changes(plan: Plan, layout: Mapping[str, DiskTensor], how: Quantisation) -> None:
    """Raise ``UnsupportedModelError`` if ``plan`` needs other bytes than are stored."""
    for tensor in layout.values():
        layer, part = plan.layers.get(tensor.layer), tensor.quantised
        if layer is None or part is None:
            continue
        if layer.replaced:
            raise _needs_other_values("replaces experts by constants", part)
        if set(tensor.role.split("_")) & set(layer.changed_roles):
            raise _needs_other_values(
                "rebuilds experts" if layer.rebuilds else "zeroes weights", part
            )
        if layer.router_CE is not None and tensor.role == "router":
            raise _needs_other_values("mixes router rows", part)
        if layer.unroutes and tensor.role == "router" and len(part.shape) == 2:
            assert part.block is not None
            if part.block[0] < part.shape[0]:
                raise UnsupportedModelError(
                    f"{part.stored} is a router stored as {part.dtype}: its rows can go, but "
                    f"{part.block[0]} of them share a scale in {part.scale}",
                    "add --dequantize to write bf16",
                )


def refuse_method(checkpoint: Checkpoint, changes: str | None, dequantize: bool) -> None:
    """Raise ``UnsupportedModelError`` before a long run whose result could not be written.

    ``changes`` is what the method does to values, as a verb phrase; None if it only deletes.
    """
    how = Quantisation.of(checkpoint)
    how.refuse()
    if dequantize:
        refuse_dequantize(checkpoint, how)
    elif changes is not None and how.parts:
        raise _needs_other_values(changes, next(iter(how.parts.values())))


def refuse_dequantize(checkpoint: Checkpoint, how: Quantisation) -> None:
    """Raise ``UnsupportedModelError`` if there is nothing to dequantise."""
    if not how.parts:
        raise UnsupportedModelError(f"{checkpoint.path} is not quantised", "leave out --dequantize")


def _needs_other_values(what: str, part: Quantised) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"this {what}, but {part.stored} is stored as {part.dtype} with scales in {part.scale}, "
        "and nothing is quantised again",
        _WAY_OUT,
    )


def kept_by_module(
    sites: Mapping[int, MoESite], layout: Mapping[str, DiskTensor], plan: Plan
) -> dict[str, tuple[int, ...]]:
    """Who stays in every layer that loses experts, by each name of its experts module and a dot.

    Vendors list modules under the names on disk, transformers under those in memory.
    """
    names = {(site.experts_name + ".", index) for index, site in sites.items()}
    for tensor in layout.values():
        if tensor.role != "router":
            fused = tensor.key.rpartition(".")[0] + "."
            names.add((fused if tensor.expert is None else tensor.experts_prefix, tensor.layer))
    losing = {index: layer.keep for index, layer in plan.layers.items() if layer.unroutes}
    return {name: losing[index] for name, index in names if index in losing}


def renumbered(described: Any, kept: Mapping[str, Sequence[int]]) -> Any:
    """``described`` in which modules of experts have the numbers they have after an edit.

    Args:
        described: a ``quantization_config``, or any part of one.
        kept: see ``kept_by_module``.

    Raises:
        UnsupportedModelError: a pattern picks experts by number, in no single layer that we know.
    """
    if isinstance(described, dict):
        return {key: renumbered(value, kept) for key, value in described.items()}
    if not isinstance(described, list):
        return described
    found = [
        _renamed(entry, kept) if isinstance(entry, str) else renumbered(entry, kept)
        for entry in described
    ]
    return [entry for entry in found if entry is not None]


def _renamed(entry: str, kept: Mapping[str, Sequence[int]]) -> str | None:
    """The new name of a module; None if it is gone."""
    if not _NAMES_IDS.search(_QUANTIFIER.sub("", entry)):
        return entry
    match = _EXPERT_MODULE.fullmatch(entry)
    if match is None or match["head"] not in kept:
        raise UnsupportedModelError(
            f"quantization_config in config.json names experts by number: {entry!r}",
            "list their modules one by one with full names, or add --dequantize",
        )
    expert = int(match["expert"])
    if expert not in kept[match["head"]]:
        return None
    return f"{match['head']}{kept[match['head']].index(expert)}{match['tail']}"
