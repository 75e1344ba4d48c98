"""Processes that make and measure cells: of this machine, or actors of a Ray cluster.

Each computes one thing at a time with its share of the cores, and keeps between two cells what a
method has found out. If one ends by force, only what it was doing is lost.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import Domain
from moeprune.models.editing import Writing
from moeprune.models.threads import cores, use_cores
from moeprune.pipeline.arena.asking import Cell
from moeprune.pipeline.arena.cell import Maker
from moeprune.pipeline.arena.measuring import Measured, Measuring
from moeprune.pipeline.arena.scoring import Scoring
from moeprune.pipeline.arena.state import STATISTICS, Run
from moeprune.pipeline.inputs import Compute, silent, unheard


class EndedError(Exception):
    """The process ended before it was done."""


@dataclass(frozen=True)
class LaneWork:
    """What every process is given.

    Attributes:
        source: the model.
        folder: of the comparison, on a disk that all share.
        collect: what its statistics hold.
        compute, writing: as in the stages.
        windows: held-out text.
        place: the working directory, in which relative paths are meant.
    """

    source: str
    folder: Path
    collect: Sequence[str]
    compute: Compute
    writing: Writing
    windows: Sequence[Domain]
    place: Path = field(default_factory=Path.cwd)


class _Elsewhere(Run):
    """The comparison as a process sees it that may not write what is known."""

    def save(self, key: str | None = None, cell: dict[str, Any] | None = None) -> None:
        """Nothing: rows are handed back."""


class Worker:
    """The inside of such a process.

    Args:
        work: what it is given.
        threads: cores that it computes with; 0 leaves them as they are.
    """

    def __init__(self, work: LaneWork, threads: int = 0) -> None:
        if threads:
            use_cores(threads)
        os.chdir(work.place)
        self._run = _Elsewhere(work.folder, {})
        trust = work.compute.trust_remote_code
        model = work.compute.open(Checkpoint.open(work.source, trust))
        scoring = Scoring(
            work.source, work.folder / STATISTICS, model.checkpoint.fingerprint,
            work.collect, work.compute, silent,
        )  # fmt: skip
        self._maker = Maker(
            work.source, model, self._run, scoring, work.compute, work.writing, silent
        )
        self._measuring = Measuring(work.source, work.windows, work.compute, silent)

    def make(self, cell: Cell, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """As ``Maker.attempt``."""
        return self._maker.attempt(cell, known)

    def measure(self, slugs: Mapping[str, str]) -> Measured:
        """The checkpoints of cells, by key."""
        folders = {key: self._run.work / slug for key, slug in slugs.items()}
        return self._measuring.measure(folders)


class Lane(Protocol):
    """One process from outside. Futures raise ``EndedError`` if it ended by force."""

    def make(self, cell: Cell, known: Mapping[str, Any] | None) -> Future[Any]:
        """Start on a cell."""
        ...

    def measure(self, slugs: Mapping[str, str]) -> Future[Any]:
        """Start to measure checkpoints."""
        ...

    def restart(self) -> None:
        """Begin anew after it ended."""
        ...

    def end(self) -> None:
        """End it, whatever it is doing."""
        ...


@dataclass(frozen=True)
class Fan:
    """How many processes, and where.

    Raises:
        MoepruneError: ``jobs`` is no such number, or Ray is asked for and not installed.

    Attributes:
        jobs: how many.
        ray: of a Ray cluster: its address, ``auto`` for the one that this machine is part of, or
            ``local`` for a new one on this machine; None for plain processes of this machine.
    """

    jobs: int
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise MoepruneError(f"--jobs must be at least 1 (got {self.jobs})")
        if self.ray is not None and find_spec("ray") is None:
            raise MoepruneError("--ray: Ray is not installed", "pip install 'moeprune[ray]'")

    def share(self, compute: Compute) -> Compute:
        """What each of them may use; there is nobody whom it could tell something."""
        memory = None if compute.memory is None else compute.memory // self.jobs
        return replace(compute, memory=memory, tell=unheard, profile=None)

    @contextmanager
    def lanes(self, work: LaneWork) -> Iterator[Sequence[Lane]]:
        """The processes, for as long as the block runs.

        Raises:
            MoepruneError: there is no such cluster.
        """
        if self.ray is None:
            threads = max(1, cores() // self.jobs)
            with _ended([_Process(work, threads) for _ in range(self.jobs)]) as lanes:
                yield lanes
            return
        from moeprune.pipeline.arena.ray_lanes import connected, ray_lanes  # noqa: PLC0415

        with connected(self.ray), _ended(ray_lanes(work, self.jobs)) as lanes:
            yield lanes


@contextmanager
def _ended(lanes: Sequence[Lane]) -> Iterator[Sequence[Lane]]:
    """None of them outlives the block."""
    try:
        yield lanes
    finally:
        for lane in lanes:
            lane.end()


_HERE: list[Worker] = []
"""The worker of this process, once there is one."""


def _enter(work: LaneWork, threads: int) -> None:
    """The beginning of a process: it ends with the one that started it, and not by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    use_cores(threads)
    _HERE[:] = [Worker(work)]


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _make(cell: Cell, known: Mapping[str, Any] | None) -> dict[str, Any]:
    return _HERE[0].make(cell, known)


def _measure(slugs: Mapping[str, str]) -> Measured:
    return _HERE[0].measure(slugs)


class _Process:
    """A process of this machine: a pool of one, so that its end breaks nothing else."""

    def __init__(self, work: LaneWork, threads: int) -> None:
        self._given = work, threads
        self._begin()

    def _begin(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _enter, self._given)
        self._pid = self._submit(os.getpid)

    def _submit(self, call: Callable[..., Any], *given: Any) -> Future[Any]:
        return translated(lambda: self._pool.submit(call, *given), BrokenProcessPool)

    def make(self, cell: Cell, known: Mapping[str, Any] | None) -> Future[Any]:
        """Start on a cell."""
        return self._submit(_make, cell, known)

    def measure(self, slugs: Mapping[str, str]) -> Future[Any]:
        """Start to measure checkpoints."""
        return self._submit(_measure, slugs)

    def restart(self) -> None:
        """Begin anew after it ended."""
        self._pool.shutdown(wait=False)
        self._begin()

    def end(self) -> None:
        """End it, whatever it is doing."""
        if self._pid.done() and self._pid.exception() is None:
            with suppress(ProcessLookupError):
                os.kill(self._pid.result(), signal.SIGTERM)
        self._pool.shutdown(wait=True, cancel_futures=True)


def translated(
    start: Callable[[], Future[Any]], ended: type[BaseException], wrapper: type | None = None
) -> Future[Any]:
    """A future of ours, whose error is ``EndedError`` where another's is of type ``ended``.

    Errors of type ``wrapper`` stand for their ``cause``.
    """
    ours: Future[Any] = Future()

    def done(theirs: Future[Any]) -> None:
        if theirs.cancelled():
            ours.set_exception(EndedError())
            return
        error = theirs.exception()
        if error is None:
            ours.set_result(theirs.result())
        else:
            if wrapper is not None and isinstance(error, wrapper):
                error = getattr(error, "cause", error)
            ours.set_exception(EndedError() if isinstance(error, ended) else error)

    try:
        start().add_done_callback(done)
    except ended:
        ours.set_exception(EndedError())
    return ours
