"""Sums whose bits do not depend on how the parts were dealt out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from moeprune.core.folding import Fold, held
from moeprune.errors import MoepruneError
from moeprune.models.ranks import ALONE, dealt, launched, run_of


@dataclass
class Order:
    """Records in which order it was added up."""

    what: Any

    def merge(self, other: Order) -> None:
        self.what = (self.what, other.what)


def run(start: int, stop: int) -> Fold[Order]:
    fold: Fold[Order] = Fold(start)
    for index in range(start, stop):
        fold.add(Order(index))
    return fold


def total(fold: Fold[Order]) -> Any:
    found = fold.total()
    assert found is not None
    return found.what


def test_few_parts_are_added_from_left_to_right() -> None:
    assert total(run(0, 4)) == (((0, 1), 2), 3)


def test_no_parts_have_no_sum() -> None:
    assert run(0, 0).total() is None


@pytest.mark.parametrize("parts", [1, 8, 9, 64, 65, 100, 513])
def test_runs_put_together_are_added_up_like_one(parts: int) -> None:
    whole = total(run(0, parts))
    for size in range(1, min(parts, 7) + 1):
        top: Fold[Order] = Fold()
        for rank in range(size):
            own = run_of(parts, rank, size)
            for piece in run(own.start, own.stop).pieces():
                top.add(piece.part, piece.level, piece.span)
        assert top.at == parts
        assert total(top) == whole


@pytest.mark.parametrize(
    ("parts", "start", "sums"),
    [(0, 0, 1), (1, 0, 1), (8, 0, 1), (9, 0, 2), (73, 0, 3), (600, 0, 4), (11, 5, 4), (64, 37, 8)],
)
def test_sums_held_at_once(parts: int, start: int, sums: int) -> None:
    """One per level; a run from the middle also holds what waits for its neighbours."""
    assert held(parts, start) == sums
    fold: Fold[Order] = Fold(start)
    for index in range(parts):
        fold.add(Order(index))
        assert len(fold.pieces()) <= sums


@pytest.mark.parametrize(("count", "size"), [(7, 3), (4, 4), (2, 4), (100, 7)])
def test_runs_follow_each_other_and_differ_by_one(count: int, size: int) -> None:
    runs = [run_of(count, rank, size) for rank in range(size)]
    assert runs[0].start == 0
    assert runs[-1].stop == count
    assert all(a.stop == b.start for a, b in pairwise(runs))
    lengths = {own.stop - own.start for own in runs}
    assert max(lengths) - min(lengths) <= 1


def test_equal_things_are_dealt_in_turn_and_costly_ones_first() -> None:
    assert dealt([1.0] * 5, 2) == [[0, 2, 4], [1, 3]]
    assert dealt([1.0, 9.0, 5.0], 2) == [[1, 0], [2]]


def test_alone_unless_a_launcher_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(MoepruneError, match="torchrun"):
        launched()
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = launched()
    assert (found.rank, found.size, found.first) == (3, 4, False)
    assert found.device("cuda") == "cuda:1"
    assert found.device("cpu") == "cpu"
