"""What both forms of recovery begin with: who learns from whom, on which text, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from moeprune.errors import MoepruneError, OutputError, UnsupportedModelError
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.quantised import Quantisation
from moeprune.models.store import versions
from moeprune.models.surgery import recoveries_of, steps_of
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    model_name,
    read_calibration,
    refuse_source,
)
from moeprune.pipeline.teacher_samples import with_samples
from moeprune.recovery.pairing import check_teacher, made_from, provenance
from moeprune.recovery.state import StateFolder
from moeprune.recovery.training import Training


class Processes(Protocol):
    """What accelerate knows of the processes of a run."""

    @property
    def is_main_process(self) -> bool:
        """Whether this one writes."""
        ...

    def wait_for_everyone(self) -> None:
        """Go on when all are here."""
        ...


@dataclass(frozen=True)
class Opened:
    """A run that may begin, or go on.

    Attributes:
        student, master: who learns, and from whom; the folder of the run knows them.
        record: the student's moeprune.json.
        domains: what to read.
        header: what must not change between parts of a run that was cut.
        told: what the new moeprune.json says of the recovery, whatever comes of it.
    """

    student: Checkpoint
    master: Checkpoint | None
    record: Mapping[str, Any]
    domains: Sequence[data.Domain]
    header: dict[str, Any]
    told: Mapping[str, Any]

    def about(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What is recorded of the recovery; ``result`` as the command prints it."""
        own = {key: value for key, value in result.items() if key != "path"}
        return {**self.told, **own, "versions": versions()}

    def new_record(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The moeprune.json of the recovered checkpoint."""
        earlier = self.record.get("recovered")
        steps = [*(earlier if isinstance(earlier, list) else []), about]
        return {**self.record, "recovered": steps}


def open_run(
    source: Source,
    teacher: Source | None,
    out: Path,
    made: Training,
    text: Text,
    compute: Compute,
    folder: StateFolder,
    resume: bool,
    force: bool,
    processes: Processes,
    progress: Progress,
    holding: ExitStack,
) -> Opened:
    """Check all that can be checked before a model is loaded; an earlier run is forgotten then.

    Until ``holding`` is closed no other run can work for the same output.

    Raises:
        MoepruneError: anything the user can mend.
    """
    writes = processes.is_main_process
    _refuse_output(out, folder, resume, force, writes)
    processes.wait_for_everyone()  # nobody writes what another one takes for a run that was cut
    if writes:
        holding.enter_context(folder.held())
    student = _student(source, out, compute)
    refuse_source(student, folder.path)
    record = provenance(student)
    master = _teacher(student, teacher, out, folder, made, compute)
    kind = replace(compute, dtype=made.dtype)
    text = with_samples(text, student, master, folder, kind, writes, progress)
    processes.wait_for_everyone()
    domains = read_calibration(student, text)
    facts = data.describe(domains)
    header = {
        "student": student.fingerprint,
        "teacher": None if master is None else master.fingerprint,
        "data": facts["hash"],
        "training": made.to_json(),
        "versions": versions(),
    }
    if resume and folder.numbers() is not None:
        _refuse_other_run(folder, header)
    elif writes:
        with folder.writing():
            folder.clear()  # what stands there without a state is of nobody knows which run
    processes.wait_for_everyone()
    told = {
        "how": made.how,
        "after_steps": len(steps_of(student.path)),
        "teacher": None if teacher is None else model_name(teacher),
        "teacher_fingerprint": header["teacher"],
        "student_fingerprint": header["student"],
        "data": {**facts, "seed": text.seed, **({"mix": dict(text.mix)} if text.mix else {})},
        "options": made.to_json(),
    }
    return Opened(student, master, record, domains, header, told)


def _refuse_output(out: Path, folder: StateFolder, resume: bool, force: bool, main: bool) -> None:
    if main and not force and out.exists() and folder.exists():
        with folder.held():
            if _finished(out, folder):  # killed between the output and this
                folder.delete()
    refuse_existing(out, force)
    if folder.exists() and not (resume or force):
        if main:
            with folder.held():
                pass  # another process that works there is no run that was cut
        raise OutputError(
            f"a run for {out} was cut after {folder.reached()}: {folder.path}",
            "go on with --resume, or begin again with --force",
        )


def _finished(out: Path, folder: StateFolder) -> bool:
    """Whether ``out`` is what the run in ``folder`` has made."""
    saved, told = folder.numbers() or {}, recoveries_of(out)[-1:]
    names = {
        "training": "options", "teacher": "teacher_fingerprint", "student": "student_fingerprint",
    }  # fmt: skip
    return any(
        all(saved.get(name) == one.get(key) for name, key in names.items())
        and saved.get("data") == dict(one.get("data") or {}).get("hash")
        for one in told
    )


def _refuse_other_run(folder: StateFolder, header: Mapping[str, Any]) -> None:
    saved = folder.numbers()
    assert saved is not None
    for name, value in header.items():
        if saved.get(name) == value:
            continue
        what = name
        if isinstance(value, dict) and isinstance(before := saved.get(name), dict):
            # the first decides about others
            keys = ("layerwise", *value) if name == "training" else (*value, *before)
            what = next((key for key in keys if before.get(key) != value.get(key)), name)
            what = f"version of {what}" if name == "versions" else what
        raise MoepruneError(
            f"the run in {folder.path} had another {what.replace('_', '-')}",
            "give the same options, or begin again with --force",
        )


def _student(source: Source, out: Path, compute: Compute) -> Checkpoint:
    student = Checkpoint.open(source, compute.trust_remote_code)
    if student.path.is_relative_to(out.resolve()):
        raise OutputError(f"the output {out} is the student itself, or holds it", "another --out")
    if Quantisation.of(student).method is not None:
        raise UnsupportedModelError(
            f"{student.path} is quantised, and quantised weights cannot be trained",
            "write it with --dequantize first: moeprune apply ... --dequantize",
        )
    return student


def _teacher(
    student: Checkpoint,
    teacher: Source | None,
    out: Path,
    folder: StateFolder,
    made: Training,
    compute: Compute,
) -> Checkpoint | None:
    if teacher is None:
        if made.how == "expert-kd" or made.kl_weight:
            raise MoepruneError(f"{made.how} learns from a teacher", "give --teacher MODEL")
        return None
    master = Checkpoint.open(teacher, compute.trust_remote_code)
    for place in (out, folder.path):
        refuse_source(master, place)
    layers_matter = made.layerwise or made.how == "expert-kd" or not made_from(student, master)
    check_teacher(student, master, same_layers=layers_matter)
    return master
