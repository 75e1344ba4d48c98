"""What a block learns, and how far it is from it. Axes as in ``tap``; C columns of a router."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moeprune.recovery.layerwise.tap import Tap

_CHUNK = 4096


@dataclass
class Lesson:
    """A block that is to give certain outputs, or a router certain probabilities.

    The error of some rows, relative to that of an output of zero, is::

        sum_t |block(x_t) - y_t|^2 / sum_t |y_t|^2                 (outputs)
        sum_t KL(p_t || softmax(router(x_t)[columns])) / n         (probabilities)

    Attributes:
        tap: holds the inputs, and the outputs that are wanted.
        block, router: the student's.
        split: rows before it train, rows from it on measure.
        log_p_TC: wanted log-probabilities of the router; None where outputs are wanted.
        columns: the router's outputs that they are about.
        bfloat16: compute in bfloat16 where autocast does.
    """

    tap: Tap
    block: nn.Module
    router: nn.Module
    split: int
    log_p_TC: Tensor | None = None
    columns: tuple[int, ...] = ()
    bfloat16: bool = False

    def error(self, rows: Any) -> Tensor:
        """The sum over rows of the numerator above."""
        kind = self.tap.x_TH.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16):
            if self.log_p_TC is None:
                gap_nH = self.tap.call(self.block, rows).float() - self.tap.y_TH[rows].float()
                return gap_nH.square().sum()
            z_nR = self.tap.call_router(self.block, self.router, rows).float()
        log_p_nC = self.log_p_TC[rows]
        log_q_nC = log_probabilities(z_nR)[:, self.columns].log_softmax(dim=-1)
        return (log_p_nC.exp() * (log_p_nC - log_q_nC)).sum()

    @cached_property
    def scale(self) -> float:
        """The denominator per row, over the rows that train."""
        return self._base(0, self.split) / max(1, self.split)

    def held_out(self) -> float | None:
        """The relative error of the rows that measure; None if there are none."""
        if self.split == self.tap.rows:
            return None
        return self.relative(self.split, self.tap.rows)

    @torch.no_grad()
    def relative(self, start: int, end: int) -> float:
        """The relative error of rows ``start`` to ``end``."""
        total = 0.0
        for first in range(start, end, _CHUNK):
            total += float(self.error(slice(first, min(end, first + _CHUNK))))
        base = self._base(start, end)
        return total / base if base else total

    def _base(self, start: int, end: int) -> float:
        if self.log_p_TC is not None:
            return float(end - start)
        parts = self.tap.y_TH[start:end].split(_CHUNK)
        return sum(float(part.float().square().sum(dtype=torch.float64)) for part in parts)


def log_probabilities(z_nR: Tensor) -> Tensor:
    """Logits up to a constant per row, also of routers that return probabilities."""
    with torch.no_grad():
        sums_n = z_nR.sum(dim=-1)
        are = bool((z_nR >= 0).all()) and bool(torch.allclose(sums_n, torch.ones_like(sums_n)))
    return z_nR.clamp(min=1e-30).log() if are else z_nR


def grouped(z_TR: Tensor, groups: tuple[tuple[int, ...], ...], experts: int) -> Tensor:
    """Log-probabilities of a teacher's router over groups of its experts, [T, C].

    An expert that stands for several has their probability together. Outputs beyond the
    ``experts`` (of identity experts) follow as they are; slots without a group are left out.
    """
    z_TR = log_probabilities(z_TR)
    parts = [z_TR[:, list(group)].logsumexp(dim=-1, keepdim=True) for group in groups if group]
    return torch.cat((*parts, z_TR[:, experts:]), dim=-1).log_softmax(dim=-1)
