"""Recovery layer by layer: from the student on disk to the healed one, a few layers in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from moeprune.errors import MoepruneError
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.store import versions
from moeprune.pipeline.inputs import Compute, Progress, Source, Text, model_name, read_calibration
from moeprune.pipeline.recovery import (
    Listen,
    Recovered,
    Status,
    _refuse_other_run,
    _refuse_output,
    _student,
    _teacher,
)
from moeprune.recovery.layerwise.healer import Healer
from moeprune.recovery.layerwise.processes import Work, in_processes, share
from moeprune.recovery.layerwise.state import LayerFolder, Overlaid, Result
from moeprune.recovery.order import split
from moeprune.recovery.pairing import check_teacher, provenance
from moeprune.recovery.training import Training
from moeprune.recovery.writing import write_recovered

_TOLD = ("layer", "before", "after", "best_step", "steps", "ended", "seconds")
_LONGEST = timedelta(days=30)


def recover_layers(
    source: Source,
    teacher: Source | None,
    out: Path,
    made: Training,
    text: Text,
    compute: Compute,
    resume: bool,
    force: bool,
    listen: Listen,
    progress: Progress,
    processes: int,
) -> Recovered:
    """``pipeline.recovery.recover`` for a training with ``layerwise``; the arguments are its own.

    Raises:
        MoepruneError: anything the user can mend; the output is there whole or not at all.
    """
    # the other processes wait for the one with the slowest layers
    state = PartialState(cpu=compute.device == "cpu", timeout=_LONGEST)
    _refuse_processes(made, processes, state.num_processes)
    folder = LayerFolder(out)
    _refuse_output(out, folder, resume, force)
    student = _student(source, out, compute)
    record = provenance(student)
    master = _teacher(student, teacher, out, made, compute)
    if master is None:
        raise MoepruneError("layers learn from those of a teacher", "give --teacher MODEL")
    check_teacher(student, master, same_layers=True)
    domains = read_calibration(student, text)
    facts = data.describe(domains)
    header = {
        "student": student.fingerprint,
        "teacher": master.fingerprint,
        "data": facts["hash"],
        "training": made.to_json(),
    }
    if resume:
        _refuse_other_run(folder, header)
    elif state.is_main_process:
        folder.delete()
    state.wait_for_everyone()
    device = state.device if compute.device == "cpu" else torch.device(compute.device)
    train, held = split(domains, made.holdout)
    work = Work(student, master, made, folder, device, train, held)
    layers = Healer(student, master, made, folder, device).layers  # refuses before anything is kept
    if state.is_main_process:
        folder.begin(header)
    wanted = [layer for layer in layers if layer not in folder.done()]
    state.wait_for_everyone()  # all have looked before the first layer is done
    told = _Told(layers, wanted, made.steps, listen)
    began = time.perf_counter()
    if processes > 1:
        in_processes(work, wanted, processes, told)
    else:
        work.do(share(wanted, state.process_index, state.num_processes), told)
    state.wait_for_everyone()
    result = _result(folder, layers, out, made, time.perf_counter() - began)
    if state.is_main_process:
        folder.write_log()
        about = {
            "how": made.how,
            "teacher": None if teacher is None else model_name(teacher),
            "teacher_fingerprint": master.fingerprint,
            "data": {**facts, "seed": text.seed},
            "options": made.to_json(),
            **{key: value for key, value in result.to_json().items() if key != "path"},
            "versions": versions(),
        }
        _write(student, folder, layers, out, record, about, force, progress)
        folder.delete()
    state.wait_for_everyone()
    return result


class _Told:
    """Hands on how layers go, as steps of one training."""

    def __init__(
        self, layers: Sequence[int], wanted: Sequence[int], steps: int, listen: Listen
    ) -> None:
        self._steps, self._listen = steps, listen
        self._total = len(layers) * steps
        self._done = {layer: 0 if layer in wanted else steps for layer in layers}
        self._began, self._before = time.perf_counter(), sum(self._done.values())

    def __call__(self, layer: int, step: int, loss: float | None, held: float | None) -> None:
        self._done[layer] = step
        done = sum(self._done.values())
        new = done - self._before
        pace = (time.perf_counter() - self._began) / new if new else 0.0
        left = (self._total - done) * pace if new else None
        self._listen(Status(done, self._total, loss, held, left))


def _refuse_processes(made: Training, processes: int, launched: int) -> None:
    if processes < 1:
        raise MoepruneError(f"--processes must be at least 1 (got {processes})")
    if max(processes, launched) > 1 and made.target != "dense-inputs":
        raise MoepruneError(
            f"with --target {made.target} a layer needs those before it: one process",
            "--target dense-inputs, whose layers are independent",
        )
    if processes > 1 and launched > 1:
        raise MoepruneError(
            f"{launched} processes were launched, and each would start {processes}",
            "leave out --processes",
        )


def _result(
    folder: LayerFolder, layers: Sequence[int], out: Path, made: Training, seconds: float
) -> Recovered:
    records = [folder.record(layer) for layer in layers]
    changed: dict[str, tuple[int, int]] = {}
    squares: dict[str, float] = {}
    for record in records:
        for group, (new, total) in record["changed"].items():
            old = changed.get(group, (0, 0))
            changed[group] = (old[0] + new, old[1] + total)
        for group, norm in record["norms"].items():
            squares[group] = squares.get(group, 0.0) + norm**2
    held = None
    if all(record["before"] is not None for record in records):
        held = (_mean(records, "before"), _mean(records, "after"))
    better = sum(record["best_step"] > 0 for record in records)
    return Recovered(
        path=out,
        steps=sum(record["steps"] for record in records),
        best_step=sum(record["best_step"] for record in records),
        held=held,
        measure="KL of routers" if made.objective == "router" else "relative error of blocks",
        lam=None,
        gradients={group: math.sqrt(value) for group, value in squares.items()},
        changed=changed,
        zeros=sum(record["zeros"] for record in records),
        seconds=round(seconds, 3),
        ended=f"{better} of {len(records)} layers are better",
        layers=tuple({key: record[key] for key in _TOLD} for record in records),
    )


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(record[key]) for record in records) / len(records)


def _write(
    student: Checkpoint,
    folder: LayerFolder,
    layers: Sequence[int],
    out: Path,
    record: Mapping[str, Any],
    about: Mapping[str, Any],
    force: bool,
    progress: Progress,
) -> None:
    healed = Overlaid(student.path, student.trust_remote_code)
    for layer in layers:
        healed.put(folder.tensors(layer))
    earlier = record.get("recovered")
    steps = [*(earlier if isinstance(earlier, list) else []), about]

    def tell(done: int, total: int) -> None:
        progress("writing", done, total)

    write_recovered(Result(healed), out, {**record, "recovered": steps}, folder.log, force, tell)
