"""A recovery as one of several steps: what can be refused before the first one, and its run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeprune.errors import MoepruneError, OutputError, UnsupportedModelError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.quantised import Quantisation
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    code_of,
    model_name,
    read_calibration,
    refuse_source,
    say,
)
from moeprune.pipeline.pruning_place import text_of
from moeprune.recovery.training import Training

if TYPE_CHECKING:
    from moeprune.pipeline.recovery import Recovered, Status


@dataclass(frozen=True)
class Recovery:
    """A recovery of what the step before wrote.

    Attributes:
        training: what to do.
        text: what to read.
        teacher: whom to learn from; None takes the model that the first step changes.
        processes: as of ``pipeline.recovery.recover``.
        taught: False for no teacher at all.
    """

    training: Training
    text: Text
    teacher: Source | None = None
    processes: int = 1
    taught: bool = True

    @property
    def name(self) -> str:
        """For messages and tables."""
        return f"recover {self.training.how}"

    @property
    def pairs(self) -> bool:
        """Whether experts of student and teacher are paired, which one plan has to tell."""
        made = self.training
        return made.objective == "router" if made.layerwise else made.how == "expert-kd"


@dataclass(frozen=True)
class RecoveryDone:
    """What such a step did.

    Attributes:
        recovery: what was asked for.
        teacher: its name; None if there was none.
        result: as ``moeprune recover --json`` prints it, without the path.
        seconds: of all, reading and writing too.
    """

    recovery: Recovery
    teacher: str | None
    result: Mapping[str, Any]
    seconds: dict[str, float]


def refuse_recovery(
    recovery: Recovery,
    original: Checkpoint,
    prunings: int,
    out: Path,
    compute: Compute,
    writing: Writing,
) -> None:
    """Raise ``MoepruneError`` for what would fail only after hours of the steps before.

    Args:
        recovery: the step.
        original: the model that the first step changes.
        prunings: steps before it that prune.
        out: the output of the last step.
        compute, writing: of all steps.
    """
    from moeprune.recovery.lora import require_peft  # noqa: PLC0415  (loads torch modules)
    from moeprune.recovery.pairing import check_teacher  # noqa: PLC0415

    made = recovery.training
    if not prunings:
        raise MoepruneError(
            "no step before it prunes, so there is nothing to win back",
            "put it behind a step with a method, or run moeprune recover",
        )
    if recovery.pairs and prunings > 1:
        raise MoepruneError(
            f"{made.how} pairs experts by one plan, and {prunings} steps before it prune",
            "recover after the first of them, or use layerwise: true, or logit-kd",
        )
    if not recovery.taught and (made.how == "expert-kd" or made.kl_weight):
        raise MoepruneError(f"{made.how} learns from a teacher", "leave out teacher")
    if made.how == "lora":
        require_peft()
    if recovery.processes < 1 or (recovery.processes > 1 and made.target != "dense-inputs"):
        raise MoepruneError(
            f"processes: {recovery.processes} cannot share layers here",
            "at least 1; more than 1 with layerwise: true and target: dense-inputs",
        )
    if Quantisation.of(original).method is not None and not writing.dequantize:
        raise UnsupportedModelError(
            f"{original.path} is quantised, and quantised weights cannot be trained",
            "write it as it is computed: dequantize: true under writing",
        )
    if recovery.teacher is not None:
        teacher = Checkpoint.open(recovery.teacher, compute.trust_remote_code)
        refuse_source(teacher, out)
        check_teacher(original, teacher, same_layers=False)
    _read(recovery.text, original)


def _read(text: Text, original: Checkpoint) -> None:
    """A missing file shows before hours of work."""
    read_calibration(original, replace(text, sources=_written(text)))


def _written(text: Text) -> tuple[str, ...]:
    """The sources that the teacher does not write."""
    from moeprune.pipeline.teacher_samples import Samples  # noqa: PLC0415  (imports transformers)

    return tuple(source for source in text.sources if Samples.parse(source) is None)


def inputs_of_recovery(recovery: Recovery, original: Checkpoint) -> dict[str, Any]:
    """What decides a recovery beside the student, by name."""
    text, teacher = recovery.text, original if recovery.taught else None
    if recovery.taught and recovery.teacher is not None:
        teacher = Checkpoint.open(recovery.teacher, original.trust_remote_code)
    written = _written(text)
    return {
        "recover": recovery.training.how,
        **{f"option {name}": value for name, value in recovery.training.to_json().items()},
        "text": text_of(replace(text, sources=written)),
        "samples": [source for source in text.sources if source not in written],
        "teacher": None if teacher is None else teacher.fingerprint,
        "teacher code": None if teacher is None else code_of(teacher),
    }


def run_recovery(
    recovery: Recovery,
    source: Source,
    original: Source,
    target: Path,
    compute: Compute,
    progress: Progress,
) -> RecoveryDone:
    """Recover ``source`` into ``target``, as ``moeprune recover`` does.

    Args:
        recovery: the step.
        source: what the step before wrote.
        original: the model that the first step changed.
        target: the new directory; what a run that was cut keeps stands beside it, and it goes on
            from there.
        compute: as of the other steps; weights that train are float32.
        progress: as in the stages.

    Raises:
        MoepruneError: as ``recover``.
    """
    from moeprune.pipeline.recovery import recover  # noqa: PLC0415  (accelerate takes seconds)
    from moeprune.recovery.state import DamagedState, StateFolder  # noqa: PLC0415  (as above)

    def listen(status: Status) -> None:
        progress("training", status.step, status.steps)

    teacher = original if recovery.teacher is None else recovery.teacher
    name = model_name(teacher) if recovery.taught else None

    def recovered() -> Recovered:
        return recover(
            source, teacher if recovery.taught else None, target, recovery.training, recovery.text,
            Compute(compute.device, "float32", 0, compute.trust_remote_code), resume=True,
            listen=listen, progress=progress, processes=recovery.processes,
        )  # fmt: skip

    begin = time.perf_counter()
    try:
        try:
            result = recovered()
        except DamagedState as error:
            say(f"{error.problem}: this recovery begins again")
            StateFolder(target).delete()
            result = recovered()
    except MoepruneError as error:
        if "--resume" in error.hint:  # the recipe itself goes on: OutputErrors say so
            others = [part for part in error.hint.split(", ") if "--resume" not in part]
            raise OutputError(error.problem, ", ".join(others)) from error
        if "--force" not in error.hint:
            raise
        # what it says is kept goes with the folder of the recipe: its options would have to change
        problem = f"{error.problem.partition('; ')[0]}; nothing was kept"
        raise type(error)(problem, error.hint.partition(", ")[0]) from error
    told = {key: value for key, value in result.to_json().items() if key != "path"}
    took = {"recover": time.perf_counter() - begin}
    return RecoveryDone(recovery, name, told, took)
