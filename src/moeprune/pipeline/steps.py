"""Steps in a row: calibrate, plan, apply, or recover, each on what the one before wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moeprune.core.accumulators import Routing, Served
from moeprune.core.budget import Budget
from moeprune.core.constraints import Constraints
from moeprune.core.method import Method
from moeprune.core.plan import Plan
from moeprune.core.targets import Target
from moeprune.errors import MoepruneError, OutputError
from moeprune.files import refuse_existing
from moeprune.models.byte_exact import refuse_method
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes, Writing
from moeprune.models.projection import project_statistics
from moeprune.models.surgery import WRITING, apply_plan
from moeprune.pipeline.asking import PROTECTION_NEEDS, accept
from moeprune.pipeline.calibration import calibrate
from moeprune.pipeline.inputs import Compute, Progress, Source, Text, refuse_source, silent
from moeprune.pipeline.kept_steps import RECIPE, KeptSteps, recipe_place
from moeprune.pipeline.measure import peak_memory, reset_peak_memory
from moeprune.pipeline.planning import plan as make_plan
from moeprune.pipeline.pruning_place import (
    PRUNING,
    finished_statistics,
    inputs_of,
    keep_plan,
    kept_plan,
    plan_name,
    pruning_place,
)
from moeprune.pipeline.recovery_steps import (
    Recovery,
    RecoveryDone,
    inputs_of_recovery,
    refuse_recovery,
    run_recovery,
)
from moeprune.work import WorkFolder, drop_finished, refuse_finished

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

    def inputs(self) -> dict[str, Any]:
        """What decides its plan beside the model and the text, by name."""
        budget = self.budget
        return {
            "method": self.method.name,
            **{f"option {name}": value for name, value in self.method.options().items()},
            "budget": budget.to_json() if isinstance(budget, Budget) else asdict(budget),
            "uniform": self.uniform,
            "statistics": self.statistics,
            "seed": self.seed,
            "constraints": asdict(self.constraints),
        }


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
        recipe: what else the recipe asks for, by name; None for the one step of ``prune``, whose
            statistics serve other budgets as well.
        finish: what is to be done once the output is there; gets the work folder.
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
    recipe: Mapping[str, Any] | None = None
    finish: Callable[[WorkFolder], None] = lambda folder: None
    done: list[StepDone] = field(default_factory=list)
    recovered: dict[int, RecoveryDone] = field(default_factory=dict)
    peak: int | None = None

    def run(self) -> list[StepDone]:
        """All steps; ``out`` appears when the last one succeeds. Returns those that prune.

        Raises:
            MoepruneError: anything the user can mend; what took long stays for the same call.
        """
        if self.recipe is None:
            drop_finished(self.out, PRUNING)
            refuse_finished(self.out, PRUNING, WRITING, force=self.force)
        else:
            refuse_finished(self.out, RECIPE, force=self.force)
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
        if self.keep is not None and self.out.resolve().is_relative_to(self.keep.resolve()):
            raise OutputError(
                f"the steps would be kept in {self.keep}, and the output is that or inside it",
                "choose another --keep-steps",
            )
        reset_peak_memory()
        with self._place(original) as work:
            if self.recipe is None:
                [step] = self.steps
                assert isinstance(step, Step), "prune trains nothing"
                self._step(0, step, self.source, self.statistics, self.out, work)
            else:
                self._run(work)
            self.peak = peak_memory()
            self.finish(work)
        return self.done

    def _place(self, original: Checkpoint) -> AbstractContextManager[WorkFolder]:
        """Where statistics, plans and checkpoints between steps stand, beside the output."""
        identity = inputs_of(original, self.text, self.compute)
        if self.recipe is None:
            return pruning_place(self.out, identity, self.force)
        for number, step in enumerate(self.steps, start=1):
            own = (
                inputs_of_recovery(step, original) if isinstance(step, Recovery) else step.inputs()
            )
            identity |= {f"step {number} {name}": value for name, value in own.items()}
        identity |= {"writing": asdict(self.writing), "--keep-steps": self.keep is not None}
        return recipe_place(self.out, {**identity, **self.recipe}, self.force)

    def _run(self, work: WorkFolder) -> None:
        """The steps of a recipe that are not done yet, each kept when it is; then the output."""
        kept = KeptSteps(work, len(self.steps), self.keep is not None)
        first = self._go_on(kept)
        source = kept.checkpoint(first - 1) if first else self.source
        known = work.path / f"statistics-{first}" if self._projected(first) else None
        for number, step in enumerate(self.steps[first:], start=first):
            target = kept.checkpoint(number)
            with self._naming(number):
                if isinstance(step, Recovery):
                    known = None  # its weights are others
                    done = run_recovery(
                        step, source, self.source, target, self.compute, self.progress
                    )
                    self.recovered[number] = done
                else:
                    known = self._step(number, step, source, known, target, work)
            kept.save(number, self._told(number))
            source = target
        if not work.published:
            if self.keep is not None:
                kept.keep(self.keep)
            work.publish(self.force)

    def _go_on(self, kept: KeptSteps) -> int:
        """Remember the steps that are done; returns how many those are."""
        if kept.published() and self._remember(kept, len(self.steps)):
            return len(self.steps)
        if kept.folder.published:  # by a run that was killed while it removed its folder
            kept.folder.forget()
        kept.folder.retract()
        refuse_existing(self.out, self.force)
        if self.keep is not None:
            kept.refuse_kept(self.keep)
        # from the first step on, plans and statistics that are whole are found again
        first = next(n for n in (kept.reached(), 0) if self._remember(kept, n))
        kept.begin_at(first)
        return first

    def _remember(self, kept: KeptSteps, count: int) -> bool:
        """Take what the first steps did from where they kept it; False if not all is there."""
        self.done.clear()
        self.recovered.clear()
        place = kept.folder.path
        for number, step in enumerate(self.steps[:count]):
            told = kept.told(number)
            if told is None:
                return False
            if isinstance(step, Recovery):
                done = RecoveryDone(step, told["teacher"], told["result"], told["seconds"])
                self.recovered[number] = done
                continue
            plan = kept_plan(kept.folder, _plan_of(number))
            if plan is None:
                return False
            told["sizes"] = Sizes.from_json(told["sizes"])
            self.done.append(StepDone(plan, told["sizes"], told["seconds"], told["observed"]))
        wanted = self._projected(count)
        if wanted and not finished_statistics(place / f"statistics-{count}", wanted):
            return False
        known = place / "statistics-0"
        if count and self.observed is not None and finished_statistics(known, set()):
            self.observed(known)
        return True

    def _told(self, number: int) -> dict[str, Any]:
        """What a step that has just been done did, for ``_remember``."""
        if number in self.recovered:
            done = self.recovered[number]
            return {"teacher": done.teacher, "result": done.result, "seconds": done.seconds}
        last = self.done[-1]
        return {"sizes": asdict(last.sizes), "seconds": last.seconds, "observed": last.observed}

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

    def _step(
        self,
        number: int,
        step: Step,
        source: Source,
        known: Path | None,
        target: Path,
        work: WorkFolder,
    ) -> Path | None:
        """One step; returns statistics for the next one, if that wants them projected."""
        seconds = dict[str, float]()
        observed = "nothing" if not step.method.needs else "the model, layer by layer as it changes"
        start = time.perf_counter()
        later = self._projecting(number)
        if known is None and (step.needs or later):
            known = work.path / f"statistics-{number}"
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
        plan = self._planned(number, step, source, known if step.needs or given else None, work)
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
            resumable=True,
        )
        seconds["apply"] = time.perf_counter() - start
        if self.done and self.done[-1].sizes.nonzero[1] < self.done[-1].sizes.parameters[1]:
            sizes = replace(sizes, nonzero=(self.done[-1].sizes.nonzero[1], _nonzero(target)))
        self.done.append(StepDone(plan, sizes, seconds, observed))
        if not later or known is None:
            return None
        after = work.path / f"statistics-{number + 1}"
        if not finished_statistics(after, later):
            project_statistics(known, plan, target, after, self.compute.trust_remote_code)
        return after

    def _planned(
        self, number: int, step: Step, source: Source, known: Path | None, work: WorkFolder
    ) -> Plan:
        """What the step decides, or has decided before an interruption."""
        name = _plan_of(number)
        if self.recipe is None:
            asked = (step.method, step.budget, step.uniform, step.seed, step.constraints)
            name = plan_name(*asked, self.writing, known)
        plan = kept_plan(work, name)
        if plan is None:
            plan = make_plan(
                source, step.method, step.budget, known, self.text,
                compute=self.compute, seed=step.seed, progress=self.progress, uniform=step.uniform,
                constraints=step.constraints, writing=self.writing, out=work.path / name,
                force=True,
            )  # fmt: skip
            keep_plan(work, name)
        return plan

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

    def _projected(self, number: int) -> set[str]:
        """What ``number`` and the steps behind it read from statistics projected on to it."""
        between = 0 < number < len(self.steps) and isinstance(self.steps[number - 1], Step)
        return self._projecting(number - 1) if between else set()


def _plan_of(number: int) -> str:
    return f"plan-{number + 1}.json"


def _nonzero(directory: Path) -> int:
    """Values that are not zero, counted: a plan does not know what earlier ones zeroed."""
    checkpoint = Checkpoint.open(directory)
    return sum(int(checkpoint.read(key).count_nonzero()) for key in checkpoint.tensors)
