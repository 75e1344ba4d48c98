"""Searches over subsets against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeprune.core.ops.subsets import Choice, Evolution, beam, evolve, exhaustive


def losses_of(experts: int, seed: int) -> Callable[[Tensor], Tensor]:
    """A loss with interactions: |values of the experts that go, each less a shared part|^2."""
    generator = torch.Generator().manual_seed(seed)
    parts_EH = torch.randn(experts, 3, generator=generator, dtype=torch.float64)
    return lambda kept_NE: ((~kept_NE).double() @ parts_EH).square().sum(dim=1)


def one_loss(losses: Callable[[Tensor], Tensor], choice: Choice, dropped: tuple[int, ...]) -> float:
    return float(losses(choice.mask([dropped]))[0])


def allowed(choice: Choice) -> list[tuple[int, ...]]:
    """All subsets, filtered by what each field of the choice says."""
    size = choice.experts // choice.groups
    return [
        ids
        for ids in combinations(range(choice.experts), choice.remove)
        if not set(ids) & choice.pinned
        and choice.forbidden <= set(ids)
        and all(
            sum(e // size == g for e in ids) == choice.remove // choice.groups
            for g in range(choice.groups)
        )
    ]


CHOICES = [
    Choice(7, 3),
    Choice(7, 0),
    Choice(8, 4, groups=2),
    Choice(8, 2, groups=2, pinned=frozenset({0, 5})),
    Choice(7, 4, pinned=frozenset({2}), forbidden=frozenset({6})),
    Choice(8, 4, groups=2, pinned=frozenset({1}), forbidden=frozenset({0, 4})),
]


@pytest.mark.parametrize("choice", CHOICES)
def test_exhaustive_is_the_best_of_all(choice: Choice) -> None:
    losses = losses_of(choice.experts, 1)
    every = allowed(choice)
    assert list(choice.every()) == sorted(every) or choice.groups > 1
    assert sorted(choice.every()) == sorted(every)
    assert choice.subsets() == len(every)
    found = exhaustive(losses, choice)
    best = min(every, key=lambda ids: one_loss(losses, choice, ids))
    assert found.dropped == best
    assert found.loss == pytest.approx(one_loss(losses, choice, best))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_wide_beam_is_exhaustive_and_a_narrow_one_greedy(choice: Choice) -> None:
    losses = losses_of(choice.experts, 2)
    assert beam(losses, choice, 1000) == exhaustive(losses, choice)
    dropped = set(choice.forbidden)
    size = choice.experts // choice.groups
    while len(dropped) < choice.remove:
        quota = choice.remove // choice.groups
        candidates = [
            e
            for e in range(choice.experts)
            if e not in dropped | choice.pinned
            and sum(d // size == e // size for d in dropped) < quota
        ]
        dropped.add(
            min(candidates, key=lambda e: one_loss(losses, choice, tuple(sorted({*dropped, e}))))
        )
    assert set(beam(losses, choice).dropped) == dropped


def test_more_than_one_batch_is_searched() -> None:
    choice = Choice(16, 8)  # 12870 subsets
    losses = losses_of(16, 3)
    best = min(choice.every(), key=dict(_all(losses, choice)).__getitem__)
    assert exhaustive(losses, choice).dropped == best


def _all(losses: Callable[[Tensor], Tensor], choice: Choice) -> list[tuple[tuple[int, ...], float]]:
    subsets = list(choice.every())
    return list(zip(subsets, losses(choice.mask(subsets)).tolist(), strict=True))


def flat(kept_NE: Tensor) -> Tensor:
    return torch.zeros(len(kept_NE))


def test_ties_break_by_tokens_and_then_by_ids() -> None:
    assert exhaustive(flat, Choice(5, 2)).dropped == (0, 1)
    assert beam(flat, Choice(5, 2)).dropped == (0, 1)
    rare = Choice(5, 2, counts=(9, 9, 1, 9, 1))
    assert exhaustive(flat, rare).dropped == beam(flat, rare, 3).dropped == (2, 4)
    assert evolve(flat, rare, Evolution(), "0")[0].dropped == (2, 4)


def test_a_loss_that_is_no_number_loses() -> None:
    def losses(kept_NE: Tensor) -> Tensor:
        return torch.where(kept_NE[:, 0], 1.0, torch.nan)

    assert exhaustive(losses, Choice(4, 1)).dropped == (1,)


@pytest.mark.parametrize("choice", [*CHOICES, Choice(16, 8), Choice(16, 8, groups=4)])
def test_evolution_meets_allowed_subsets_and_repeats_itself(choice: Choice) -> None:
    losses = losses_of(choice.experts, 4)
    sizes = Evolution(population=20, iterations=8, keep=3)
    found = evolve(losses, choice, sizes, "seed")
    assert found == evolve(losses, choice, sizes, "seed")
    every = set(allowed(choice))
    assert len(found) == min(3, len(every))
    for one in found:
        assert one.dropped in every
        assert one.loss == pytest.approx(one_loss(losses, choice, one.dropped))
    assert [one.loss for one in found] == sorted(one.loss for one in found)


def test_evolution_finds_what_chance_alone_does_not() -> None:
    choice = Choice(20, 10)  # 184756 subsets
    losses = losses_of(20, 5)
    chance = evolve(losses, choice, Evolution(iterations=0), "1")[0].loss
    found = evolve(losses, choice, Evolution(), "1")[0].loss
    ranked = sorted(value for _, value in _all(losses, choice))
    assert found <= ranked[100] < chance


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.integers(0, 1000), st.integers(0, 6))
def test_other_names_give_the_same_experts(order: list[int], seed: int, remove: int) -> None:
    losses = losses_of(7, seed)
    place = [order.index(e) for e in range(7)]

    def renamed(kept_NE: Tensor) -> Tensor:
        return losses(kept_NE[:, place])

    choice = Choice(7, remove)
    for search in (exhaustive, beam):
        plain, other = search(losses, choice), search(renamed, choice)
        assert {order[i] for i in other.dropped} == set(plain.dropped)
