"""Commands that a launcher started several times: who speaks, and what they are left with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from moeprune.cli import app, output, together
from running import Run


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What falls silent speaks again behind the test."""
    monkeypatch.setattr(output.ERR, "quiet", False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_half_a_world_is_spoken_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run("calibrate", "demo", "--out", "stats")
    assert done.code == 2
    assert "WORLD_SIZE is set, but RANK and" in done.err


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_refuses_for_all(
    run: Run, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    done = run("verify", "demo")
    assert done.code == 2
    assert ("verify is the work of one process" in done.err) == (rank == 0)
    assert not done.out


def test_who_is_interrupted_is_not_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others must not hear that all is well."""
    left: list[str] = []

    @contextmanager
    def world() -> Iterator[None]:
        try:
            yield
            left.append("done")
        except KeyboardInterrupt:
            left.append("interrupted")
            raise

    def command(**_: Any) -> int:
        together._Session.stack.enter_context(world())
        return 130  # as the command line says it

    monkeypatch.setattr(app, "app", command)
    assert run("calibrate").code == 130
    assert left == ["interrupted"]
