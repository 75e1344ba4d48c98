"""Several processes over ``torch.distributed``: gloo, and nccl where tensors are on CUDA devices.

Before every exchange all processes tell each other whether they still work. One that failed takes
part in the next such round before it ends, so that nobody waits for it; one that was killed closes
its connections, which ends the others as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# has the group of all as a default: imported while there is one (by transformers, later), it would
# hold it, and its threads, to the end of the interpreter, which they can abort (exit code -6)
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from moeprune.core.folding import Fold, Piece
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import MoepruneError, OutputError
from moeprune.models.ranks import Ranks
from moeprune.models.threads import share_cores

_Failure = tuple[type[MoepruneError], str, str]
"""Kind, problem and hint."""
T = TypeVar("T")
S = TypeVar("S", bound=LayerStatistics)

_LONGEST = timedelta(hours=12)
"""Longer than a layer of the slowest process; one that has ended is not waited for."""
_CONTACT = timedelta(minutes=15)
"""For all to appear; as long as torchrun lets its launchers look for each other, and more."""


@dataclass
class _State:
    """Whether there is still somebody to talk to."""

    broken: bool = False


@dataclass(frozen=True)
class Joined(Ranks):
    """One of several processes that are connected."""

    state: _State = field(default_factory=_State)

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in order of ranks. All call it."""
        return self._round("gather", value)

    def broadcast(self, value: T | None) -> T:
        """The value of rank 0. All call it."""
        found: T = self._round("broadcast", value if self.first else None)[0]
        return found

    def barrier(self) -> None:
        """Wait for the others. All call it."""
        self._round("barrier", None)

    def total(self, fold: Fold[S], empty: Callable[[], S]) -> S:
        """The sum of what all have added up, in all of them. All call it.

        Pieces go to rank 0 in order of ranks, which puts them together; the total comes back.
        """
        pieces = fold.pieces()
        known = self._round("total", [_Outline.of(piece) for piece in pieces])
        whole: S | None = None
        if self.first:
            with self._unheard():  # the others are sending, and hear nothing
                whole = self._together(pieces, known[1:], empty)
        else:
            for piece in pieces:
                self._move(piece.part, lambda tensor: dist.send(tensor, dst=0))
        outline = self.broadcast(None if whole is None else _Outline.of(Piece(0, 0, whole)))
        result = whole if whole is not None else outline.blank(empty())
        self._move(result, lambda tensor: dist.broadcast(tensor, src=0))
        return result

    def _together(
        self, own: list[Piece[S]], others: list[list[_Outline]], empty: Callable[[], S]
    ) -> S:
        """Receive the pieces of all others, and add them up behind this process's own."""
        top: Fold[S] = Fold()
        for piece in own:
            top.add(piece.part, piece.level, piece.span)
        for rank, outlines in enumerate(others, start=1):
            for outline in outlines:
                part = outline.blank(empty())
                self._move(part, partial(dist.recv, src=rank))
                top.add(part, outline.level, outline.span)
        return top.total() or empty()

    def _move(self, part: LayerStatistics, move: Callable[[Tensor], object]) -> None:
        for _, _, tensor in _tensors(part):
            if tensor.numel():
                with self._talking():
                    move(tensor)

    def _round(self, what: str, value: Any, failure: _Failure | None = None) -> list[Any]:
        """Tell the others that all is well, or what failed, and hear the same from them."""
        told: list[Any] = [None] * self.size
        with self._talking():
            dist.all_gather_object(told, (what, value, failure))
        failures = {rank: said[2] for rank, said in enumerate(told) if said[2] is not None}
        if failures:
            self.state.broken = True
            rank, (kind, problem, hint) = next(iter(failures.items()))
            same = len(failures) == self.size
            raise kind(problem if same else f"process {rank}: {problem}", hint)
        if len({said[0] for said in told}) > 1:
            self.state.broken = True
            raise RuntimeError(f"processes are at different points: {[said[0] for said in told]}")
        return [said[1] for said in told]

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """Whatever goes wrong inside cannot be told: the others hear that the connection ends."""
        try:
            yield
        except BaseException:
            self.state.broken = True
            raise

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """What torch says when nobody answers, as an error of ours."""
        try:
            with self._unheard():
                yield
        except RuntimeError as error:
            raise MoepruneError(
                "the connection to another process broke: it ended by force, perhaps for want of "
                "memory, or hangs",
                "look at what the launcher says of it, and start all of them again",
            ) from error

    def leave(self, error: Exception | None) -> None:
        """Tell the others that this process is done, or has failed."""
        if self.state.broken:
            return
        if error is None:
            self._round("end", None)
            return
        kind = MoepruneError
        if isinstance(error, MoepruneError):
            said = error.problem, error.hint
            if not isinstance(error, OutputError):  # that is of files that are its own
                kind = type(error)
        else:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", ""
        with suppress(MoepruneError):
            self._round("failed", None, (kind, *said))


