"""Where time goes: what is nested is not counted twice, and the largest part is named."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from moeprune.core import profile
from moeprune.core.profile import COMPUTING, HIDDEN, LOADING, MERGING, WAITING, Profile


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [0.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])
    yield now


def test_nested_blocks_are_counted_once(clock: list[float]) -> None:
    found = Profile()
    with found.spend(COMPUTING):
        clock[0] += 5
        with found.spend(MERGING):
            clock[0] += 2
        with found.spend(WAITING):
            clock[0] += 1
    clock[0] += 4
    seconds = found.seconds()
    assert seconds == {
        WAITING: 1, COMPUTING: 5, MERGING: 2, HIDDEN: 0, "other": 4, LOADING: 0, "total": 12,
    }  # fmt: skip
    assert found.bound() == "arithmetic"


def test_another_thread_is_beside(clock: list[float]) -> None:
    found = Profile()

    def load() -> None:
        with found.spend(LOADING):
            clock[0] += 3

    with found.spend(WAITING):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert found.seconds()[WAITING] == found.seconds()["total"] == 3
    assert found.seconds()[LOADING] == 3
    assert found.bound() == "disk"
    found.starved = True  # it could have been read before, had there been room
    assert found.bound() == "memory"


def test_copies_are_taken_from_what_they_are_part_of(clock: list[float]) -> None:
    found = Profile()
    with found.spend(COMPUTING):
        clock[0] += 4
    found.move(HIDDEN, COMPUTING, 3)
    assert found.seconds()[COMPUTING] == 1
    assert found.seconds()[HIDDEN] == 3
    assert found.bound() == "memory"


def test_bytes_add_up() -> None:
    found = Profile()
    found.read([1, 2])
    found.read(iter([3]))
    assert found.bytes == 6
