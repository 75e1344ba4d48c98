"""Steps in a row: calibrate, plan, apply, or recover, each on what the one before wrote."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from moeprune.core.accumulators import Routing, Served
from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Method
from moeprune.core.plan import Plan
from moeprune.core.targets import Target
from moeprune.errors import MoepruneError, OutputError, PlanError
from moeprune.files import new_directory, refuse_existing
from moeprune.models.byte_exact import refuse_method
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes, Writing
from moeprune.models.projection import project_statistics
from moeprune.models.store import read_plan
from moeprune.models.surgery import WRITING, apply_plan
from moeprune.pipeline.asking import PROTECTION_NEEDS, accept
from moeprune.pipeline.calibration import calibrate
from moeprune.pipeline.inputs import Compute, Progress, Source, Text, refuse_source, silent
from moeprune.pipeline.measure import peak_memory, reset_peak_memory
from moeprune.pipeline.planning import plan as make_plan
from moeprune.pipeline.pruning_place import (
    PRUNING,
    finished_statistics,
    inputs_of,
    plan_name,
    pruning_place,
)
from moeprune.pipeline.recovery_steps import Recovery, RecoveryDone, refuse_recovery, run_recovery
from moeprune.work import drop_finished, refuse_finished

RECOMPUTE = "recompute"
PROJECT = "project"


@dataclass(frozen=True)
class Step:
    """One method with one budget.

    Attributes:
        method: what decides.
        budget: how much it removes.
        uniform: the same number of experts in every layer.
        statistics: ``recompute`` or ``project``; see ``models.projection``.
        seed: of the method.
        constraints: experts that stay or go whatever the method thinks of them.
    """

    method: Method
    budget: Budget | Target
    uniform: bool = False
    statistics: str = RECOMPUTE
    seed: int = 0
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def name(self) -> str:
        """For messages."""
        return self.method.name

    @property
    def needs(self) -> set[str]:
        """The accumulators that it plans from; a sequential method collects its own."""
        if self.method.sequential:
            return set()
        return {*self.method.needs, *([PROTECTION_NEEDS] if self.constraints.protect_super else [])}


@dataclass(frozen=True)
class StepDone:
    """What a step did; ``observed`` says where its numbers come from."""

    plan: Plan
    sizes: Sizes
    seconds: dict[str, float]
    observed: str


@dataclass
class Steps:
    """Runs steps.

    Attributes:
        source: the original.
        steps: in order; the first prunes.
        out: the last checkpoint.
        text: to calibrate on.
        statistics: of the original, if they exist already.
        compute, writing, progress: as in the stages.
        force: replace ``out``.
        keep: a directory for the checkpoints between the steps; None deletes them.
        observed: gets the statistics of the original, before they are deleted.
        done: what the steps that prune did.
        recovered: what recoveries did, by number of the step.
    """

    source: Source
    steps: Sequence[Step | Recovery]
    out: Path
    text: Text = field(default_factory=Text)
    statistics: Path | None = None
    compute: Compute = field(default_factory=Compute)
    writing: Writing = field(default_factory=Writing)
    progress: Progress = silent
    force: bool = False
    keep: Path | None = None
    observed: Callable[[Path], None] | None = None
    done: list[StepDone] = field(default_factory=list)
    recovered: dict[int, RecoveryDone] = field(default_factory=dict)
    peak: int | None = None

    def run(self) -> list[StepDone]:
        """All steps; ``out`` appears when the last one succeeds. Returns those that prune.

        Raises:
            MoepruneError: anything the user can mend; nothing is left behind.
        """
        if self._resumable:
            drop_finished(self.out, PRUNING)
            refuse_finished(self.out, PRUNING, WRITING, force=self.force)
        else:
            refuse_existing(self.out, self.force)
        original = Checkpoint.open(self.source, self.compute.trust_remote_code)
        refuse_source(original, self.out)
        for number, step in enumerate(self.steps):
            if isinstance(step, Step):
                accept(step.method, step.budget, step.constraints)
                refuse_method(original, step.method.changes, self.writing.dequantize)
                continue
            prunings = sum(isinstance(one, Step) for one in self.steps[:number])
            with self._naming(number):
                refuse_recovery(step, original, prunings, self.out, self.compute, self.writing)
        if self.keep is not None:
            refuse_existing(self.keep, False)
            if self.out.resolve().is_relative_to(self.keep.resolve()):
                raise OutputError(
                    f"the steps would be kept in {self.keep}, and the output is that or inside it",
                    "choose another --keep-steps",
                )
        reset_peak_memory()
        with self._place(original) as work:
            self._run(work)
            if self.keep is not None:
                self._keep(work)
        self.peak = peak_memory()
        return self.done

    @property
    def _resumable(self) -> bool:
        """Whether what is made before the output stays after an interruption."""
        return len(self.steps) == 1 and self.compute.ranks.size == 1

    @contextmanager
    def _place(self, original: Checkpoint) -> Iterator[Path]:
        """Where statistics and checkpoints between steps go.

        The latter on the output's disk, as they may not fit in /tmp.
        """
        if self._resumable:
            identity = inputs_of(original, self.text, self.compute)
            with pruning_place(self.out, identity, self.force) as work:
                yield work
            return
        room = next(parent for parent in self.out.absolute().parents if parent.is_dir())
        work = Path(tempfile.mkdtemp(prefix=".moeprune-", suffix=".partial", dir=room))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _run(self, work: Path) -> None:
        source, known = self.source, self.statistics
        for number, step in enumerate(self.steps):
            last = number + 1 == len(self.steps)
            target = self.out if last else work / f"step-{number + 1}"
            with self._naming(number):
                if isinstance(step, Recovery):
                    known = None  # its weights are others
                    self._recover(number, step, source, target, work)
                else:
                    known = self._step(number, step, source, known, target, work)
            if number and self.keep is None:
                shutil.rmtree(work / f"step-{number}", ignore_errors=True)
            source = target

    @contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Errors say in which of several steps they happened."""
        try:
            yield
        except MoepruneError as error:
            if len(self.steps) == 1:
                raise
            name = f"step {number + 1} ({self.steps[number].name})"
            raise type(error)(f"{name}: {error.problem}", error.hint) from error

    def _recover(
        self, number: int, step: Recovery, source: Source, target: Path, work: Path
    ) -> None:
        """One recovery, among the steps: what it keeps to go on is theirs and goes with them."""
        made = work / f"step-{number + 1}"
        done = run_recovery(step, source, self.source, made, self.compute, self.progress)
        self.recovered[number] = done
        if target != made:
            with new_directory(target, self.force) as folder:
                for file in made.iterdir():
                    shutil.move(file, folder / file.name)
            made.rmdir()

    def _step(
        self,
        number: int,
        step: Step,
        source: Source,
        known: Path | None,
        target: Path,
        work: Path,
    ) -> Path | None:
        """One step; returns statistics for the next one, if that wants them projected."""
        seconds = dict[str, float]()
        observed = "nothing" if not step.method.needs else "the model, layer by layer as it changes"
        start = time.perf_counter()
        later = self._projecting(number)
        if known is None and (step.needs or later):
            known = work / f"statistics-{number}"
            # what experts served costs nearly nothing in the same pass, and the report shows it
            shown = set() if self.observed is None else {Routing.name, Served.name}
            needs = step.needs | later | shown
            if not finished_statistics(known, needs):
                calibrate(
                    source, known, self.text, sorted(needs), self.compute, self.force,
                    self.progress,
                )  # fmt: skip
            seconds["calibrate"] = time.perf_counter() - start
        if number == 0 and known is not None and self.observed is not None:
            self.observed(known)
        if step.needs:
            projected = number > 0 and step.statistics == PROJECT
            observed = "the original, projected" if projected else "the model that it changes"
        given = number == 0 and self.statistics is not None  # refused if the method cannot use it
        start = time.perf_counter()
        plan = self._planned(step, source, known if step.needs or given else None, work)
        seconds["plan"] = time.perf_counter() - start
        start = time.perf_counter()
        last = not any(isinstance(later, Step) for later in self.steps[number + 1 :])
        sizes = apply_plan(
            Checkpoint.open(source, self.compute.trust_remote_code),
            plan,
            target,
            self.force and target == self.out,
            lambda done, total: self.progress("writing", done, total),
            # heads and quantised weights are dealt with once; only the last result is padded
            replace(
                self.writing,
                pad=self.writing.pad and last,
                dequantize=self.writing.dequantize and not number,
            ),
            resumable=self._resumable,
        )
        seconds["apply"] = time.perf_counter() - start
        if self.done and self.done[-1].sizes.nonzero[1] < self.done[-1].sizes.parameters[1]:
            sizes = replace(sizes, nonzero=(self.done[-1].sizes.nonzero[1], _nonzero(target)))
        self.done.append(StepDone(plan, sizes, seconds, observed))
        if not later or known is None:
            return None
        after = work / f"statistics-{number + 1}"
        project_statistics(known, plan, target, after, self.compute.trust_remote_code)
        return after

    def _planned(self, step: Step, source: Source, known: Path | None, work: Path) -> Plan:
        """What the step decides, or has decided before an interruption."""
        out = None
        if self._resumable:
            asked = (step.method, step.budget, step.uniform, step.seed, step.constraints)
            out = work / plan_name(*asked, self.writing, known)
            if out.exists():
                try:
                    return read_plan(out)
                except PlanError:  # damaged
                    out.unlink()
        return make_plan(
            source, step.method, step.budget, known, self.text,
            compute=self.compute, seed=step.seed, progress=self.progress, uniform=step.uniform,
            constraints=step.constraints, writing=self.writing, out=out, force=True,
        )  # fmt: skip

    def _projecting(self, number: int) -> set[str]:
        """What the steps behind ``number`` read from statistics that are projected on to them."""
        found: set[str] = set()
        for step in self.steps[number + 1 :]:
            if isinstance(step, Recovery):
                break
            if step.needs and step.statistics == RECOMPUTE:
                break
            if step.needs:
                found |= step.needs
        return found

    def _keep(self, work: Path) -> None:
        assert self.keep is not None
        self.keep.mkdir(parents=True)
        for folder in sorted(work.glob("step-*")):
            shutil.move(folder, self.keep / folder.name)  # perhaps on another disk


def _nonzero(directory: Path) -> int:
    """Values that are not zero, counted: a plan does not know what earlier ones zeroed."""
    checkpoint = Checkpoint.open(directory)
    return sum(int(checkpoint.read(key).count_nonzero()) for key in checkpoint.tensors)
