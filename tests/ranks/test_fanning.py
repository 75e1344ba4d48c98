"""Cells of a comparison dealt out to processes, some of which end by force."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from moeprune import Budget, Compute, Grid, Text, compare
from moeprune.errors import MoepruneError, OutputError
from moeprune.pipeline.arena import lanes
from moeprune.pipeline.arena.asking import Calibration, Cell, parse_methods
from moeprune.pipeline.arena.cell import FAILED, PLANNED, begun
from moeprune.pipeline.arena.fanning import Fanning, Group
from moeprune.pipeline.arena.lanes import EndedError, Fan
from moeprune.pipeline.arena.measuring import Measured
from running import page


class FakeLane:
    """Does nothing, at once or never, and writes down what it was given."""

    def __init__(self, deadly: tuple[str, ...] = ()) -> None:
        self.deadly, self.log, self.restarts = deadly, list[tuple[str, ...]](), 0

    def make(self, cell: Cell, known: Mapping[str, Any] | None) -> Future[Any]:
        self.log.append(("make", cell.key))
        return self._answer([cell.key], begun(cell) | {"status": PLANNED}, "make")

    def measure(self, slugs: Mapping[str, str]) -> Future[Any]:
        self.log.append(("measure", *slugs))
        return self._answer(list(slugs), Measured({}, {}, {}, 1.0), "measure")

    def _answer(self, keys: list[str], value: Any, what: str) -> Future[Any]:
        found: Future[Any] = Future()
        if any(f"{what} {key}" in self.deadly for key in keys):
            found.set_exception(EndedError())
        else:
            found.set_result(value)
        return found

    def restart(self) -> None:
        self.restarts += 1

    def end(self) -> None:
        """Nothing to end."""


def grid() -> list[Cell]:
    text = Calibration("all-4", Text())
    budgets = (Budget(ratio=0.25), Budget(ratio=0.5))
    entries = parse_methods("mone,reap,random")
    return [Cell(entry, budget, 0, text) for entry in entries for budget in budgets]


def fan_out(fakes: list[FakeLane], size: int = 4) -> tuple[dict[str, str], dict[str, str]]:
    """Statuses of cells that were tried, and what was wrong with those that were measured."""
    tried: dict[str, str] = {}
    wrong: dict[str, str] = {}
    left: list[int] = []

    def made(cell: Cell, row: dict[str, Any]) -> dict[str, Any] | None:
        tried[cell.key] = row["status"]
        return row if row["status"] == PLANNED else None

    def measured(group: Group, result: Measured) -> None:
        wrong.update({cell.key: result.wrong.get(cell.key, "") for cell, _ in group})

    cells = grid()
    Fanning(fakes, size, made, measured).run_all(cells, {}, lambda rest: left.append(len(rest)))
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)
    return tried, wrong


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_cell_is_made_and_measured_once(count: int) -> None:
    fakes = [FakeLane() for _ in range(count)]
    tried, wrong = fan_out(fakes)
    keys = [cell.key for cell in grid()]
    made = [entry[1] for lane in fakes for entry in lane.log if entry[0] == "make"]
    groups = [entry[1:] for lane in fakes for entry in lane.log if entry[0] == "measure"]
    weighed = [key for group in groups for key in group]
    assert sorted(made) == sorted(weighed) == sorted(keys) == sorted(tried)
    assert set(wrong.values()) == {""}
    for lane in fakes:  # what belongs together stays together, in order
        own = [entry[1] for entry in lane.log if entry[0] == "make"]
        assert own == [key for key in keys if key.split()[0] in {k.split()[0] for k in own}]


def test_a_process_that_ends_fails_its_cell_and_no_other() -> None:
    keys = [cell.key for cell in grid()]
    fakes = [FakeLane((f"make {keys[0]}",)), FakeLane((f"make {keys[0]}",))]
    tried, wrong = fan_out(fakes)
    assert [key for key in keys if tried[key] == FAILED] == [keys[0]]
    assert sorted(wrong) == sorted(keys[1:])
    assert sum(lane.restarts for lane in fakes) == 1


def test_of_a_group_that_ends_its_process_only_the_culprit_fails() -> None:
    keys = [cell.key for cell in grid()]
    deadly = (f"measure {keys[1]}",)
    fakes = [FakeLane(deadly), FakeLane(deadly)]
    _, wrong = fan_out(fakes, size=12)
    assert [key for key in keys if wrong[key]] == [keys[1]]
    assert "ended by force" in wrong[keys[1]]


def test_a_full_disk_ends_the_run() -> None:
    class Full(FakeLane):
        def make(self, cell: Cell, known: Mapping[str, Any] | None) -> Future[Any]:
            found: Future[Any] = Future()
            found.set_exception(OutputError("no space left"))
            return found

    with pytest.raises(OutputError, match="no space"):
        fan_out([Full()])


def test_ray_is_asked_for_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "find_spec", lambda name: None)
    with pytest.raises(MoepruneError, match=r"moeprune\[ray\]"):
        Fan(2, "auto")


def plain(found: Any) -> Any:
    """Without what differs between two runs of the same."""
    if isinstance(found, dict):
        other = ("seconds", "peak_memory_bytes")
        return {key: plain(value) for key, value in found.items() if key not in other}
    return [plain(value) for value in found] if isinstance(found, list) else found


NO_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("ray", [None, pytest.param("local", marks=NO_RAY)])
def test_two_processes_write_the_file_of_one(tmp_path: Path, ray: str | None) -> None:
    text = Text((f"english={page(tmp_path, 'english', 9_000)}",), 4, 64)
    grid = Grid("mone,random,moeits:bins=8", (Budget(ratio=0.5), Budget(ratio=0.95)), (0, 1))
    given: dict[str, Any] = {
        "text": text,
        "heldout": Text(text.sources, 2, 32),
        "compute": Compute(dtype="float32", workers=1),
    }
    compare("demo", tmp_path / "one", grid, **given)
    compare("demo", tmp_path / "two", grid, fan=Fan(2, ray), **given)
    one, two = (
        json.dumps(plain(json.loads((tmp_path / name / "compare.json").read_bytes())))
        for name in ("one", "two")
    )
    assert one == two


@pytest.mark.slow
def test_killed_processes_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = lanes._Process._begin
    killed: list[int] = []

    def begin_and_kill_once(lane: Any) -> None:
        begin(lane)
        if not killed:
            killed.append(0)

            def kill(pid: Future[int]) -> None:
                threading.Timer(0.2, os.kill, (pid.result(), signal.SIGKILL)).start()

            lane._pid.add_done_callback(kill)

    monkeypatch.setattr(lanes._Process, "_begin", begin_and_kill_once)
    text = Text((f"english={page(tmp_path, 'english', 9_000)}",), 4, 64)
    given: dict[str, Any] = {
        "text": text,
        "heldout": Text(text.sources, 2, 32),
        "compute": Compute(dtype="float32", workers=1),
    }
    grid = Grid("moeits,mone,random", (Budget(ratio=0.5),))
    result = compare("demo", tmp_path / "run", grid, fan=Fan(2), **given)
    failed = [row for row in result["cells"].values() if row["status"] == FAILED]
    assert killed
    assert len(failed) == 1
    assert "ended by force" in failed[0]["reason"]
    again = compare("demo", tmp_path / "run", grid, fan=Fan(2), **given)
    assert {row["status"] for row in again["cells"].values()} == {"done"}

    def none(lane: Any) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(lanes._Process, "_begin", none)
    assert compare("demo", tmp_path / "run", grid, fan=Fan(2), **given)["cells"] == again["cells"]
