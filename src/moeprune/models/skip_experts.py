"""Dynamic skipping (arXiv 2402.14800) on a loaded transformers model: a reference, not a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeprune.core.skipping import Skipping
from moeprune.errors import MoepruneError, UnsupportedModelError
from moeprune.models.loading import find_layers
from moeprune.models.native import text_config
from moeprune.models.sites import find_sites

_LEAVE_OUT = ("grouped_mm",)
"""Implementations of experts in transformers that take an id from E on for no expert, in all
families; its eager loops do in some of them."""

KEY = "expert_skipping"
"""Where config.json holds the thresholds: by layer, ``beta`` and ``renormalise``."""


@dataclass
class ExpertSkipping:
    """Skipping that is switched on; what it has skipped so far.

    Attributes:
        slots: by layer, (token, expert) pairs that the routers chose.
        skipped: by layer, how many of them were skipped.
    """

    slots: dict[int, int] = field(default_factory=dict)
    skipped: dict[int, int] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)
    _flags: list[tuple[Any, bool]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of all slots that were skipped."""
        return sum(self.skipped.values()) / max(1, sum(self.slots.values()))

    def remove(self) -> None:
        """Switch it off."""
        for handle in self._handles:
            handle.remove()
        for experts, before in self._flags:
            experts._is_expert_parallel = before
        self._handles.clear()
        self._flags.clear()


def skip_experts(
    model: nn.Module, thresholds: Mapping[int, Skipping] | None = None
) -> ExpertSkipping:
    """Let the tokens of a loaded model skip their weaker experts.

    In a layer with the threshold ``beta`` a token's second and later experts are skipped where
    their gate is below ``beta`` times its largest gate, and with ``renormalise`` the gates that are
    left are scaled to the sum that they had. A skipped slot gets the gate 0 and, where the
    implementation of the experts allows it, an id that no expert has, so that it costs nothing.

    Args:
        model: a transformers model with experts.
        thresholds: by layer; None reads what a plan has left in the model's configuration.

    Raises:
        MoepruneError: the model has no thresholds, or one for a layer without experts.
        UnsupportedModelError: its experts are not handed the choice of the router.
    """
    config: Any = model.config
    if thresholds is None:
        found = getattr(text_config(config), KEY, None) or {}
        thresholds = {int(i): Skipping.from_json(one, f"{KEY}.{i}") for i, one in found.items()}
    if not thresholds:
        raise MoepruneError(
            "this model has no thresholds for skipping experts",
            "prune it with --method naee -o skipping=true",
        )
    sites = find_sites(model, find_layers(model)[0])
    unknown = sorted(set(thresholds) - set(sites))
    if unknown:
        raise MoepruneError(f"layer {unknown[0]} has a threshold, but no experts")
    result = ExpertSkipping()
    for layer, skipping in thresholds.items():
        experts: Any = sites[layer].experts
        if not hasattr(experts, "_is_expert_parallel"):
            raise UnsupportedModelError(
                f"{type(experts).__name__} is not told what its router chose"
            )
        # otherwise the kernels leave the rows of ids from E on as they find them in memory
        result._flags.append((experts, experts._is_expert_parallel))
        experts._is_expert_parallel = True
        hook = _hook(layer, skipping, sites[layer].shape.experts, result)
        result._handles.append(experts.register_forward_pre_hook(hook))
    return result


def _hook(layer: int, skipping: Skipping, experts: int, result: ExpertSkipping) -> Any:
    def skip(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x_TH, index_TK, gate_TK = args
        left_TK, skip_TK = skipped_gates(gate_TK, skipping)
        if module.config._experts_implementation in _LEAVE_OUT:
            index_TK = index_TK.masked_fill(skip_TK, experts)
        result.slots[layer] = result.slots.get(layer, 0) + index_TK.numel()
        result.skipped[layer] = result.skipped.get(layer, 0) + int(skip_TK.sum())
        return x_TH, index_TK, left_TK

    return skip


def skipped_gates(gate_TK: Tensor, skipping: Skipping) -> tuple[Tensor, Tensor]:
    """The gates without those of skipped slots, and which slots are skipped."""
    skip_TK = gate_TK < skipping.beta * gate_TK.max(dim=1, keepdim=True).values
    left_TK = gate_TK.masked_fill(skip_TK, 0.0)
    if skipping.renormalise:
        left_TK = left_TK * (gate_TK.sum(dim=1, keepdim=True) / left_TK.sum(dim=1, keepdim=True))
    return left_TK.to(gate_TK.dtype), skip_TK
