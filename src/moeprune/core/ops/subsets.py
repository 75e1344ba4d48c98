"""Searches for the experts to drop: all subsets, one after the other, a beam, or by evolution.

All of them minimise a loss of the experts that are left, given as a function of many subsets at
once. A subset is written as the ascending ids of the experts that go. Of equal losses the subset
with fewer tokens wins, then the one whose ids come first. Routing groups lose the same number each.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice, product

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]
"""From subsets [N, E] (True: left) to losses [N]."""

_BATCH = 4096


@dataclass(frozen=True)
class Choice:
    """Which subsets are allowed.

    Attributes:
        experts: E.
        remove: how many go; a multiple of ``groups``.
        groups: routing groups, consecutive runs of equal length.
        pinned: experts that stay.
        forbidden: experts that go.
        counts: tokens per expert, for ties.
    """

    experts: int
    remove: int
    groups: int = 1
    pinned: frozenset[int] = frozenset()
    forbidden: frozenset[int] = frozenset()
    counts: tuple[int, ...] = ()

    @property
    def quota(self) -> int:
        """How many go from each group."""
        return self.remove // self.groups

    def free(self) -> list[list[int]]:
        """By group, the experts about which there is a choice."""
        size = self.experts // self.groups
        fixed = self.pinned | self.forbidden
        return [
            [e for e in range(g * size, (g + 1) * size) if e not in fixed]
            for g in range(self.groups)
        ]

    def open(self) -> list[int]:
        """By group, how many of the free experts go."""
        size = self.experts // self.groups
        return [
            self.quota - sum(e // size == g for e in self.forbidden) for g in range(self.groups)
        ]

    def subsets(self) -> int:
        """How many subsets are allowed."""
        pairs = zip(self.free(), self.open(), strict=True)
        return math.prod(math.comb(len(free), number) for free, number in pairs)

    def every(self) -> Iterator[tuple[int, ...]]:
        """All allowed subsets."""
        parts = [
            list(combinations(free, number))
            for free, number in zip(self.free(), self.open(), strict=True)
        ]
        for chosen in product(*parts):
            yield tuple(sorted(chain(self.forbidden, *chosen)))

    def mask(self, dropped: Sequence[tuple[int, ...]]) -> Tensor:
        """Subsets as [N, E], True where an expert is left."""
        kept_NE = torch.ones(len(dropped), self.experts, dtype=torch.bool)
        rows = [row for row, ids in enumerate(dropped) for _ in ids]
        kept_NE[rows, [e for ids in dropped for e in ids]] = False
        return kept_NE

    def key(self, loss: float, dropped: tuple[int, ...]) -> tuple[float, int, tuple[int, ...]]:
        """The order in which subsets are preferred."""
        tokens = sum(self.counts[e] for e in dropped) if self.counts else 0
        return (math.inf if math.isnan(loss) else loss, tokens, dropped)


@dataclass(frozen=True)
class Found:
    """A subset and its loss."""

    dropped: tuple[int, ...]
    loss: float


def exhaustive(losses: Losses, choice: Choice) -> Found:
    """The best of all subsets."""
    best: tuple[float, int, tuple[int, ...]] | None = None
    subsets = choice.every()
    while batch := list(islice(subsets, _BATCH)):
        values = losses(choice.mask(batch)).tolist()
        first = min(choice.key(value, ids) for value, ids in zip(values, batch, strict=True))
        best = first if best is None else min(best, first)
    assert best is not None, "a choice has at least one subset"
    return Found(best[2], best[0])


def beam(losses: Losses, choice: Choice, width: int = 1) -> Found:
    """Backward elimination that keeps the ``width`` best subsets of each size; 1 is greedy."""
    front = [tuple(sorted(choice.forbidden))]
    loss = float(losses(choice.mask(front))[0])
    for _ in range(choice.remove - len(choice.forbidden)):
        # the same subset is reached in several orders
        subsets = sorted({longer for ids in front for longer in _one_more(choice, ids)})
        values = losses(choice.mask(subsets)).tolist()
        ranked = sorted(choice.key(value, ids) for value, ids in zip(values, subsets, strict=True))
        front, loss = [ids for *_, ids in ranked[:width]], ranked[0][0]
    return Found(front[0], loss)


def _one_more(choice: Choice, dropped: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    size = choice.experts // choice.groups
    for group, free in enumerate(choice.free()):
        if sum(e // size == group for e in dropped) < choice.quota:
            yield from (tuple(sorted((*dropped, e))) for e in free if e not in dropped)


@dataclass(frozen=True)
class Evolution:
    """The sizes of a genetic search.

    Attributes:
        population: subsets alive at once.
        iterations: generations.
        keep: candidates that are returned.
        mutation: the chance that a child swaps a dropped expert for one that stays.
    """

    population: int = 100
    iterations: int = 50
    keep: int = 3
    mutation: float = 0.3


def evolve(losses: Losses, choice: Choice, sizes: Evolution, seed: str) -> list[Found]:
    """The best subsets that a genetic search meets, best first; the same for the same ``seed``.

    Each generation the better half of the population survives, and pairs of it, drawn at random,
    have one child each: what both drop, and a random part of what one of them does.
    """
    draw = random.Random(seed)
    known: dict[tuple[int, ...], float] = {}

    def best(candidates: set[tuple[int, ...]], number: int) -> list[tuple[int, ...]]:
        new = sorted(ids for ids in candidates if ids not in known)
        if new:
            known.update(zip(new, losses(choice.mask(new)).tolist(), strict=True))
        return sorted(candidates, key=lambda ids: choice.key(known[ids], ids))[:number]

    wanted = sizes.population
    if choice.subsets() <= wanted:  # they can all be looked at
        alive, iterations = set(choice.every()), 0
    else:
        alive, iterations = {_random_subset(choice, draw) for _ in range(wanted)}, sizes.iterations
    for _ in range(iterations):
        parents = best(alive, max(2, wanted // 2))
        children = {_child(choice, draw, parents, sizes.mutation) for _ in range(wanted // 2)}
        alive = {*parents, *children}
    best(alive, wanted)
    first = sorted(known, key=lambda ids: choice.key(known[ids], ids))[: sizes.keep]
    return [Found(ids, known[ids]) for ids in first]


def _random_subset(choice: Choice, draw: random.Random) -> tuple[int, ...]:
    parts = [
        draw.sample(free, number) for free, number in zip(choice.free(), choice.open(), strict=True)
    ]
    return tuple(sorted(chain(choice.forbidden, *parts)))


def _child(
    choice: Choice, draw: random.Random, parents: list[tuple[int, ...]], mutation: float
) -> tuple[int, ...]:
    one, other = draw.choice(parents), draw.choice(parents)
    parts: list[list[int]] = []
    for free, number in zip(choice.free(), choice.open(), strict=True):
        both = [e for e in free if e in one and e in other]
        either = [e for e in free if (e in one) != (e in other)]
        part = both + draw.sample(either, number - len(both))
        stay = [e for e in free if e not in part]
        if part and stay and draw.random() < mutation:
            part[draw.randrange(len(part))] = draw.choice(stay)
        parts.append(part)
    return tuple(sorted(chain(choice.forbidden, *parts)))
