"""What is wrong with a compressed checkpoint, and whether its plan makes it of the original."""

from __future__ import annotations

import os
from pathlib import Path

from moeprune.errors import CheckpointError, MoepruneError, PlanError
from moeprune.models.checkpoint import DEMO, Checkpoint, demo_path
from moeprune.pipeline.inputs import Compute, Progress, Source, silent
from moeprune.verification.finding import Verification
from moeprune.verification.logits import TOLERANCE
from moeprune.verification.reference import Reference
from moeprune.verification.run import run
from moeprune.verification.subject import Subject


def verify(
    source: Source,
    against: Source | None = None,
    plan: Source | None = None,
    values: bool = True,
    compute: Compute = Compute(dtype="float32"),
    progress: Progress = silent,
) -> Verification:
    """Check a checkpoint, ours or a stranger's; nothing of it is executed.

    Args:
        source: its directory, or ``demo``.
        against: the model that it was made from. Tensors are compared byte for byte, and logits
            with those of the original in which the same experts are left out or replaced.
        plan: what was done; by default the copy in the checkpoint, and without one what the bytes
            of the experts show.
        values: read all values; without, only headers and JSON are read.
        compute: where and in which type logits are compared.
        progress: as in the other stages.

    Raises:
        MoepruneError: there is no such directory, or the original or the plan cannot be read.
            Whatever is wrong with the checkpoint itself is a finding.
    """
    text = os.fspath(source)
    path = demo_path() if text == DEMO and not Path(text).is_dir() else Path(text)
    if not path.is_dir():
        raise CheckpointError(
            f"no such directory: {path}", "give the directory of a checkpoint, or demo"
        )
    subject = Subject(path.resolve(), values, progress)
    if against is None and plan is not None:
        raise MoepruneError("a plan is compared with the original", "add --against MODEL")
    if against is not None:
        if compute.dtype not in TOLERANCE:
            raise MoepruneError(f"cannot compare in {compute.dtype!r}", ", ".join(TOLERANCE))
        file = None if plan is None else Path(plan)
        if file is not None and not file.exists():
            raise PlanError(f"no plan at {file}", "give the output of moeprune plan")
        original = Checkpoint.open(against)
        subject.reference = Reference(
            original, file, subject, compute.device, compute.dtype, compute.limits
        )
        compute.open(original)  # a device or an original that cannot be used shows now
    return run(subject)
