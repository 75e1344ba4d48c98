"""Commands under a launcher of several processes: which can share their work, and who speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from moeprune.cli import output
from moeprune.errors import MoepruneError
from moeprune.models.ranks import ALONE, Ranks, joined

SHARED = ("calibrate", "plan", "evaluate")
_OWN = ("recover",)  # speaks to the others in its own way


class _Session:
    """The processes of the command that runs."""

    stack = ExitStack()
    ranks: Ranks = ALONE


@contextmanager
def session() -> Iterator[None]:
    """As long as a command runs: what it joined is left when the block ends, however it ends."""
    try:
        with ExitStack() as _Session.stack:
            yield
    finally:
        _Session.ranks = ALONE


def begin(command: str | None) -> None:
    """Join the other processes, if a launcher started several; all but the first fall silent.

    Raises:
        MoepruneError: this command is the work of one process.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or command is None or command in _OWN:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        output.ERR.quiet = True
    if command not in SHARED:
        raise MoepruneError(
            f"moeprune {command} is the work of one process, and a launcher started several",
            f"run it without torchrun; {', '.join((*SHARED, *_OWN))} can share their work",
        )
    _Session.ranks = _Session.stack.enter_context(joined())


def ranks() -> Ranks:
    """The processes that share this command."""
    return _Session.ranks
