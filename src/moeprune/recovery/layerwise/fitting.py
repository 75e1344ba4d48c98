"""Training of one layer on what its block is to give."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.errors import MoepruneError
from moeprune.recovery.groups import Zeros
from moeprune.recovery.layerwise.lesson import Lesson
from moeprune.recovery.training import Training

_NOTHING_LOST = 1e-7
"""A relative squared error that rounding alone makes."""


@dataclass
class Fit:
    """How the training of one layer went.

    Attributes:
        layer: its index.
        before, after: relative error on held-out tokens (see ``Lesson``); None without them.
        best_step: of the weights that were kept; 0 are those that the layer had.
        steps: done.
        ended: why it ended.
        norms: norm of the first gradient, by group of parameters.
        seconds: of training.
        entries: what the log says of single steps.
    """

    layer: int
    before: float | None = None
    after: float | None = None
    best_step: int = 0
    steps: int = 0
    ended: str = ""
    norms: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    entries: list[dict[str, Any]] = field(default_factory=list)


class _Order:
    """Rows in a random order, again and again, a function of the seed."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._epoch, self._order = -1, torch.empty(0)

    def part(self, start: int, count: int) -> Tensor:
        found = []
        while count:
            epoch, place = divmod(start, self._rows)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
                self._epoch, self._order = epoch, torch.randperm(self._rows, generator=generator)
            found.append(self._order[place : place + count])
            start, count = start + len(found[-1]), count - len(found[-1])
        return torch.cat(found)


def fit(
    lesson: Lesson,
    layer: int,
    weights: Mapping[str, nn.Parameter],
    groups: Mapping[str, str],
    zeros: Zeros,
    made: Training,
    rows: int,
    tell: Callable[[int, float, float | None], None],
) -> Fit:
    """Train ``weights``; afterwards they are the best ones, by the error on held-out tokens.

    Args:
        lesson: what the block is to give.
        layer: the layer's index.
        weights: by name; float32, and their own memory.
        groups: of the weights.
        zeros: what has to stay zero.
        made: steps, rate, patience and seed.
        rows: tokens per step.
        tell: told the step, its loss and the last held-out error.

    Raises:
        MoepruneError: a loss or gradient is not finite.
    """
    began = time.perf_counter()
    found = Fit(layer, before=lesson.held_out())
    found.after = found.before
    if found.before is not None and found.before <= _NOTHING_LOST:
        found.ended = "nothing was lost"
        return found
    peak = made.peak(int(lesson.tap.x_TH.shape[-1]))
    optimiser = torch.optim.AdamW(
        list(weights.values()), lr=peak, betas=(0.9, 0.95), weight_decay=made.weight_decay
    )
    order = _Order(lesson.split, made.seed * 10_007 + layer)
    best = {name: p.detach().clone() for name, p in weights.items()}
    waited = 0
    while found.steps < made.steps and not found.ended:
        optimiser.param_groups[0]["lr"] = made.rate(peak, found.steps)
        loss = _step(
            lesson, order.part(found.steps * rows, rows), weights, groups, zeros, made, found
        )
        optimiser.step()
        optimiser.zero_grad()
        zeros.weights()
        found.steps += 1
        entry: dict[str, Any] = {"layer": layer, "step": found.steps, "loss": loss}
        if found.steps % made.between_evaluations == 0 or found.steps == made.steps:
            held = lesson.held_out()
            if held is not None:
                entry["held"] = _finite(held, layer, found.steps)
                waited += 1
                assert found.after is not None
                if held < found.after:
                    waited, found.after, found.best_step = 0, held, found.steps
                    best = {name: p.detach().clone() for name, p in weights.items()}
                if made.patience and waited >= made.patience:
                    found.ended = f"no improvement in {waited} evaluations"
        found.entries.append(entry)
        tell(found.steps, loss, found.after)
    found.ended = found.ended or "all steps done"
    if found.before is None:
        found.best_step = found.steps
    else:
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(best[name])
    found.seconds = time.perf_counter() - began
    return found


def _step(
    lesson: Lesson,
    rows_n: Tensor,
    weights: Mapping[str, nn.Parameter],
    groups: Mapping[str, str],
    zeros: Zeros,
    made: Training,
    found: Fit,
) -> float:
    """Gradients of one step, with those of zeros put out; returns the relative error."""
    error = lesson.error(rows_n) / (len(rows_n) * (lesson.scale or 1.0))
    loss = _finite(float(error.detach()), found.layer, found.steps + 1)
    error.backward()
    zeros.gradients()
    if not found.norms:
        for name, p in weights.items():
            own = 0.0 if p.grad is None else float(p.grad.double().square().sum())
            found.norms[groups[name]] = found.norms.get(groups[name], 0.0) + own
        found.norms = {group: math.sqrt(value) for group, value in found.norms.items()}
    norm = nn.utils.clip_grad_norm_(list(weights.values()), made.clip or math.inf)
    _finite(float(norm), found.layer, found.steps + 1)
    return loss


def _finite(value: float, layer: int, step: int) -> float:
    if not math.isfinite(value):
        raise MoepruneError(
            f"the loss or its gradient is not finite in layer {layer} at step {step}; layers that "
            "were done before are kept",
            "try a smaller --learning-rate or --dtype float32, with --force to begin again",
        )
    return value
