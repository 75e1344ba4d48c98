"""Where calibrate, plan and apply in one go keep what they make before the checkpoint is there.

``<out>.pruning`` holds finished statistics and plans, and the work folders of those that are not.
Statistics fit any method and budget that reads them, so that another budget finds them again.
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
from moeprune.core.targets import Target
from moeprune.errors import MoepruneError
from moeprune.files import sha256_bytes
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.store import StatisticsStore, versions
from moeprune.pipeline.inputs import Compute, Text, code_of, hash_beside, hash_of_sources
from moeprune.work import work_folder

PRUNING = "pruning"
_PARTS = ("statistics-", "plan-")


_TOKENIZER = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def inputs_of(checkpoint: Checkpoint, text: Text, compute: Compute) -> dict[str, Any]:
    """What decides statistics, but for what is collected."""
    settings = f"{text.sequences} x {text.length}, seed {text.seed}, {dict(text.mix)}"
    return {
        "model": checkpoint.fingerprint,
        "code": code_of(checkpoint),
        "tokenizer": hash_beside(checkpoint, *_TOKENIZER),
        "text": f"{settings}, {hash_of_sources(text.sources, 'calibration')}",
        "dtype": compute.dtype,
        "device": compute.usable_device().type,
        "versions": versions(),
    }


@contextmanager
def pruning_place(out: Path, identity: Mapping[str, Any], force: bool) -> Iterator[Path]:
    """A directory beside ``out`` that stays after an interruption if anything was made in it."""
    with work_folder(out, PRUNING, identity, force) as folder:
        folder.write("begun", b"")
        try:
            yield folder.path
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
