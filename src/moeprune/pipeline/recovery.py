"""Recovery: a pruned student learns from the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moeprune.errors import MoepruneError, OutputError, UnsupportedModelError
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.quantised import Quantisation
from moeprune.models.store import versions
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    model_name,
    read_calibration,
    refuse_source,
)
from moeprune.pipeline.inputs import silent as quiet
from moeprune.pipeline.teacher_samples import with_samples
from moeprune.recovery.pairing import check_teacher, made_from, provenance
from moeprune.recovery.session import Session
from moeprune.recovery.state import StateFolder
from moeprune.recovery.trainer import Progress as Run
from moeprune.recovery.trainer import Status, open_accelerator
from moeprune.recovery.training import Training, training
from moeprune.recovery.writing import write_adapter, write_recovered

__all__ = ["Recovered", "Status", "Training", "recover", "training"]

Listen = Callable[[Status], None]


@dataclass(frozen=True)
class Recovered:
    """What a recovery did.

    Attributes:
        path: the new checkpoint.
        steps, best_step: done, and of the weights that were written; 0 is the student as it was.
        held: the held-out measure (``measure``) before and after; None without held-out sequences.
        measure: ``kl`` with a teacher, ``ce`` without.
        lam: lambda of ``expert-kd``.
        gradients: norm of the first gradient, by group of parameters that trained.
        changed: by group, tensors on disk that changed, and in all.
        zeros: weights that were kept at zero.
        seconds: of training.
        ended: why it ended.
        layers: layer by layer, what was done in each: ``layer``, ``before`` and ``after`` (errors
            on held-out tokens), ``best_step``, ``steps``, ``ended``, ``seconds``.
    """

    path: Path
    steps: int
    best_step: int
    held: tuple[float, float] | None
    measure: str
    lam: float | None
    gradients: Mapping[str, float]
    changed: Mapping[str, tuple[int, int]]
    zeros: int
    seconds: float
    ended: str
    layers: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {
            **vars(self),
            "path": str(self.path),
            "held": None if self.held is None else list(self.held),
            "gradients": dict(self.gradients),
            "changed": {name: list(counts) for name, counts in self.changed.items()},
            "layers": [dict(layer) for layer in self.layers],
        }


def ignore(status: Status) -> None:
    """Nobody watches."""


def recover(
    source: Source,
    teacher: Source | None,
    out: Source,
    chosen: Training | str = "expert-kd",
    text: Text = Text(sequences=600, length=512),
    compute: Compute = Compute(),
    resume: bool = False,
    force: bool = False,
    listen: Listen = ignore,
    progress: Progress = quiet,
    processes: int = 1,
) -> Recovered:
    """Train a pruned checkpoint and write it again, with the same files, names, types and zeros.

    A run that was cut leaves ``<out>.recovery`` behind; ``resume`` goes on from there, to the very
    weights that it would have had. Under ``accelerate launch`` every process calls this function.

    Args:
        source: the student, as ``apply`` or ``prune`` wrote it.
        teacher: the model that it was made from; only ``full`` and ``lora`` can do without.
        out: the new directory.
        chosen: what to do, or the name of a way whose defaults are taken.
        text: what to read; sequences are drawn as for calibration.
        compute: the device; weights that train are float32 whatever ``dtype`` says.
        resume: go on with a run that was cut.
        force: replace an existing output, and forget a run that was cut.
        listen: told after every step.
        progress: as in the other stages.
        processes: how many share the layers, layer by layer with ``dense-inputs``; the result is
            the same.

    Raises:
        MoepruneError: anything the user can mend; the output is there whole or not at all.
    """
    made = training(chosen) if isinstance(chosen, str) else chosen
    out = Path(out)
    if made.layerwise:
        from moeprune.pipeline.layerwise import recover_layers  # noqa: PLC0415  it needs this one

        return recover_layers(
            source, teacher, out, made, text, compute, resume, force, listen, progress, processes
        )
    if processes != 1:
        raise MoepruneError(
            "--processes is for training layer by layer",
            "add --layerwise --target dense-inputs, or use accelerate launch",
        )
    folder = StateFolder(out)
    accelerator = open_accelerator(compute.device == "cpu", made)
    _refuse_output(out, folder, resume, force)
    student = _student(source, out, compute)
    record = provenance(student)
    master = _teacher(student, teacher, out, made, compute)
    writes = accelerator.is_main_process
    told_dtype = replace(compute, dtype=made.dtype)
    text = with_samples(text, student, master, folder, told_dtype, writes, progress)
    accelerator.wait_for_everyone()
    domains = read_calibration(student, text)
    facts = data.describe(domains)
    header = {
        "student": student.fingerprint,
        "teacher": None if master is None else master.fingerprint,
        "data": facts["hash"],
        "training": made.to_json(),
    }
    if resume:
        _refuse_other_run(folder, header)
    elif accelerator.is_main_process:
        folder.clear()
    accelerator.wait_for_everyone()
    with ExitStack() as stack:
        device = accelerator.device if compute.device == "cpu" else torch.device(compute.device)
        session = Session(student, master, made, device, stack)
        done = session.train(domains, folder, header, resume, accelerator, listen)
        result = _result(session, out, done)
        if accelerator.is_main_process:
            told = {
                "how": made.how,
                "teacher": None if teacher is None else model_name(teacher),
                "teacher_fingerprint": header["teacher"],
                "data": {**facts, "seed": text.seed},
                "options": made.to_json(),
                **{key: value for key, value in result.to_json().items() if key != "path"},
                "versions": versions(),
            }
            with folder.writing():
                _write(session, out, record, told, folder, force, progress)
            folder.delete()
        accelerator.wait_for_everyone()
    return result


def _write(
    session: Session,
    out: Path,
    record: Mapping[str, Any],
    told: Mapping[str, Any],
    folder: StateFolder,
    force: bool,
    progress: Progress,
) -> None:
    if session.adapters is not None and session.training.adapter:
        write_adapter(session.adapters, out, told, folder.log, force)
        return
    earlier = record.get("recovered")
    steps = [*(earlier if isinstance(earlier, list) else []), told]
    more = {**record, "recovered": steps}

    def tell(done: int, total: int) -> None:
        progress("writing", done, total)

    write_recovered(session.places, out, more, folder.log, force, tell)


def _result(session: Session, out: Path, done: Run) -> Recovered:
    held = None
    if done.held and done.best is not None:
        held = (done.held[0], done.best if done.merged is None else done.merged)
    changed = {} if session.training.adapter else session.changed()
    return Recovered(
        path=out,
        steps=done.step,
        best_step=done.best_step if held else done.step,
        held=held,
        measure="ce" if session.teacher is None else "kl",
        lam=done.lam,
        gradients=done.norms,
        changed={group: (n[0], n[1]) for group, n in changed.items()},
        zeros=session.zeros.count,
        seconds=round(done.seconds, 3),
        ended=done.ended,
    )


def _refuse_output(out: Path, folder: StateFolder, resume: bool, force: bool) -> None:
    refuse_existing(out, force)
    if folder.exists() and not (resume or force):
        raise OutputError(
            f"a run for {out} was cut after {folder.reached()}: {folder.path}",
            "go on with --resume, or begin again with --force",
        )


def _refuse_other_run(folder: StateFolder, header: Mapping[str, Any]) -> None:
    saved = folder.numbers()
    if saved is None:
        return
    for name, value in header.items():
        if saved.get(name) == value:
            continue
        what = name
        if name == "training" and isinstance(saved.get(name), dict):
            what = next(key for key in value if saved["training"].get(key) != value[key])
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
    student: Checkpoint, teacher: Source | None, out: Path, made: Training, compute: Compute
) -> Checkpoint | None:
    if teacher is None:
        if made.how == "expert-kd" or made.kl_weight:
            raise MoepruneError(f"{made.how} learns from a teacher", "give --teacher MODEL")
        return None
    master = Checkpoint.open(teacher, compute.trust_remote_code)
    refuse_source(master, out)
    layers_matter = made.how == "expert-kd" or not made_from(student, master)
    check_teacher(student, master, same_layers=layers_matter)
    return master
