"""Which sequences a step reads: a pure function of the seed and the step, so nothing is stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moeprune.errors import DataError
from moeprune.models.data import Domain


def split(domains: Sequence[Domain], fraction: float) -> tuple[list[Domain], list[Domain]]:
    """Sequences to train on, and sequences to measure: of every domain that has two at least one.

    Raises:
        DataError: there are none to train on, or none to measure.
    """
    train, held = [], []
    for domain in domains:
        count = len(domain.ids_NL)
        few = min(max(1, round(count * fraction)), count - 1) if fraction else 0
        held.append(Domain(domain.name, domain.ids_NL[count - few :], domain.bytes_per_token))
        train.append(Domain(domain.name, domain.ids_NL[: count - few], domain.bytes_per_token))
    if not any(len(domain.ids_NL) for domain in train):
        raise DataError("there is no sequence to train on", "give more text, or a smaller --length")
    if fraction and not any(len(domain.ids_NL) for domain in held):
        raise DataError(
            "no domain has two sequences, so none can be held out",
            "give more text, a smaller --length, or --holdout 0",
        )
    return train, held


class Order:
    """Sequences in a random order, again and again, each time in another one.

    Args:
        ids_NL: the sequences.
        seed: of the orders.
    """

    def __init__(self, ids_NL: Tensor, seed: int) -> None:
        self._ids_NL, self._seed = ids_NL, seed
        self._order: tuple[int, Tensor] | None = None

    def rows(self, start: int, count: int) -> Tensor:
        """Sequences ``start`` to ``start + count`` of the endless row, [count, L]."""
        found = [self._place(position) for position in range(start, start + count)]
        return self._ids_NL[found]

    def _place(self, position: int) -> int:
        N = len(self._ids_NL)
        epoch = position // N
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(N, generator=generator))
        return int(self._order[1][position % N])
