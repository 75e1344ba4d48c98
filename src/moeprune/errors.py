"""Errors that a user can mend; the command line prints them in one or two lines and exits 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoepruneError(Exception):
    """Something the user can mend.

    Args:
        problem: what is wrong, in one line.
        hint: what to run or change instead, in one line; empty if the problem says it all.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"{problem}\n{hint}" if hint else problem)
        self.problem = problem
        self.hint = hint


class CheckpointError(MoepruneError):
    """The directory is not a checkpoint that can be read, or is damaged."""


class UnsupportedModelError(MoepruneError):
    """The model is valid but this operation cannot be done on it; the message names the reason."""


class PlanError(MoepruneError):
    """The plan is malformed, impossible for this model, or made for another one."""


class BudgetError(MoepruneError):
    """The budget is out of range, or not one that the method understands."""


class DataError(MoepruneError):
    """The calibration or evaluation text cannot be used."""


class OutputError(MoepruneError):
    """The output exists already, or could not be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known name closest to ``name``, or lists all if none is close."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}? known: {', '.join(options)}"
    return f"known: {', '.join(options)}"
