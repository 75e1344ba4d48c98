"""The two forms of training, the whole model or one layer after another: what is of which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moeprune.errors import MoepruneError

if TYPE_CHECKING:
    from moeprune.recovery.training import Training

TARGETS = ("local", "stream")
LAYER_TARGETS = ("student-inputs", "dense-inputs", "dense-outputs")
OBJECTIVES = ("block", "router")
LAYER_GROUPS = ("experts", "novices", "routers")

LAYERWISE: dict[str, dict[str, Any]] = {
    "expert-kd": {"train": LAYER_GROUPS, "target": "student-inputs", "clip": 0.0, "steps": 100},
    "router-kd": {"train": ("routers",), "target": "student-inputs", "clip": 0.0, "steps": 100},
}
"""The defaults layer by layer that are others than those of the whole model."""

LAYER_RATES = {"expert-kd": 0.2, "router-kd": 0.2}
"""Learning rate times width of the model, where none is given."""

_WHOLE_ONLY = (
    "ce_weight", "kl_weight", "rescale", "accumulate", "gradient_checkpointing", "save_every",
    "rank", "alpha", "dropout", "neftune", "adapter",
)  # fmt: skip


def layerwise_options(
    base: Training, preset: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """All options of a training layer by layer, from those that were given.

    Args:
        base: the defaults of the whole model; what is given as it is there says nothing.
        preset: refused.
        given: options.

    Raises:
        MoepruneError: this way has no such form, or an option is about the whole model.
    """
    how = base.how
    if how not in LAYERWISE:
        raise MoepruneError(f"{how} has no form layer by layer", f"--how {' or '.join(LAYERWISE)}")
    wrong = [
        f"--{name.replace('_', '-')}"
        for name in _WHOLE_ONLY
        if name in given and given[name] != getattr(base, name)
    ]
    if preset is not None:
        wrong.insert(0, "--preset")
    if wrong:
        raise MoepruneError(
            f"{wrong[0]} is for training the whole model at once", "leave it out, or --layerwise"
        )
    own = dict(LAYERWISE[how])
    if given.get("objective") == "router":
        own["target"] = "dense-outputs"  # on the same inputs a sliced router is right already
    return {**own, **given}


def check_form(made: Training) -> None:
    """Raise ``MoepruneError`` if target, objective or groups are unknown, or of the other form."""
    targets, others = (TARGETS, LAYER_TARGETS)[:: -1 if made.layerwise else 1]
    if made.target in others:
        form = "the whole model at once" if made.layerwise else "layer by layer"
        hint = ", ".join(targets) if made.layerwise else "add --layerwise"
        raise MoepruneError(f"--target {made.target} is for training {form}", hint)
    if made.target not in targets:
        raise MoepruneError(f"unknown --target {made.target!r}", ", ".join(targets))
    if made.objective not in OBJECTIVES:
        raise MoepruneError(f"unknown --objective {made.objective!r}", ", ".join(OBJECTIVES))
    if not made.layerwise:
        if made.objective != "block":
            raise MoepruneError("--objective is for training layer by layer", "add --layerwise")
        return
    groups = ("routers",) if made.objective == "router" else LAYER_GROUPS
    wrong = [group for group in made.train if group not in groups]
    if wrong:
        raise MoepruneError(
            f"layer by layer, --objective {made.objective} cannot train {', '.join(wrong)}",
            f"--train {','.join(groups)}",
        )