@dataclass(frozen=True)
class _Outline:
    """Sizes of a sum that is to come."""

    level: int
    span: int
    tokens: int
    sizes: tuple[tuple[str, str, tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, piece: Piece[S]) -> _Outline:
        sizes = tuple(
            (name, key, tuple(tensor.shape), tensor.dtype)
            for name, key, tensor in _tensors(piece.part)
        )
        return cls(piece.level, piece.span, piece.part.tokens, sizes)

    def blank(self, empty: S) -> S:
        """Room for it: ``empty`` with tensors of these sizes."""
        empty.tokens = self.tokens
        for name, key, size, dtype in self.sizes:
            old = getattr(empty.parts[name], key)
            setattr(empty.parts[name], key, torch.empty(size, dtype=dtype, device=old.device))
        return empty


def _tensors(part: LayerStatistics) -> list[tuple[str, str, Tensor]]:
    """All sums, in an order that is the same everywhere; they can be sent and filled."""
    found = []
    for name, sums in sorted(part.parts.items()):
        for key, tensor in list(sums.tensors()):
            if not tensor.is_contiguous():
                setattr(sums, key, tensor.contiguous())
            found.append((name, key, getattr(sums, key)))
    return found


def _connect(me: Ranks, backend: str, wait: timedelta = _CONTACT) -> None:
    """Open the connections, once all have appeared.

    Raises:
        MoepruneError: they have not after ``wait``; the message says who is missing.
    """
    minutes = f"{wait.total_seconds() / 60:.3g} minutes"
    missing: list[int] = []
    try:
        store, _, _ = next(rendezvous("env://", me.rank, me.size, timeout=wait))
        here = [f"moeprune/{rank}" for rank in range(me.size)]
        store.set(here[me.rank], "here")
        try:
            store.wait(here, wait)
        except RuntimeError:
            missing = [rank for rank, key in enumerate(here) if not store.check([key])]
            if not missing:
                raise
        else:
            store.set_timeout(_LONGEST)
            dist.init_process_group(
                backend, store=store, rank=me.rank, world_size=me.size, timeout=_LONGEST
            )
            return
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise MoepruneError(f"the other processes cannot be reached: {why}") from error
    raise MoepruneError(
        f"{len(missing)} of {me.size} processes did not appear within {minutes}: "
        f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}",
        "look at what the launcher says of them, and start all of them again",
    )


@contextmanager
def world(me: Ranks) -> Iterator[Joined]:
    """The processes that were launched with this one, connected."""
    ours = not dist.is_initialized()
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    share_cores(me.local_size)
    if cuda and me.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(me.local_rank)
    if ours:
        _connect(me, "cpu:gloo,cuda:nccl" if cuda else "gloo")
    ranks = Joined(**asdict(me))
    try:
        try:
            yield ranks
        except Exception as error:
            ranks.leave(error)
            raise
        ranks.leave(None)
    finally:
        if ours:
            dist.destroy_process_group()
