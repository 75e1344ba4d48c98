"""``moeprune compare``: every method with every budget, on one calibration, measured alike."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moeprune.core.budget import Budget
from moeprune.errors import MoepruneError
from moeprune.evaluation.perplexity import Evaluation
from moeprune.files import sha256_bytes, sha256_file, write_together
from moeprune.models import data
from moeprune.models.checkpoint import DEMO, Checkpoint
from moeprune.models.editing import Writing
from moeprune.models.layout import refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.store import StatisticsStore, versions
from moeprune.pipeline.arena import cell as cells
from moeprune.pipeline.arena.asking import Asked, Calibration, Cell, calibrations, parse_methods
from moeprune.pipeline.arena.estimate import Clock, spoken
from moeprune.pipeline.arena.fanning import Fanning, Group, prepared
from moeprune.pipeline.arena.lanes import Fan, LaneWork
from moeprune.pipeline.arena.measuring import ORIGINAL, Measured, Measuring
from moeprune.pipeline.arena.pages import compare_page
from moeprune.pipeline.arena.scoring import Scoring, union
from moeprune.pipeline.arena.state import (
    CHECKPOINTS,
    PAGE,
    PICTURE,
    STATISTICS,
    Run,
    open_run,
    refuse_difference,
)
from moeprune.pipeline.atlas import atlas
from moeprune.pipeline.inputs import Compute, Progress, Source, Text, code_of, silent
from moeprune.pipeline.inputs import read_heldout as heldout_text
from moeprune.pipeline.inspection import inspect

RATIOS = (0.25, 0.5, 0.75)
_DEMO_TEXT, _TEXT = Text(sequences=120, length=512), Text()
_DEMO_HELDOUT, _HELDOUT = Text(sequences=16, length=256), Text(sequences=64, length=256)
_FINISHED = (cells.DONE, cells.REFUSED, SAME := "same")


@dataclass(frozen=True)
class Grid:
    """What is compared with what.

    Attributes:
        methods: ``all``, or ``a,b:option=value,option=value,c``; or a list of such.
        budgets: how much each removes; a method that has no such budget is a row that says so.
        seeds: for methods that are random; the others are measured once.
        domains: calibration texts, each of domains joined by ``+``, or ``all``; none takes all.
        sequences: numbers of calibration sequences; none takes that of the text.
    """

    methods: str | Sequence[str] = "all"
    budgets: Sequence[Budget] = tuple(Budget(ratio=ratio) for ratio in RATIOS)
    seeds: Sequence[int] = (0,)
    domains: Sequence[str] = ()
    sequences: Sequence[int] = ()

    def asked(self, text: Text) -> Asked:
        """Everything spelled out.

        Raises:
            MoepruneError: an unknown method, option or domain, or nothing to do.
        """
        if not self.budgets or not self.seeds:
            raise MoepruneError("nothing to compare: no budget or no seed", "--ratios 0.25,0.5")
        for name, values in (("budget", self.budgets), ("seed", self.seeds)):
            if len({*map(str, values)}) < len(values):
                raise MoepruneError(f"a {name} is asked for twice")
        texts = calibrations(text, self.domains, self.sequences)
        return Asked(parse_methods(self.methods), self.budgets, texts, self.seeds)


def compare(
    source: Source,
    out: Source,
    grid: Grid = Grid(),
    text: Text | None = None,
    heldout: Text | None = None,
    compute: Compute | None = None,
    writing: Writing = Writing(),
    force: bool = False,
    keep_checkpoints: bool = False,
    command: str = "moeprune compare",
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
    fan: Fan | None = None,
) -> dict[str, Any]:
    """Plan, write and measure every cell of ``grid``; go on where an earlier run stopped.

    What a method cannot do is a row with the reason. Checkpoints are deleted once they are
    measured, unless ``keep_checkpoints``. For ``demo``, text, windows and dtype have defaults of
    their own: 120 sequences of 512 tokens, 16 windows of 256 per domain, float32.

    Args:
        source: the model.
        out: a directory; with a comparison in it, its finished cells are kept.
        grid: what is compared.
        text: to calibrate on; ``grid`` may say which domains and how many sequences.
        heldout: to measure on; ``sequences`` is per domain.
        compute: where and in which type.
        writing: choices that no method makes.
        force: start afresh.
        keep_checkpoints: keep them in ``out/checkpoints``.
        command: for the report.
        progress: as in the other stages.
        say: takes a line now and then: what is done, and how long the rest will take.
        fan: several processes that share the cells; None computes them one after another.

    Returns:
        The content of ``compare.json`` (``moeprune.compare/1``).

    Raises:
        MoepruneError: anything the user can mend; what is finished is kept.
    """
    is_demo = str(source) == DEMO
    text = text or (_DEMO_TEXT if is_demo else _TEXT)
    heldout = heldout or (_DEMO_HELDOUT if is_demo else _HELDOUT)
    compute = compute or Compute(dtype="float32" if is_demo else "auto")
    asked = grid.asked(text)
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    model = compute.open(checkpoint)
    refuse(model)
    windows = heldout_text(checkpoint, heldout)
    identity = _identity(model, compute, asked.calibrations, windows)
    identity["writing"] = asdict(writing)
    with open_run(Path(out), identity, force) as run:
        facts = inspect(source, compute.trust_remote_code)
        run.facts |= _facts(command, facts, windows, asked)
        arena = _Arena(
            source,
            run,
            asked,
            model,
            windows,
            compute,
            writing,
            keep_checkpoints,
            progress,
            say,
            fan,
        )
        arena.run_all()
    return run.result()


def _identity(
    model: LayeredModel,
    compute: Compute,
    texts: Sequence[Calibration],
    windows: Sequence[data.Domain],
) -> dict[str, Any]:
    """What decides numbers, by the name under which a difference is reported."""
    found: dict[str, Any] = {
        "model fingerprint": model.checkpoint.fingerprint,
        "code of the model": code_of(model.checkpoint),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": compute.device,
        "held-out text": data.describe(windows)["hash"],
    }
    hashes: dict[str, str] = {}
    named = {calibration.name: calibration.text for calibration in texts}
    for calibration in texts:  # what combinations are sums of is shared between them
        named |= {f"{name} of a sum": text for name, text in calibration.parts}
    for label, text in named.items():
        parts = []
        for name, file in sorted(data.parse_sources(text.sources, "calibration").items()):
            hashes.setdefault(str(file), sha256_file(file))
            parts.append(f"{name}={hashes[str(file)]}")
        digest = sha256_bytes("\n".join(parts).encode())
        settings = f"{text.sequences} x {text.length}, seed {text.seed}, {digest}"
        found[f"calibration text {label}"] = settings
    return found | {f"version of {name}": value for name, value in versions().items()}


def _facts(
    command: str, facts: dict[str, Any], windows: Sequence[data.Domain], asked: Asked
) -> dict[str, Any]:
    keys = ("model_type", "layers", "moe_layers", "experts", "top_k", "parameters", "bytes")
    model = {"name": facts["name"], **{k: facts[k] for k in (*keys, "fingerprint")}}
    if isinstance(model["experts"], list):  # by layer, where they differ
        model["experts"] = max(model["experts"])
    return {
        "command": command,
        "model": model,
        "heldout": data.describe(windows),
        "versions": versions(),
        "order": [cell.key for cell in asked.cells()],
        "texts": [calibration.name for calibration in asked.calibrations],
    }


@dataclass
class _Arena:
    source: Source
    run: Run
    asked: Asked
    model: LayeredModel
    windows: Sequence[data.Domain]
    compute: Compute
    writing: Writing
    keep: bool
    progress: Progress
    say: Callable[[str], None]
    fan: Fan | None = None
    clock: Clock = field(default_factory=Clock)
    began: float = field(default_factory=time.perf_counter)

    def run_all(self) -> None:
        """All cells that are not finished, group by group."""
        run = self.run
        before = float(run.facts.get("seconds", 0.0))
        self._check_options()
        todo = [cell for cell in self.asked.cells() if not self._finished(cell)]
        total = len(run.facts["order"])
        if len(todo) < total:
            self.say(f"{total - len(todo)} of {total} cells were finished before")
        scoring = Scoring(
            self.source, run.path / STATISTICS, self.model.checkpoint.fingerprint,
            union(self.asked.entries, self.model), self.compute, self.progress,
        )  # fmt: skip
        scoring.facts = run.facts.setdefault("calibrations", {})
        run.save()
        maker = cells.Maker(
            self.source, self.model, run, scoring, self.compute, self.writing, self.progress
        )
        measuring = Measuring(self.source, self.windows, self.compute, self.progress)
        size = measuring.group_size(self.model, run.path)
        run.facts["group"] = size
        if self.fan is None:
            self._one_by_one(todo, maker, measuring, size, before)
        else:
            self._fanned(todo, maker, size, before)
        if run.facts.get(ORIGINAL) is None:
            self._original(measuring.original())
        self._finish(before)

    def _one_by_one(
        self,
        todo: Sequence[Cell],
        maker: cells.Maker,
        measuring: Measuring,
        size: int,
        before: float,
    ) -> None:
        group: Group = []
        for number, cell in enumerate(todo):
            row = self._made(cell, maker.attempt(cell, self.run.cells.get(cell.key)))
            if row is not None:
                group.append((cell, row))
            if len(group) == size or (group and number + 1 == len(todo)):
                folders = {cell.key: self.run.work / cell.slug for cell, _ in group}
                self._measured(group, measuring.measure(folders))
                group = []
                self._tell(todo[number + 1 :], before)

    def _fanned(self, todo: Sequence[Cell], maker: cells.Maker, size: int, before: float) -> None:
        """The same by several processes; this one alone writes what they found."""
        assert self.fan is not None
        there = prepared(todo, maker)
        for cell in todo:
            if cell not in there:
                self._made(cell, maker.attempt(cell, None))
        if not there:
            return
        fan = self.fan = replace(self.fan, jobs=min(self.fan.jobs, len(there)))
        work = LaneWork(
            os.fspath(self.source), self.run.path, maker.scoring.collect,
            fan.share(self.compute), self.writing, self.windows,
        )  # fmt: skip
        kept = {cell.key: self.run.cells.get(cell.key) for cell in there}
        with fan.lanes(work) as lanes:
            Fanning(lanes, size, self._made, self._measured).run_all(
                there, kept, lambda rest: self._tell(rest, before)
            )

    def _finished(self, cell: Cell) -> bool:
        return self.run.cells.get(cell.key, {}).get("status") in _FINISHED

    def _check_options(self) -> None:
        """A default that changed since makes another method under the same name."""
        for cell in self.asked.cells():
            row = self.run.cells.get(cell.key)
            if row is not None:
                label = cell.entry.label
                now = {f"{label}, option {k}": v for k, v in cells.begun(cell)["options"].items()}
                then = {f"{label}, option {k}": v for k, v in row["options"].items()}
                refuse_difference(self.run.path, then, now)

    def _made(self, cell: Cell, row: dict[str, Any]) -> dict[str, Any] | None:
        """Save the row of a cell that was tried; it if it can be measured, None if it ends here."""
        if "plan" in row["seconds"]:
            self.clock.planned(cell, row["seconds"]["plan"])
        if "apply" in row["seconds"]:
            self.clock.took("apply", row["seconds"]["apply"])
        if row["status"] == cells.PLANNED and self._same_as_first_seed(cell, row):
            row["status"] = SAME
            shutil.rmtree(self.run.work / cell.slug, ignore_errors=True)
        self.run.save(cell.key, row)
        return row if row["status"] == cells.PLANNED else None

    def _same_as_first_seed(self, cell: Cell, row: dict[str, Any]) -> bool:
        first = replace(cell, seed=self.asked.seeds[0])
        other = self.run.cells.get(first.key, {})
        return cell.seed != first.seed and other.get("decision") == row["decision"]

    def _measured(self, group: Group, result: Measured) -> None:
        """Save what a group of cells came to."""
        original = result.found.get(ORIGINAL)
        if original is not None:
            self._original(original)
        for cell, row in group:
            if cell.key in result.wrong:
                row.update(status=cells.FAILED, reason=result.wrong[cell.key])
            else:
                row.update(
                    cells.measured(result.found[cell.key], original, result.layers[cell.key])
                )
            row["seconds"]["evaluate"] = round(result.seconds / len(group), 3)
            self.clock.took("evaluate", result.seconds / len(group))
            self._put_away(cell)  # before: a cell that is done is not made again
            self.run.save(cell.key, row)

    def _put_away(self, cell: Cell) -> None:
        folder = self.run.work / cell.slug
        if self.keep:
            kept = self.run.path / CHECKPOINTS / cell.slug
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def _original(self, evaluation: Evaluation) -> None:
        facts = self.run.facts
        experts = sum(site.shape.experts for site in self.model.sites.values())
        facts[ORIGINAL] = {
            "name": ORIGINAL,
            "experts": experts,
            "experts_before": experts,
            "parameters": self.model.checkpoint.numel,
            "nonzero_parameters": self.model.checkpoint.numel,
            "bytes": self.model.checkpoint.nbytes,
            "bytes_ratio": 1.0,
            **cells.measured(evaluation, None, len(self.model.layers)),
        }

    def _tell(self, rest: Sequence[Cell], before: float) -> None:
        """One line; the estimate is of what this run measured, calibration left out."""
        total = len(self.run.facts["order"])
        spent = time.perf_counter() - self.began
        self.run.facts["seconds"] = round(before + spent, 2)
        left = self.clock.remaining(rest, 0)
        if left and self.fan is not None:
            left /= self.fan.jobs
        estimate = f", about {spoken(left)} left" if rest and left else ""
        self.say(f"{total - len(rest)} of {total} cells, {spoken(spent)} so far{estimate}")

    def _describe_experts(self) -> None:
        """What the experts served, on the first calibration text that was walked."""
        for calibration in self.asked.calibrations:
            folder = self.run.path / STATISTICS / calibration.name
            if folder.is_dir() and "atlas" not in self.run.facts:
                store = StatisticsStore.open(folder)
                tokenizer = data.load_tokenizer(self.model.checkpoint)
                self.run.facts["atlas"] = atlas(store, tokenizer)

    def _finish(self, before: float) -> None:
        run = self.run
        run.facts["seconds"] = round(before + time.perf_counter() - self.began, 2)
        self._describe_experts()
        run.save()
        page, picture = compare_page(run.path, run.result())
        files = {run.path / PAGE: page.encode()}
        if picture:
            files[run.path / PICTURE] = picture.encode()
        write_together(files, force=True)
