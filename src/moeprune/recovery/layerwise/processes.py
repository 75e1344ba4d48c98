"""Layers that are independent, shared by several processes."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from torch.multiprocessing.spawn import (
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import Domain
from moeprune.recovery.layerwise.healer import Healer, Tell
from moeprune.recovery.layerwise.state import LayerFolder
from moeprune.recovery.training import Training

_POLL = 0.2


@dataclass(frozen=True)
class Work:
    """What every process is given.

    Attributes:
        student, teacher: checkpoints.
        made: what to do.
        folder: where layers go.
        device: where to compute.
        train, held: sequences.
    """

    student: Checkpoint
    teacher: Checkpoint
    made: Training
    folder: LayerFolder
    device: torch.device
    train: Sequence[Domain]
    held: Sequence[Domain]

    def do(self, wanted: Sequence[int], tell: Tell) -> None:
        """Heal some layers in this process."""
        healer = Healer(self.student, self.teacher, self.made, self.folder, self.device, tell)
        healer.run(self.train, self.held, wanted)


def share(wanted: Sequence[int], rank: int, world: int) -> list[int]:
    """The layers of one of ``world`` processes."""
    return list(wanted[rank::world])


def in_processes(work: Work, wanted: Sequence[int], world: int, tell: Tell) -> None:
    """Heal layers in ``world`` processes of this machine, and wait for them.

    Raises:
        MoepruneError: what one of them raised, or one ended by force; the others are ended too.
            Layers that are done stay done.
    """
    context = get_context("spawn")
    told, failed = context.Queue(), context.Queue()
    # a checkpoint knows headers that the process had better read again than receive
    bare = replace(work, student=_bare(work.student), teacher=_bare(work.teacher))
    running = start_processes(
        _run, (bare, list(wanted), world, told, failed), world, join=False, start_method="spawn"
    )
    assert running is not None
    try:
        while not running.join(timeout=_POLL):
            _hand_on(told, tell)
        _hand_on(told, tell)
    except ProcessRaisedException as error:
        try:
            problem, hint = failed.get(timeout=1)
        except queue.Empty:
            raise error from None
        raise MoepruneError(problem, hint) from error
    except ProcessExitedException as error:
        raise MoepruneError(
            f"a process ended by force ({error.signal_name or error.exit_code}): it may have had "
            "too little memory",
            "go on with --resume, perhaps with fewer --processes",
        ) from error


def _bare(checkpoint: Checkpoint) -> Checkpoint:
    return Checkpoint(checkpoint.path, checkpoint.trust_remote_code)


def _hand_on(told: Any, tell: Tell) -> None:
    while True:
        try:
            tell(*told.get_nowait())
        except queue.Empty:
            return


def _run(rank: int, work: Work, wanted: list[int], world: int, told: Any, failed: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    try:
        work.do(share(wanted, rank, world), lambda *item: told.put(item))
    except MoepruneError as error:
        failed.put((error.problem, error.hint))
        failed.close()
        failed.join_thread()
        raise
