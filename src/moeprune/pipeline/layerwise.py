"""Recovery layer by layer: from the student on disk to the healed one, a few layers in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState

from moeprune.errors import MoepruneError
from moeprune.pipeline.inputs import Compute, Progress, Source, Text
from moeprune.pipeline.recovered import Listen, Recovered
from moeprune.pipeline.recovery_opening import Opened, open_run
from moeprune.recovery.layerwise.healer import Healer
from moeprune.recovery.layerwise.processes import Work, in_processes, share
from moeprune.recovery.layerwise.state import LayerFolder, Overlaid, Result
from moeprune.recovery.order import split
from moeprune.recovery.trainer import Status
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
    holding: ExitStack,
) -> Recovered:
    """``pipeline.recovery.recover`` for a training with ``layerwise``; the arguments are its own.

    ``holding`` is as of ``open_run``.

    Raises:
        MoepruneError: anything the user can mend; the output is there whole or not at all.
    """
    device = compute.usable_device()
    if compute.memory is not None and processes > 1:
        raise MoepruneError(
            "--memory is the memory of one process", "leave out --memory or --processes"
        )
    # the other processes wait for the one with the slowest layers
    state = PartialState(cpu=compute.device == "cpu", timeout=_LONGEST)
    _refuse_processes(made, processes, state.num_processes)
    folder = LayerFolder(out)
    run = open_run(
        source, teacher, out, made, text, compute, folder, resume, force, state, progress, holding
    )
    student, master = run.student, run.master
    assert master is not None, "all that train layer by layer learn from a teacher"
    device = state.device if compute.device == "cpu" else device
    train, held = split(run.domains, made.holdout)
    work = Work(student, master, made, folder, device, train, held)
    # refuses before anything is kept
    healer = Healer(student, master, made, folder, device, limits=compute.limits)
    if state.is_main_process:
        folder.begin(run.header)
    began = time.perf_counter()
    _heal(healer, work, state, processes, listen)
    state.wait_for_everyone()
    result = _result(folder, healer.layers, out, made, time.perf_counter() - began)
    if state.is_main_process:
        folder.write_log()
        with folder.writing():
            _write(run, folder, result, force, progress)
        folder.delete()
    state.wait_for_everyone()
    return result


def _heal(healer: Healer, work: Work, state: PartialState, processes: int, listen: Listen) -> None:
    """Heal what is not done yet: here, in processes of our own, or in those that were launched."""
    done = work.folder.done()
    wanted = [layer for layer in healer.layers if layer not in done]
    state.wait_for_everyone()  # all have looked before the first layer is done
    healer.tell = _Told(healer.layers, wanted, work.made.steps, listen)
    if processes > 1:
        in_processes(work, wanted, processes, healer.tell)
    else:
        mine = share(wanted, state.process_index, state.num_processes)
        healer.run(work.train, work.held, mine)


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
    run: Opened,
    folder: LayerFolder,
    result: Recovered,
    force: bool,
    progress: Progress,
) -> None:
    healed = Overlaid(run.student.path, run.student.trust_remote_code)
    for layer in result.layers:
        healed.put(folder.tensors(layer["layer"]))

    def tell(done: int, total: int) -> None:
        progress("writing", done, total)

    record = run.new_record(run.about(result.to_json()))
    write_recovered(Result(healed), result.path, record, folder.log, force, tell)
