"""The directory of a comparison, when a kill hits it at its worst."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moeprune import Budget, Grid, Text
from moeprune.errors import OutputError
from moeprune.pipeline.arena.cell import begun
from moeprune.pipeline.arena.estimate import Clock
from moeprune.pipeline.arena.measuring import Measured
from moeprune.pipeline.arena.run import _Arena
from moeprune.pipeline.arena.state import CHECKPOINTS, Run, open_run
from support import tree


def test_a_beginning_that_was_cut_is_begun_again(tmp_path: Path) -> None:
    """With ``--force`` too; statistics alone are of nobody knows what, and stay."""
    out = tmp_path / "run"
    out.mkdir()
    for force in True, False:
        (out / ".lock").touch()
        with open_run(out, {"model": "m"}, force) as run:
            assert not run.cells
    (out / "statistics").mkdir()
    for force in True, False:
        with pytest.raises(OutputError), open_run(out, {"model": "m"}, force):
            pass
    assert tree(tmp_path).keys() == {"run", "run/statistics"}


def test_a_clearing_that_was_cut_leaves_no_finished_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_run(tmp_path / "run", {"model": "m"}) as run:
        run.save("mone", {"status": "done", "plan": "plans/mone.json"})

    def killed(path: Path, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        with open_run(tmp_path / "run", {"model": "other"}, force=True):
            pass
    with open_run(tmp_path / "run", {"model": "other"}) as run:
        assert not run.cells


def test_a_checkpoint_that_is_kept_is_put_away_before_its_cell_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, [cell] = Run(tmp_path, {}), Grid("mone", (Budget(ratio=0.5),)).asked(Text()).cells()
    (run.work / cell.slug).mkdir(parents=True)
    arena = _Arena.__new__(_Arena)
    arena.run, arena.keep, arena.clock = run, True, Clock()

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        arena._measured([(cell, begun(cell))], Measured({}, {}, {cell.key: "wrong"}, 0.0))
    assert (tmp_path / CHECKPOINTS / cell.slug).is_dir() and not (run.work / cell.slug).exists()
