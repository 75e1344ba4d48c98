"""How long the rest takes, from what the finished cells took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from moeprune.pipeline.arena.asking import Cell


class Clock:
    """Seconds by stage: planning differs by method, the rest does not."""

    def __init__(self) -> None:
        self._plans: dict[str, list[float]] = defaultdict(list)
        self._others: dict[str, list[float]] = defaultdict(list)
        self._walks: dict[str, bool] = {}

    def planned(self, cell: Cell, seconds: float) -> None:
        """A plan was made in ``seconds``."""
        self._walks[cell.entry.label] = cell.entry.method.sequential
        self._plans[cell.entry.label].append(seconds)

    def took(self, stage: str, seconds: float) -> None:
        """One cell spent ``seconds`` in ``stage``."""
        self._others[stage].append(seconds)

    def remaining(self, cells: Sequence[Cell], unmeasured: int) -> float | None:
        """Seconds for ``cells``, and for measuring ``unmeasured`` more; None if nothing is known.

        A method that was not planned yet is expected to take what others of its sort took: those
        that walk the model are far slower than those that read statistics.
        """
        if not self._others["evaluate"]:
            return None
        other = _mean(self._others["apply"]) * len(cells)
        other += _mean(self._others["evaluate"]) * (len(cells) + unmeasured)
        return other + sum(self._plan(cell) for cell in cells)

    def _plan(self, cell: Cell) -> float:
        own = self._plans.get(cell.entry.label)
        if own:
            return _mean(own)
        walks = cell.entry.method.sequential
        alike = [
            seconds
            for label, values in self._plans.items()
            if self._walks[label] == walks
            for seconds in values
        ]
        return _mean(alike) if alike else _mean(v for vs in self._plans.values() for v in vs)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def spoken(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3 h 20 min``: an estimate has no more digits than that."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
