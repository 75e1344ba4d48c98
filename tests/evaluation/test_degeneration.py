"""Loops and repetition on token lists made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeprune.evaluation.degeneration import (
    LOOP_TOKENS,
    Loop,
    distinct,
    find_loop,
    first_difference,
    repetition,
)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (list(range(40)), None),
        ([1, 2, 3] + [7] * 16, Loop(1, 16)),
        ([1, 2, 3] + [7] * 15, None),  # an ellipsis, a rule, a round number
        ([9] + [4, 5, 6, 8] * 4, Loop(4, 16)),
        ([9] + [4, 5, 6, 8, 3, 2] * 3, Loop(6, 18)),
        ([9] + [4, 5, 6, 8, 3, 2, 1, 0] * 2, None),  # twice is no loop
        ([9] + [4, 5, 6, 8] * 4 + [4, 5], Loop(4, 18)),  # the last unit is cut
        ([4, 5, 6, 8] * 6 + [1], None),  # it found its way out
        ([7] * 20, Loop(1, 20)),
        ([], None),
    ],
)
def test_loops(ids: list[int], found: Loop | None) -> None:
    assert find_loop(ids) == found


def slow(ids: list[int]) -> tuple[int, int] | None:
    """The definition, letter by letter."""
    for period in range(1, len(ids) // 3 + 1):
        length = period
        while length < len(ids) and ids[-length - 1] == ids[-length - 1 + period]:
            length += 1
        if length >= 3 * period and length >= 16:
            return period, length
    return None


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
    st.integers(0, 8),
)
def test_loops_are_those_of_the_definition(head: list[int], unit: list[int], times: int) -> None:
    ids = head + unit * times
    found = find_loop(ids)
    assert (None if found is None else (found.period, found.tokens)) == slow(ids)
    if times >= 3 and times * len(unit) >= LOOP_TOKENS:
        assert found is not None and found.period <= len(unit)


def test_repetition_and_distinct() -> None:
    ids = [1, 2, 1, 2, 1, 2]
    assert distinct(ids, 1) == 2 / 6
    assert distinct(ids, 2) == 2 / 5  # 12 21 12 21 12
    assert distinct(ids, 3) == 2 / 4
    assert repetition(ids) == pytest.approx(1 - 2 / 3)  # 1212 2121 1212
    assert repetition([1, 2, 3]) == 0.0 and distinct([], 1) == 1.0


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 4))
def test_shares_are_shares(ids: list[int], n: int) -> None:
    assert 0.0 <= repetition(ids, n) == 1.0 - distinct(ids, n) <= 1.0
    assert distinct(list(range(len(ids))), n) == 1.0


def test_where_two_answers_part() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], []) is None
