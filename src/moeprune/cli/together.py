"""Commands under a launcher of several processes: which can share their work, and who speaks."""

from __future__ import annotations

import os
import sys

from moeprune.cli import output
from moeprune.errors import MoepruneError

SHARED = ("calibrate", "plan", "evaluate")
_OWN = ("recover",)  # speaks to the others in its own way


def begin(command: str | None) -> None:
    """Silence all processes but the first, and refuse what several processes cannot share.

    Raises:
        MoepruneError: this command is the work of one process.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" or command is None or command in _OWN:
        return
    if os.environ.get("RANK") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        output.ERR.quiet = True
    if command not in SHARED:
        raise MoepruneError(
            f"moeprune {command} is the work of one process, and a launcher started several",
            f"run it without torchrun; {', '.join((*SHARED, *_OWN))} can share their work",
        )
