"""Adding up in an order that does not depend on how the work was split.

Floating-point sums depend on their order. Here the parts 0, 1, 2, ... are added in a tree: eight
parts make a node, eight nodes a node of the next level, and inside a node parts are added from left
to right. A run of parts that begins anywhere adds up the nodes that lie inside it and hands on the
others, so that runs put together give the bits of a single run. The error grows with the logarithm
of the number of parts (pairwise summation, Higham 1993, doi:10.1137/0914050).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Protocol, TypeVar

FANOUT = 8
"""Parts of a node."""


class Mergeable(Protocol):
    """What can be added up."""

    def merge(self, other: Any) -> None:
        """Add ``other`` to this."""
        ...


S = TypeVar("S", bound=Mergeable)


@lru_cache
def held(parts: int, start: int = 0) -> int:
    """How many sums a run of so many parts from ``start`` on holds at once, at most.

    One per level, and what waits for its neighbours in another run: fewer than eight per level.
    """
    fold, found = Fold[_Nothing](start), 1
    for _ in range(parts):
        fold.add(_Nothing())
        found = max(found, fold.held)
    return found


class _Nothing:
    """A part without content."""

    def merge(self, other: _Nothing) -> None:
        """Nothing is added."""


@dataclass(frozen=True)
class Piece(Generic[S]):
    """A sum that waits for its neighbours.

    Attributes:
        level: it counts as children of this level: 0 are single parts.
        span: parts that it is the sum of.
        part: the sum.
    """

    level: int
    span: int
    part: S


class Fold(Generic[S]):
    """Adds up a run of parts, which it takes over and changes.

    Args:
        start: the position of the run's first part among all parts.
    """

    def __init__(self, start: int = 0) -> None:
        self.start = self.at = start
        self._whole: list[Piece[S]] = []
        self._open: dict[int, tuple[int, S]] = {}

    def add(self, part: S, level: int = 0, span: int = 1) -> None:
        """Add what comes next: a part, or with ``level`` and ``span`` a piece of another run."""
        begin, self.at = self.at, self.at + span
        while True:
            size: int = FANOUT ** (level + 1)
            node = begin // size * size
            if node < self.start:  # its first children are another run's
                self._whole.append(Piece(level, span, part))
                return
            if level in self._open:
                begin, known = self._open[level]
                known.merge(part)
                part = known
            self._open[level] = begin, part
            if self.at % size:
                return
            del self._open[level]
            begin, span, level = node, size, level + 1

    @property
    def held(self) -> int:
        """How many sums there are now."""
        return len(self._whole) + len(self._open)

    def pieces(self) -> list[Piece[S]]:
        """What was added, in order, as far as it could be summed without what stands before it."""
        found, end = [], self.at
        for level, (begin, part) in sorted(self._open.items()):
            found.append(Piece(level, end - begin, part))
            end = begin
        return self._whole + found[::-1]

    def total(self) -> S | None:
        """The sum of all parts, of a run from the first; None if there are none."""
        assert self.start == 0, "a run from the middle has pieces"
        total: S | None = None
        for _, (_, part) in sorted(self._open.items()):
            if total is not None:
                part.merge(total)
            total = part
        self._open.clear()
        return total
