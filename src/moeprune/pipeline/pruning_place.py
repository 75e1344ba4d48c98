"""Where calibrate, plan and apply in one go keep what they make before the checkpoint is there.

``<out>.pruning`` holds finished statistics and plans, and the work folders of those that are not.
Statistics fit any method and budget that reads them, so that another budget finds them again. A
recipe keeps the same for each of its steps, see ``kept_steps``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Method
from moeprune.core.plan import Plan
from moeprune.core.targets import Target
from moeprune.errors import MoepruneError, PlanError
from moeprune.files import sha256_bytes, sha256_file
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.store import StatisticsStore, read_plan, versions
from moeprune.pipeline.inputs import Compute, Text, code_of, hash_beside, hash_of_sources
from moeprune.work import WorkFolder, work_folder

PRUNING = "pruning"
_PARTS = ("statistics-", "plan-", "step-", "output")
_SUM = ".sha256"


_TOKENIZER = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def inputs_of(checkpoint: Checkpoint, text: Text, compute: Compute) -> dict[str, Any]:
    """What decides statistics, but for what is collected."""
    return {
        "model": checkpoint.fingerprint,
        "code": code_of(checkpoint),
        "tokenizer": hash_beside(checkpoint, *_TOKENIZER),
        "text": text_of(text),
        "dtype": compute.dtype,
        "device": compute.usable_device().type,
        "versions": versions(),
    }


def text_of(text: Text, kind: str = "calibration") -> str:
    """What identifies text before it is read, and how much of it is drawn."""
    settings = f"{text.sequences} x {text.length}, seed {text.seed}, {dict(text.mix)}"
    return f"{settings}, {hash_of_sources(text.sources, kind)}"


@contextmanager
def pruning_place(
    out: Path, identity: Mapping[str, Any], force: bool, stage: str = PRUNING
) -> Iterator[WorkFolder]:
    """A directory beside ``out`` that stays after an interruption if anything was made in it."""
    with work_folder(out, stage, identity, force) as folder:
        folder.write("begun", b"")
        try:
            yield folder
            folder.announce()
        except BaseException:
            if not any(entry.name.startswith(_PARTS) for entry in folder.path.iterdir()):
                folder.remove("begun")
            raise


def finished_statistics(path: Path, needs: set[str]) -> bool:
    """Whether whole statistics stand there that hold ``needs``; others are removed."""
    if path.exists():
        try:
            if needs <= {*StatisticsStore.open(path).manifest["collect"]}:
                return True
        except MoepruneError:  # damaged
            pass
        shutil.rmtree(path)
    return False


def plan_name(
    method: Method,
    budget: Budget | Target,
    uniform: bool,
    seed: int,
    constraints: Constraints,
    writing: Writing,
    statistics: Path | None,
) -> str:
    """A file's name that says what was asked for."""
    known = None if statistics is None else StatisticsStore.open(statistics).summary["sha256"]
    asked = repr((method, budget, uniform, seed, constraints, writing, known))
    return f"plan-{sha256_bytes(asked.encode())[:12]}.json"


def keep_plan(folder: WorkFolder, name: str) -> None:
    """Note the checksum of a plan that was written into ``folder``; it names its other files'."""
    folder.write(f"{name}{_SUM}", sha256_file(folder.path / name).encode())


def kept_plan(folder: WorkFolder, name: str) -> Plan | None:
    """A plan that was decided before an interruption; a damaged one is removed, with a note.

    One without a checksum was written whole, just before the interruption.
    """
    file = folder.path / name
    if not file.exists():
        return None
    told = folder.read(f"{name}{_SUM}")
    if told in (None, sha256_file(file).encode()):
        try:
            return read_plan(file)
        except PlanError:  # of its other files
            pass
    folder.note(f"{file} is damaged, and is made again")
    file.unlink()
    return None
