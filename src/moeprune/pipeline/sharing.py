"""A calibration by several processes: which text is whose, and where each keeps what is done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from moeprune.core.residual import Residual
from moeprune.errors import DataError
from moeprune.models import data
from moeprune.models.ranks import Ranks
from moeprune.models.walk import Batch
from moeprune.work import RUN


def own_batches(
    domains: Sequence[data.Domain], seed: int, ranks: Ranks
) -> tuple[Sequence[Batch], int]:
    """The batches of this process, and how many stand before them.

    Raises:
        DataError: there is not one for each process.
    """
    batches = data.batches(domains, seed)
    if ranks.size > max(1, len(batches)):
        raise DataError(
            f"{ranks.size} processes cannot share {len(batches)} batches of "
            f"{data.TOKENS_PER_BATCH} tokens",
            f"start at most {len(batches)} processes, or give more --sequences",
        )
    own = ranks.run_of(len(batches))
    return batches[own], own.start


def merged(parts: Sequence[Residual]) -> Residual:
    """The angles that all processes saw, in order of ranks, which is that of the text."""
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    return total


def kept_by(
    out: Path, stage: str, ranks: Ranks, identity: Mapping[str, Any]
) -> tuple[Path, str, dict[str, Any]]:
    """For ``work_folder``: beside ``out``, and where this is not the first process its own.

    A state is of some of the batches, so it fits the same number of processes only.
    """
    if ranks.size == 1:
        return out, stage, dict(identity)
    place = out if ranks.first else out.with_name(_name(out, f"{ranks.rank:05d}"))
    return place, stage, {**identity, "processes": ranks.size, "process": ranks.rank}


def drop_others(out: Path, stage: str) -> None:
    """Remove what other processes kept, of this run or of one that was given up."""
    for folder in out.parent.glob(f"{escape(_name(out, ''))}{'[0-9]' * 5}.{stage}"):
        if (folder / RUN).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _name(out: Path, rank: str) -> str:
    return f"{out.name}.rank-{rank}"
