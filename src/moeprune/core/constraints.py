"""Experts whose fate is decided beforehand: pinned, forbidden and protected ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moeprune.core.plan import LayerPlan
from moeprune.core.shapes import LayerShape
from moeprune.errors import MoepruneError

Fixed = Mapping[int, frozenset[int]]
"""Experts by layer."""

_ENTRY = re.compile(r"(\*|[0-9]{1,6}):([0-9]{1,6}(?:,[0-9]{1,6})*)")


@dataclass(frozen=True)
class Constraints:
    """What a user wants of certain experts, whatever their scores.

    Attributes:
        pin: experts that must stay, each ``LAYER:IDS``, for example ``3:5,7``; ``*`` for the
            layer means all MoE layers. A method that merges may still add to their weights.
        forbid: experts that must not stay, written alike.
        protect_super: pin the super experts (``core.ops.super_experts``) as well.
    """

    pin: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    protect_super: bool = False

    def __bool__(self) -> bool:
        return bool(self.pin or self.forbid or self.protect_super)

    def resolve(self, shapes: Mapping[int, LayerShape]) -> tuple[Fixed, Fixed]:
        """Pinned and forbidden experts by layer, without the protected ones.

        Raises:
            MoepruneError: not of that form, no such layer or expert, or one expert is both.
        """
        pinned = _experts(self.pin, "--pin", shapes)
        forbidden = _experts(self.forbid, "--forbid", shapes)
        for layer, experts in sorted(pinned.items()):
            both = sorted(experts & forbidden.get(layer, frozenset()))
            if both:
                raise MoepruneError(f"layer {layer}: expert {both[0]} is both pinned and forbidden")
        return pinned, forbidden


def _experts(
    entries: Iterable[str], option: str, shapes: Mapping[int, LayerShape]
) -> dict[int, frozenset[int]]:
    found: dict[int, frozenset[int]] = {}
    for text in entries:
        match = _ENTRY.fullmatch(text.replace(" ", ""))
        if match is None:
            raise MoepruneError(
                f"bad {option} {text!r}", "write LAYER:IDS, for example 3:5,7, or '*:0'"
            )
        layers = sorted(shapes) if match[1] == "*" else [int(match[1])]
        ids = frozenset(int(number) for number in match[2].split(","))
        for layer in layers:
            if layer not in shapes:
                raise MoepruneError(
                    f"{option} {text}: layer {layer} is no MoE layer of this model",
                    f"its MoE layers are {', '.join(map(str, sorted(shapes)))}",
                )
            if max(ids) >= shapes[layer].experts:
                raise MoepruneError(
                    f"{option} {text}: layer {layer} has experts 0..{shapes[layer].experts - 1}"
                )
            found[layer] = found.get(layer, frozenset()) | ids
    return found


def together(*parts: Fixed) -> dict[int, frozenset[int]]:
    """All experts that any of ``parts`` names."""
    return {
        layer: frozenset().union(*(part.get(layer, frozenset()) for part in parts))
        for layer in sorted({layer for part in parts for layer in part})
    }


def check_honoured(
    layers: Mapping[int, LayerPlan], pinned: Fixed, forbidden: Fixed, method: str
) -> None:
    """Raise ``MoepruneError`` if a plan drops or replaces a pinned expert or keeps a forbidden one.

    Methods from elsewhere may choose experts without regard to constraints.
    """
    for layer, plan in sorted(layers.items()):
        kept = frozenset(plan.keep)
        lost = sorted(pinned.get(layer, frozenset()) - kept)
        stayed = sorted(forbidden.get(layer, frozenset()) & kept)
        if lost or stayed:
            what = "--pin and --protect-super" if lost else "--forbid"
            expert, fate = (lost[0], "goes") if lost else (stayed[0], "stays")
            raise MoepruneError(
                f"{method} does not know {what}: expert {expert} of layer {layer} {fate}",
                "leave the option out, or choose another method",
            )


def as_json(fixed: Fixed) -> dict[str, list[int]]:
    """As it stands in a plan: ids by layer."""
    return {str(layer): sorted(experts) for layer, experts in sorted(fixed.items())}
