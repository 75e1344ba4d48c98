"""Cells of a comparison, dealt out to several processes.

The budgets and seeds of one method on one text go to one process, in order: what the method finds
out for one it need not find out for the next, and equal plans of other seeds are recognised.
Measuring waits until a group is together, or nothing is left to be planned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from moeprune.errors import MoepruneError, OutputError
from moeprune.pipeline.arena import cell as cells
from moeprune.pipeline.arena.asking import Cell
from moeprune.pipeline.arena.lanes import EndedError, Lane
from moeprune.pipeline.arena.measuring import Measured, said
from moeprune.pipeline.arena.scoring import reads_statistics, refuse_gram

Group = list[tuple[Cell, dict[str, Any]]]

_KILLED = "its process ended by force, perhaps for want of memory; run again to try it once more"


def prepared(todo: Sequence[Cell], maker: cells.Maker) -> list[Cell]:
    """Make the statistics that cells read; those whose text cannot be had are left out."""
    failed: dict[str, bool] = {}
    for cell in todo:
        name = cell.calibration.name
        if name in failed or not reads_statistics(cell.entry):
            continue
        try:
            refuse_gram(cell.entry, maker.model)
            cell.entry.method.accept(cell.budget)
        except MoepruneError:
            continue  # a row that says so, whoever makes it
        try:
            maker.scoring.path(cell.calibration)
            failed[name] = False
        except OutputError:
            raise
        except MoepruneError:
            failed[name] = True
    return [
        cell
        for cell in todo
        if not (reads_statistics(cell.entry) and failed.get(cell.calibration.name))
    ]


@dataclass
class _Task:
    """What a lane is doing."""

    lane: Lane
    cell: Cell | None = None
    group: Group = field(default_factory=list)


@dataclass
class Fanning:
    """Deals cells out and hands on what comes back.

    Attributes:
        lanes: the processes.
        size: checkpoints that may be measured together by one process alone.
        made: told the row of a cell that was tried; gives it back if it can be measured.
        measured: told what became of a group.
    """

    lanes: Sequence[Lane]
    size: int
    made: Callable[[Cell, dict[str, Any]], dict[str, Any] | None]
    measured: Callable[[Group, Measured], None]
    _shares: deque[deque[Cell]] = field(default_factory=deque)
    _share_of: dict[int, deque[Cell]] = field(default_factory=dict)
    _waiting: Group = field(default_factory=list)
    _alone: list[Group] = field(default_factory=list)
    _running: dict[Future[Any], _Task] = field(default_factory=dict)
    _left: list[Cell] = field(default_factory=list)

    def run_all(
        self,
        todo: Sequence[Cell],
        known: Mapping[str, dict[str, Any] | None],
        tell: Callable[[Sequence[Cell]], None],
    ) -> None:
        """Compute all cells of ``todo``; ``tell`` is told which are left whenever some are done.

        Raises:
            OutputError: what is finished is kept.
        """
        self._shares, self._left = _shares(todo), list(todo)
        while True:
            idle = [lane for lane in self.lanes if lane not in self._busy()]
            for lane in idle:
                self._start(lane, known)
            if not self._running:
                return
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            before = len(self._left)
            for future in done:
                self._finish(future, self._running.pop(future))
            if len(self._left) < before:
                tell(self._left)

    def _busy(self) -> list[Lane]:
        return [task.lane for task in self._running.values()]

    def _start(self, lane: Lane, known: Mapping[str, dict[str, Any] | None]) -> None:
        """Give a lane the next thing to do, if there is one."""
        limit = max(1, self.size // len(self.lanes))
        if self._alone:
            self._measure(lane, self._alone.pop())
        elif len(self._waiting) >= limit:
            self._measure(lane, self._waiting[:limit])
            del self._waiting[:limit]
        elif share := self._next_share(lane):
            cell = share.popleft()
            self._running[lane.make(cell, known.get(cell.key))] = _Task(lane, cell)
        elif self._waiting:
            idle = len(self.lanes) - len(self._running)
            count = -(-len(self._waiting) // idle)
            self._measure(lane, self._waiting[:count])
            del self._waiting[:count]

    def _next_share(self, lane: Lane) -> deque[Cell] | None:
        place = self.lanes.index(lane)
        if not self._share_of.get(place) and self._shares:
            self._share_of[place] = self._shares.popleft()
        return self._share_of.get(place)

    def _measure(self, lane: Lane, group: Group) -> None:
        slugs = {cell.key: cell.slug for cell, _ in group}
        self._running[lane.measure(slugs)] = _Task(lane, group=group)

    def _finish(self, future: Future[Any], task: _Task) -> None:
        if task.cell is not None:
            row = self.made(task.cell, self._row(future, task.lane, task.cell))
            if row is None:
                self._left.remove(task.cell)
            else:
                self._waiting.append((task.cell, row))
            return
        try:
            result = future.result()
        except EndedError:
            task.lane.restart()
            if len(task.group) > 1:  # one by one, to find which it was
                self._alone += [[one] for one in task.group]
                return
            result = Measured({}, {}, {cell.key: _KILLED for cell, _ in task.group}, 0.0)
        for cell, _ in task.group:
            self._left.remove(cell)
        self.measured(task.group, result)

    @staticmethod
    def _row(future: Future[Any], lane: Lane, cell: Cell) -> dict[str, Any]:
        try:
            found: dict[str, Any] = future.result()
        except OutputError:
            raise
        except EndedError:
            lane.restart()
            return cells.begun(cell) | {"status": cells.FAILED, "reason": _KILLED}
        except Exception as error:  # somebody else's method may not travel between processes
            return cells.begun(cell) | {"status": cells.FAILED, "reason": said(error)}
        return found


def _shares(todo: Sequence[Cell]) -> deque[deque[Cell]]:
    """Cells that belong together, in the order in which they were asked for."""
    found: dict[tuple[str, str], deque[Cell]] = {}
    for cell in todo:
        found.setdefault((cell.entry.label, cell.calibration.name), deque()).append(cell)
    return deque(found.values())
