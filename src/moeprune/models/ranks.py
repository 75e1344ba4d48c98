"""Who works with whom: the processes that one launcher started on one task (torchrun, srun).

``ALONE`` is the world of one process; nothing is imported or exchanged for it. What all processes
call in the same order is marked so: it ends only when all have come there, and if one of them has
failed meanwhile, all fail with its message.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from moeprune.errors import MoepruneError

if TYPE_CHECKING:
    from moeprune.core.folding import Fold
    from moeprune.core.statistics import LayerStatistics

T = TypeVar("T")
S = TypeVar("S", bound="LayerStatistics")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Ranks:
    """This process among the others; by itself one that is alone.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number on this machine.
        local_size: how many are on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Where this process computes: with ``cuda``, on the device of its local number."""
        return f"cuda:{self.local_rank}" if name == "cuda" and self.size > 1 else name

    def run_of(self, count: int) -> slice:
        """Which of ``count`` things in a row are its own."""
        return run_of(count, self.rank, self.size)

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in order of ranks. All call it."""
        return [value]

    def broadcast(self, value: T | None) -> T:
        """The value of rank 0. All call it."""
        assert value is not None
        return value

    def barrier(self) -> None:
        """Wait for the others. All call it."""

    def total(self, fold: Fold[S], empty: Callable[[], S]) -> S:
        """The sum of what all have added up, in all of them. All call it."""
        return fold.total() or empty()


ALONE = Ranks()


def run_of(count: int, rank: int, size: int) -> slice:
    """One of ``size`` runs of ``count`` things; their lengths differ by one at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


def dealt(costs: Sequence[float], size: int) -> list[list[int]]:
    """Indices of things, shared by ``size``: the most costly first, to each in turn.

    Of equal ones, thing i goes to i mod ``size``.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    return [order[rank::size] for rank in range(size)]


def launched() -> Ranks:
    """What a launcher says in the environment of this process; without one, ``ALONE``.

    Raises:
        MoepruneError: what it says makes no sense.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    try:
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in _VARIABLES)
    except (KeyError, ValueError) as error:
        raise MoepruneError(
            f"WORLD_SIZE is set, but {' and '.join(_VARIABLES)} are no whole world ({error})",
            "start several processes with torchrun, or unset WORLD_SIZE",
        ) from error
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise MoepruneError(f"process {rank} of {size} ({local_rank} of {local_size} here)")
    return Ranks(rank, size, local_rank, local_size)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The world that this process was launched into, for as long as the block runs.

    If the block fails in one process, it fails in all of them. Each process takes its share of the
    machine's cores.

    Raises:
        MoepruneError: the others cannot be reached.
    """
    me = launched()
    if me.size == 1:
        yield ALONE
        return
    from moeprune.models.joining import world  # noqa: PLC0415  (not for a world of one)

    with world(me) as ranks:
        yield ranks
