"""The residual stream of a few tokens, taken while a model is walked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeprune.core.accumulators import SAMPLE_SIZE
from moeprune.core.residual import Residual, angles
from moeprune.errors import UnsupportedModelError
from moeprune.models.bounds import stream_width
from moeprune.models.loading import LayeredModel
from moeprune.models.walk import Batch

_AT_ONCE = 16  # tokens whose angles are computed together: in float64 they take five times as much


class ResidualTap:
    """Takes rows of the stream; memory is SAMPLE_SIZE * 2 * (L + 1) * H floats, whatever the text.

    Which tokens is known before the walk: those with the smallest keys, and of the last tokens of
    sequences those with the smallest keys.

    Attributes:
        points: their rows, and those of the last tokens, at every point so far.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._sizes = [batch.ids_BL.shape for batch in batches]
        all_keys: list[Tensor] = []
        all_places: list[Tensor] = []
        last_keys: list[Tensor] = []
        last_places: list[Tensor] = []
        for number, batch in enumerate(batches):
            B, L = batch.ids_BL.shape
            mask_BL = batch.mask_BL if batch.mask_BL is not None else torch.ones(B, L)
            real_BL = mask_BL.bool().cpu()
            row_T = torch.nonzero(real_BL.reshape(-1)).reshape(-1)
            end_B = (real_BL * torch.arange(1, L + 1)).argmax(dim=1) + torch.arange(B) * L
            end_B = end_B[real_BL.any(dim=1)]
            keys_T = batch.key_BL.reshape(-1).cpu()
            for rows, keys, places in (
                (row_T, all_keys, all_places),
                (end_B, last_keys, last_places),
            ):
                keys.append(keys_T[rows])
                places.append(torch.stack((torch.full_like(rows, number), rows), dim=1))
        self._key_S, self._place_S = _smallest(all_keys, all_places)
        self._key_Q, self._place_Q = _smallest(last_keys, last_places)
        self.points: list[tuple[Tensor, Tensor]] = []

    def nbytes(self, model: LayeredModel) -> int:
        """Bytes of its points at the end of a walk through ``model``."""
        rows = len(self._key_S) + len(self._key_Q)
        return rows * (len(model.layers) + 1) * stream_width(model) * 4

    def note(self, states: Sequence[object]) -> None:
        """The stream at the next point; one tensor [B, L, ...] or [B * L, ...] per batch."""
        flat = [self._flat(state, size) for state, size in zip(states, self._sizes, strict=True)]
        self.points.append((_rows(flat, self._place_S), _rows(flat, self._place_Q)))

    @staticmethod
    def _flat(state: object, size: torch.Size) -> Tensor:
        x = state[0] if isinstance(state, tuple) and state else state
        if isinstance(x, Tensor) and x.shape[:2] == size:
            return x.reshape(size.numel(), -1)  # several streams side by side are one
        if isinstance(x, Tensor) and x.ndim and len(x) == size.numel():
            return x.reshape(len(x), -1)
        raise UnsupportedModelError("its decoder layers do not hand on one state per token")

    def result(self) -> Residual:
        """The angles."""
        return Residual(self._key_S, self._angles(0), self._key_Q, self._angles(1))

    def _angles(self, which: int) -> Tensor:
        """Of all sampled tokens (0) or of last ones (1), [tokens, D, D]."""
        parts = zip(*(rows[which].split(_AT_ONCE) for rows in self.points), strict=True)
        return torch.cat([angles(torch.stack(part_DSC)) for part_DSC in parts])


def _smallest(keys: list[Tensor], places: list[Tensor]) -> tuple[Tensor, Tensor]:
    key, place = torch.cat(keys), torch.cat(places)
    order = torch.argsort(key, stable=True)[:SAMPLE_SIZE]
    return key[order], place[order]


def _rows(flat: list[Tensor], places: Tensor) -> Tensor:
    return torch.stack([flat[number][row].float().cpu() for number, row in places.tolist()])
