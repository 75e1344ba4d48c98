"""What edits of single layers, or of all, do to held-out text: sums per window, branch by branch.

Axes: W windows, L positions, V vocabulary, A branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeprune.models.branches import BranchedWalk
from moeprune.models.walk import Batch, default_workers

Floats = NDArray[np.float64]

_POSITIONS = 64
"""Whose logits are compared at once: what stays in the cache is much faster."""


@dataclass(frozen=True)
class Damage:
    """What every branch of a walk did to every window.

    Attributes:
        tokens: predicted tokens of a window.
        nll_W: sum of -log p(token) of the unedited model, nats.
        nll_AW: the same of every branch.
        kl_AW: sum of KL(unedited || branch), nats.
    """

    tokens: int
    nll_W: Floats
    nll_AW: Floats
    kl_AW: Floats

    @property
    def loss_AW(self) -> Floats:
        """How much higher the loss of a window is, nats in all."""
        return self.nll_AW - self.nll_W


def measure(
    walk: BranchedWalk, progress: Callable[[int, int], None] = lambda done, total: None
) -> Damage:
    """Finish a walk: compare the logits of its branches with the model's, batch by batch."""
    device = walk.model.device

    def score(index: int) -> tuple[Floats, Floats]:
        if device.type == "cpu":
            torch.set_num_threads(1)
        return _compare(walk, index)

    parts = []
    with ThreadPoolExecutor(walk.workers or default_workers(device)) as pool:
        for index, part in enumerate(pool.map(score, range(len(walk.held)))):
            parts.append(part)
            progress(index + 1, len(walk.held))
    nll_BW = np.concatenate([nll for nll, _ in parts], axis=1)
    kl_AW = np.concatenate([kl for _, kl in parts], axis=1)
    return Damage(walk.held[0].ids_BL.shape[1] - 1, nll_BW[0], nll_BW[1:], kl_AW)


def _compare(walk: BranchedWalk, index: int) -> tuple[Floats, Floats]:
    """Negative log-likelihoods [1 + A, W] and divergences [A, W] of one batch."""
    ids_WL = walk.held[index].ids_BL
    nll_BW, kl_AW = [], []
    reference_WLV: Tensor | None = None
    for logits_WLV in walk.held_logits(index):
        nll_W, kl_W = _sums(logits_WLV[:, :-1], ids_WL[:, 1:], reference_WLV)
        nll_BW.append(nll_W)
        if reference_WLV is None:
            reference_WLV = logits_WLV[:, :-1]
        else:
            kl_AW.append(kl_W)
    return np.array(nll_BW), np.array(kl_AW).reshape(-1, len(ids_WL))


def _sums(
    logits_WLV: Tensor, target_WL: Tensor, reference_WLV: Tensor | None
) -> tuple[list[float], list[float]]:
    nll_W, kl_W = [], []
    for row, logits_LV in enumerate(logits_WLV):
        nll = kl = 0.0
        for start in range(0, len(logits_LV), _POSITIONS):
            at = slice(start, start + _POSITIONS)
            logp_nV = torch.log_softmax(logits_LV[at].float(), dim=-1)
            target_n1 = target_WL[row, at, None].to(logp_nV.device)
            nll -= float(logp_nV.gather(-1, target_n1).double().sum())
            if reference_WLV is not None:
                true_nV = torch.log_softmax(reference_WLV[row, at].float(), dim=-1)
                kl_n = torch.linalg.vecdot(true_nV.exp(), true_nV - logp_nV)
                kl += float(kl_n.double().sum())
        nll_W.append(nll)
        kl_W.append(kl)
    return nll_W, kl_W
