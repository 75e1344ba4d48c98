"""Actors of a Ray cluster that make and measure cells. Loaded only where Ray is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from moeprune.errors import MoepruneError
from moeprune.pipeline.arena.asking import Cell
from moeprune.pipeline.arena.lanes import Lane, LaneWork, Worker, translated


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Join a cluster, and leave it when the block ends.

    Args:
        address: as of ``ray.init``; ``local`` starts a cluster on this machine, which then ends.

    Raises:
        MoepruneError: there is none.
    """
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise MoepruneError(
            f"--ray {address}: no such cluster ({why})",
            "ray start --head, or --ray local for processes of this machine",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def ray_lanes(work: LaneWork, jobs: int) -> list[Lane]:
    """``jobs`` actors, each with its share of the cluster's cores."""
    found = int(ray.cluster_resources().get("CPU", 1))
    if found < jobs:
        raise MoepruneError(
            f"--jobs {jobs}, and the Ray cluster has {found} cores", f"give --jobs {found} or fewer"
        )
    return [_Actor(work, found // jobs) for _ in range(jobs)]


class _Actor:
    """One actor; see ``Lane``."""

    def __init__(self, work: LaneWork, threads: int) -> None:
        self._given, self._threads = ray.put(work), threads
        self.restart()

    def restart(self) -> None:
        """Begin anew after it ended."""
        kind = ray.remote(num_cpus=self._threads, max_restarts=0, max_task_retries=0)(Worker)
        self._actor = kind.remote(self._given, self._threads)

    def make(self, cell: Cell, known: Mapping[str, Any] | None) -> Future[Any]:
        """Start on a cell."""
        return self._future(self._actor.make.remote(cell, known))

    def measure(self, slugs: Mapping[str, str]) -> Future[Any]:
        """Start to measure checkpoints."""
        return self._future(self._actor.measure.remote(slugs))

    def end(self) -> None:
        """End it, whatever it is doing."""
        ray.kill(self._actor, no_restart=True)

    @staticmethod
    def _future(reference: Any) -> Future[Any]:
        return translated(reference.future, RayActorError, RayTaskError)
