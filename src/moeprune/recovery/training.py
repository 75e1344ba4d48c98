"""What is trained, on what loss, for how long: one immutable description of a recovery."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from moeprune.errors import MoepruneError, nearest
from moeprune.recovery.forms import LAYER_RATES, check_form, layerwise_options

GROUPS = ("experts", "novices", "routers", "embeddings", "rest")
"""Groups of parameters: ``rest`` is attention, norms, shared experts and dense layers."""

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Training:
    """How a student is trained.

    The loss of a step is ``ce_weight * CE + kl_weight * KL(teacher || student) + lambda * S``:
    CE is the next-token cross-entropy; S, only with ``expert-kd``, is the sum over layers and
    experts of the mean squared difference of paired experts' outputs (arXiv 2410.12013, eq. 10).

    Attributes:
        how: ``expert-kd``, ``router-kd``, ``logit-kd``, ``lora`` or ``full``.
        train: groups of parameters that train; of those that the student does not have, nothing.
        ce_weight, kl_weight: see above.
        target: ``local`` runs the teacher's expert on the student's own input; ``stream`` runs the
            teacher's own forward and compares tokens that both models send to the expert.
            Layer by layer: ``student-inputs``, ``dense-inputs`` or ``dense-outputs``, see
            docs/recover.md.
        layerwise: train one decoder layer after another on the outputs of the teacher's MoE
            block; ``steps``, ``patience`` and ``holdout`` are then those of a layer.
        objective: layer by layer, whether outputs of the ``block`` are learnt, or probabilities of
            the ``router``.
        rescale: estimate lambda at every step, not at the first alone.
        steps: optimiser steps.
        batch: sequences per step, over all processes and accumulated parts.
        accumulate: parts that a batch is cut into; the gradients are the mean of the parts'.
        learning_rate: the highest; linear warm-up, then cosine to a tenth of it. 0 takes the one of
            ``RATES`` for the width of the model: wider models want a smaller one.
        warmup: the fraction of the steps that warm up.
        weight_decay, clip: of AdamW, and of the norm of the gradient (0 does not clip).
        dtype: to compute in; trained weights and the optimiser are float32 always.
        gradient_checkpointing: recompute activations in the backward pass.
        evaluate_every, save_every: steps; 0 leaves the choice to ``steps``.
        patience: evaluations without improvement after which the run ends; 0 never.
        holdout: the fraction of the sequences that is measured and never trained on.
        seed: of the order of sequences, of dropout and noise.
        rank, alpha, dropout, neftune: of LoRA; ``dropout`` acts on linear layers alone.
        adapter: save the LoRA matrices, not a merged checkpoint.
    """

    how: str
    train: tuple[str, ...]
    ce_weight: float = 1.0
    kl_weight: float = 0.0
    target: str = "local"
    rescale: bool = False
    steps: int = 200
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 0.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    evaluate_every: int = 0
    save_every: int = 0
    patience: int = 5
    holdout: float = 0.05
    seed: int = 0
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    neftune: float = 0.0
    adapter: bool = False
    layerwise: bool = False
    objective: str = "block"

    def __post_init__(self) -> None:
        for group in self.train:
            if group not in GROUPS:
                raise MoepruneError(
                    f"unknown group of parameters {group!r}", nearest(group, GROUPS)
                )
        check_form(self)
        if self.dtype not in DTYPES:
            raise MoepruneError(f"cannot train in {self.dtype!r}", ", ".join(DTYPES))
        for name in ("steps", "batch", "accumulate", "rank"):
            if getattr(self, name) < 1:
                raise MoepruneError(f"{_option(name)} must be at least 1")
        for name in ("evaluate_every", "save_every", "patience"):
            if getattr(self, name) < 0:
                raise MoepruneError(f"{_option(name)} must be at least 0")
        for name, low, high in (
            ("learning_rate", 0.0, 10.0), ("warmup", 0.0, 1.0), ("dropout", 0.0, 0.99),
            ("holdout", 0.0, 0.9), ("weight_decay", 0.0, 10.0), ("clip", 0.0, 1e9),
            ("ce_weight", 0.0, 1e9), ("kl_weight", 0.0, 1e9), ("neftune", 0.0, 1e9),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise MoepruneError(f"{_option(name)} must be between {low:g} and {high:g}")
        if not self.ce_weight and not self.kl_weight and self.how != "expert-kd":
            raise MoepruneError("--ce-weight and --kl-weight are both 0: there is no loss")
        if self.batch % self.accumulate:
            raise MoepruneError(f"--batch {self.batch} cannot be cut into {self.accumulate} parts")

    @property
    def between_evaluations(self) -> int:
        """Steps from one evaluation to the next."""
        return self.evaluate_every or max(1, self.steps // 10)

    @property
    def between_saves(self) -> int:
        """Steps from one saved state to the next."""
        return self.save_every or max(1, self.steps // 10)

    def peak(self, hidden: int) -> float:
        """The highest learning rate, for a model of that width."""
        rates = LAYER_RATES if self.layerwise else RATES
        return self.learning_rate or rates[self.how] / hidden

    def rate(self, peak: float, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = max(1, round(self.steps * self.warmup))
        if step < warm:
            return peak * (step + 1) / warm
        part = (step - warm) / max(1, self.steps - warm)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part)))

    def to_json(self) -> dict[str, Any]:
        """All options."""
        return {**asdict(self), "train": list(self.train)}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


TRAININGS: dict[str, Training] = {
    # KL, the cross-entropy against the teacher's probabilities, is far less noisy than text
    "expert-kd": Training("expert-kd", ("experts",), ce_weight=0.0, kl_weight=1.0),
    "router-kd": Training("router-kd", ("routers",), ce_weight=0.0, kl_weight=1.0),
    "logit-kd": Training("logit-kd", GROUPS, ce_weight=0.0, kl_weight=1.0),
    "lora": Training("lora", ("experts", "rest"), neftune=5.0, weight_decay=0.05, warmup=0.05),
    "full": Training("full", GROUPS),
}
"""The defaults of every way to recover."""

RATES = {"expert-kd": 0.12, "router-kd": 0.6, "logit-kd": 0.1, "lora": 0.2, "full": 0.05}
"""Learning rate times width of the model, where none is given."""

PRESETS: dict[str, dict[str, Any]] = {
    "moe-pruner": {
        "ce_weight": 1.0, "kl_weight": 0.0, "learning_rate": 2e-5, "warmup": 0.03, "batch": 16,
    },
    "moeits": {
        "rank": 64, "alpha": 16.0, "dropout": 0.1, "learning_rate": 2e-4, "warmup": 0.05,
        "weight_decay": 0.05, "neftune": 5.0, "steps": 500,
    },
}  # fmt: skip
"""Published settings: ``moe-pruner``, arXiv 2410.12013 (with what it leaves open as elsewhere),
for ``expert-kd``; ``moeits``, arXiv 2604.10603, for ``lora``."""

_PRESET_OF = {"moe-pruner": "expert-kd", "moeits": "lora"}


def training(
    how: str, preset: str | None = None, options: Mapping[str, Any] | None = None
) -> Training:
    """The training of ``how``; what ``options`` names, other than None, goes before the preset.

    Raises:
        MoepruneError: there is no such way, preset or option, or a value makes no sense.
    """
    if how not in TRAININGS:
        raise MoepruneError(f"unknown way to recover {how!r}", nearest(how, TRAININGS))
    if preset is not None and _PRESET_OF.get(preset) != how:
        known_presets = [f"--how {way} --preset {name}" for name, way in _PRESET_OF.items()]
        raise MoepruneError(f"no preset {preset!r} for {how}", "; ".join(known_presets))
    given = {name: value for name, value in (options or {}).items() if value is not None}
    known = {field.name for field in fields(Training)} - {"how"}
    for name in given:
        if name not in known:
            raise MoepruneError(f"unknown option {name!r} of recovery", nearest(name, known))
    if "train" in given:
        given["train"] = tuple(given["train"])
    if given.get("adapter") and how != "lora":
        raise MoepruneError(f"--adapter is for lora, and {how} trains the weights themselves")
    if given.get("layerwise"):
        given = layerwise_options(TRAININGS[how], preset, given)
    return replace(TRAININGS[how], **{**PRESETS.get(preset or "", {}), **given})
