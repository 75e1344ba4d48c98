"""What can be done with a model, and why the rest cannot: told before anything is planned."""

from __future__ import annotations

from dataclasses import dataclass

from moeprune.errors import MoepruneError
from moeprune.models import quirks
from moeprune.models.attached import KEEP_PRUNED, find_attached
from moeprune.models.layout import expert_layout, refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.sites import is_uneven

YES = "yes"


@dataclass(frozen=True)
class Abilities:
    """What can be done with one model.

    Attributes:
        can: ``yes``, possibly with what it takes, or the reason why not, by kind of edit.
        heads: beginnings of the names of attached prediction layers.
        reason: why no edit of experts is possible; None if some is.
    """

    can: dict[str, str]
    heads: tuple[str, ...]
    reason: str | None


def abilities(model: LayeredModel, weights: bool = True) -> Abilities:
    """What can be done with ``model``.

    Args:
        model: its skeleton.
        weights: whether the names of its tensors are known; otherwise only the configuration is.
    """
    heads: tuple[str, ...] = ()
    try:
        refuse(model)
        if weights:
            attached = find_attached(model, expert_layout(model), KEEP_PRUNED, False)
            heads = tuple(sorted(attached.heads))
    except MoepruneError as error:
        kinds = ("delete experts", "replace by constants", "mask weights")
        return Abilities(dict.fromkeys(kinds, f"no: {error.problem}"), (), error.problem)
    kind = text_config(model.config).model_type
    values = YES if model.quantisation.method is None else f"{YES}, with --dequantize"
    uneven = f"{YES}; opens with trust_remote_code or moeprune"
    if kind in quirks.UNEVEN_REFUSED:
        uneven = f"no: {quirks.UNEVEN_REFUSED[kind]}"
    elif kind in quirks.PADDABLE:
        uneven += ", in stock classes with --pad"
    novices = values
    if kind in quirks.NOVICES_REFUSED:
        novices = f"no: {quirks.NOVICES_REFUSED[kind]}"
    elif is_uneven(model.config):
        novices = "no: its layers hold different numbers of experts"
    elif novices == YES:
        novices = f"{YES}; opens with trust_remote_code or moeprune"
    can = {
        "delete experts": f"{YES}; opens in stock classes",
        "other counts per layer": uneven,
        "replace by constants": novices,
        "mask weights": values,
    }
    return Abilities(can, heads, None)
