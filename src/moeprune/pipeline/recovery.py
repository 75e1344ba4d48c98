"""Recovery: a pruned student learns from the model that it was made from."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.pipeline.inputs import Compute, Progress, Source, Text
from moeprune.pipeline.inputs import silent as quiet
from moeprune.pipeline.layerwise import recover_layers
from moeprune.pipeline.recovered import Listen, Recovered
from moeprune.pipeline.recovery_opening import Opened, open_run
from moeprune.recovery.session import Session
from moeprune.recovery.state import StateFolder
from moeprune.recovery.trainer import Progress as Run
from moeprune.recovery.trainer import Status, open_accelerator
from moeprune.recovery.training import Training, training
from moeprune.recovery.writing import write_adapter, write_recovered

__all__ = ["Recovered", "Status", "Training", "recover", "training"]


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
        with ExitStack() as holding:
            return recover_layers(
                source, teacher, out, made, text, compute, resume, force, listen, progress,
                processes, holding,
            )  # fmt: skip
    if compute.memory is not None:
        raise MoepruneError(
            "--memory is for training layer by layer", "add --layerwise, or leave it out"
        )
    if processes != 1:
        raise MoepruneError(
            "--processes is for training layer by layer",
            "add --layerwise --target dense-inputs, or use accelerate launch",
        )
    folder = StateFolder(out)
    device = compute.usable_device()
    accelerator = open_accelerator(compute.device == "cpu", made)
    with ExitStack() as stack:
        run = open_run(
            source, teacher, out, made, text, compute, folder, resume, force, accelerator, progress,
            stack,
        )  # fmt: skip
        device = accelerator.device if compute.device == "cpu" else device
        session = Session(run.student, run.master, made, device, stack)
        done = session.train(run.domains, folder, run.header, resume, accelerator, listen)
        result = _result(session, out, done)
        if accelerator.is_main_process:
            with folder.writing():
                _write(session, run, result, folder.log, force, progress)
            folder.delete()
        accelerator.wait_for_everyone()
    return result


def _write(
    session: Session, run: Opened, result: Recovered, log: Path, force: bool, progress: Progress
) -> None:
    about = run.about(result.to_json())
    if session.adapters is not None and session.training.adapter:
        write_adapter(session.adapters, result.path, about, log, force)
        return

    def tell(done: int, total: int) -> None:
        progress("writing", done, total)

    write_recovered(session.places, result.path, run.new_record(about), log, force, tell)


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
        zeros=0 if session.training.adapter else session.zeros.count,
        seconds=round(done.seconds, 3),
        ended=done.ended,
    )
