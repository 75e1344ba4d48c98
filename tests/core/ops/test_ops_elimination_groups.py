"""Elimination where every routing group must keep the same number of experts."""

from __future__ import annotations

from math import fsum

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moeprune.core.ops.elimination import Removal, closest_pair_order

Matrix = NDArray[np.float64]


def random_matrix(experts: int, seed: int) -> Matrix:
    upper = np.triu(np.random.default_rng(seed).random((experts, experts)), 1)
    return upper + upper.T


def naive_order(matrix: Matrix, floor: int, groups: int) -> list[tuple[int, int]]:
    """(gone, kept) by trying all pairs; distinct entries, so no ties."""
    size, least = len(matrix) // groups, floor // groups
    alive, order = list(range(len(matrix))), []
    while len(alive) > floor:
        alive_in = [sum(e // size == g for e in alive) for g in range(groups)]
        free = {e for e in alive if alive_in[e // size] > least}
        pairs = [(a, b) for a in alive for b in alive if a < b and (a in free or b in free)]
        a, b = max(pairs, key=lambda pair: matrix[pair])
        central = a if fsum(matrix[a, alive]) > fsum(matrix[b, alive]) else b
        gone = central if {a, b} <= free else next(e for e in (a, b) if e in free)
        order.append((gone, a + b - gone))
        alive.remove(gone)
    return order


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.data(), st.integers(0, 2**32 - 1))
def test_every_group_keeps_its_share_by_the_documented_rule(
    groups: int, size: int, data: st.DataObject, seed: int
) -> None:
    each = data.draw(st.integers(1, size))
    matrix = random_matrix(groups * size, seed)
    order = closest_pair_order(matrix, groups * each, groups)
    assert [(step.expert, step.partner) for step in order] == naive_order(
        matrix, groups * each, groups
    )
    gone = {step.expert for step in order}
    for group in range(groups):
        members = set(range(group * size, (group + 1) * size))
        assert len(members - gone) == each
    similarities = [step.similarity for step in order]
    assert similarities == sorted(similarities, reverse=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_one_group_is_no_group(experts: int, floor: int, seed: int) -> None:
    matrix = random_matrix(experts, seed)
    assert closest_pair_order(matrix, floor, 1) == closest_pair_order(matrix, floor)


def test_a_pair_with_an_expert_that_stays_removes_the_other() -> None:
    # groups {0, 1} and {2, 3}, one each: (0, 1) is closest and 1 has the larger row, so 1 goes and
    # 0 stays; next is (0, 3), of which 0 is the more central, but 3 has to go
    matrix = np.zeros((4, 4))
    similarities = {(0, 1): 0.9, (1, 2): 0.85, (1, 3): 0.6, (0, 3): 0.5, (0, 2): 0.3, (2, 3): 0.1}
    for (a, b), value in similarities.items():
        matrix[a, b] = matrix[b, a] = value
    assert closest_pair_order(matrix, 2, 2) == [Removal(1, 0, 0.9), Removal(3, 0, 0.5)]
    assert closest_pair_order(matrix, 2, 1) == [Removal(1, 0, 0.9), Removal(0, 3, 0.5)]


@pytest.mark.parametrize(("experts", "floor"), [(5, 2), (4, 3)])
def test_sizes_must_be_multiples_of_the_groups(experts: int, floor: int) -> None:
    with pytest.raises(ValueError, match="multiples of 2"):
        closest_pair_order(random_matrix(experts, 0), floor, 2)
