"""One cell of a comparison: its plan, its checkpoint, and its row."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.core.plan import Plan
from moeprune.errors import MoepruneError, OutputError
from moeprune.evaluation.perplexity import Evaluation
from moeprune.evaluation.summary import ALL, against
from moeprune.files import json_bytes, sha256_bytes, sha256_file
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes, Writing
from moeprune.models.loading import LayeredModel
from moeprune.models.store import read_plan, write_plan
from moeprune.models.surgery import apply_plan
from moeprune.pipeline.arena.asking import Cell
from moeprune.pipeline.arena.kinds import kind_of, removes
from moeprune.pipeline.arena.measuring import said
from moeprune.pipeline.arena.scoring import Scoring, reads_statistics, refuse_gram
from moeprune.pipeline.arena.state import Run
from moeprune.pipeline.inputs import Compute, Progress, Source
from moeprune.pipeline.measure import peak_memory, reset_peak_memory
from moeprune.pipeline.planning import plan as make_plan

DONE, REFUSED, FAILED, PLANNED = "done", "refused", "failed", "planned"


@dataclass
class Maker:
    """Makes plans and checkpoints of cells.

    Attributes:
        source: the model.
        model: it, opened.
        run: where plans go.
        scoring: what they are made from.
        compute, writing, progress: as in the stages.
    """

    source: Source
    model: LayeredModel
    run: Run
    scoring: Scoring
    compute: Compute
    writing: Writing
    progress: Progress
    _memo: tuple[str, dict[Any, Any]] = field(default=("", {}))

    def plan(self, cell: Cell) -> Plan:
        """Decide; the budgets of one method on one text share what it finds out.

        Raises:
            MoepruneError: the method cannot do that on this model.
        """
        method = cell.entry.method
        method.accept(cell.budget)
        share = f"{cell.entry.label} {cell.calibration.name}"
        if self._memo[0] != share:
            self._memo = (share, {})
        statistics = self.scoring.path(cell.calibration) if reads_statistics(cell.entry) else None
        return make_plan(
            self.source,
            method,
            cell.budget,
            statistics,
            cell.calibration.text,
            compute=self.compute,
            seed=cell.seed,
            progress=self.progress,
            memo=self._memo[1],
        )

    def attempt(self, cell: Cell, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """The row of a cell: one that can be measured, or one that says why it cannot.

        Args:
            cell: what is tried.
            known: its row of an earlier run, if there is one.

        Raises:
            OutputError: the disk is full, for example.
        """
        again = dict(known) if known and known["status"] == PLANNED else None
        row = again or begun(cell)
        calibrated = self.scoring.seconds
        try:
            refuse_gram(cell.entry, self.model)
            row = self.make(cell, row)
        except OutputError:
            raise
        except MoepruneError as error:
            row |= {"status": REFUSED, "reason": error.problem, "hint": error.hint}
        except Exception as error:  # somebody else's method: its row says so, the others go on
            row |= {"status": FAILED, "reason": said(error)}
        if "plan" in row["seconds"] and again is None:
            spent = self.scoring.seconds - calibrated
            row["seconds"]["plan"] = round(row["seconds"]["plan"] - spent, 3)
        return row

    def make(self, cell: Cell, row: dict[str, Any]) -> dict[str, Any]:
        """Plan, or take the plan that an interrupted run left, and write the checkpoint.

        Returns:
            The row, with everything but what evaluation measures.
        """
        file = self.run.plan_file(cell.slug)
        reset_peak_memory()
        start = time.perf_counter()
        whole = file.is_file() and sha256_file(file) == row.get("plan_sha256")
        if row.get("status") == PLANNED and whole:
            plan = read_plan(file)
        else:
            plan = self.plan(cell)
            file.parent.mkdir(exist_ok=True)
            write_plan(plan, file, force=True)
            row |= planned(cell, plan, file, time.perf_counter() - start)
            self.run.save(cell.key, row)
        start = time.perf_counter()
        sizes = apply_plan(
            Checkpoint.open(self.source, self.compute.trust_remote_code),
            plan,
            self.run.work / cell.slug,
            True,
            lambda done, total: self.progress("writing", done, total),
            self.writing,
        )
        row["seconds"]["apply"] = round(time.perf_counter() - start, 3)
        row["peak_memory_bytes"] = peak_memory()
        return row | sized(sizes)


def begun(cell: Cell) -> dict[str, Any]:
    """What is known of a cell before anything is computed."""
    method = cell.entry.method
    return {
        "name": cell.entry.label,
        "method": method.name,
        "source": method.source,
        "options": _plain(method.options()),
        "budget": cell.budget.to_json(),
        "seed": cell.seed,
        "calibration": cell.calibration.name if method.needs else None,
        "sequential": method.sequential,
        "kind": None,
        "removes": None,
        "status": "begun",
        "reason": None,
        "seconds": {},
    }


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they come back from JSON, so that they can be compared."""
    found: dict[str, Any] = json.loads(json.dumps(options))
    return found


def planned(cell: Cell, plan: Plan, file: Path, seconds: float) -> dict[str, Any]:
    """What the plan adds to a row."""
    return {
        "status": PLANNED,
        "kind": kind_of(plan, cell.entry.method),
        "removes": removes(plan, cell.entry.method),
        "plan": f"{file.parent.name}/{file.name}",
        "plan_sha256": sha256_file(file),
        "decision": _decision(plan, file),
        "warnings": list(plan.warnings),
        "kept_by_layer": {str(i): len(layer.keep) for i, layer in sorted(plan.layers.items())},
        "seconds": {"plan": round(seconds, 3)},
    }


def _decision(plan: Plan, file: Path) -> str:
    """A hash of what is done, whatever it was called and seeded by."""
    vectors = file.with_suffix(".safetensors")
    whole = plan.to_json(None)
    layers = json_bytes([whole["layers"], list(plan.drop_layers)])
    return sha256_bytes(layers + (sha256_file(vectors).encode() if vectors.is_file() else b""))


def sized(sizes: Sizes) -> dict[str, Any]:
    """What writing adds to a row."""
    return {
        "experts": sizes.experts[1],
        "experts_before": sizes.experts[0],
        "parameters": sizes.parameters[1],
        "nonzero_parameters": sizes.nonzero[1],
        "bytes": sizes.bytes[1],
        "bytes_ratio": sizes.bytes[1] / sizes.bytes[0],
    }


def measured(evaluation: Evaluation, original: Evaluation | None, layers: int) -> dict[str, Any]:
    """What evaluation adds to a row; None where a number is not finite."""
    total = evaluation.total().to_json()
    base = None if original is None else original.total().to_json()["perplexity"]
    own = total["perplexity"]
    return {
        "status": DONE,
        "layers": layers,
        "perplexity": own,
        "perplexity_ratio": None if not base or own is None else own / base,
        "loss": total["loss"],
        "kl": total["kl"] if original is not None else None,
        "agreement": total["agreement"] if original is not None else None,
        "domains": {name: score.to_json() for name, score in evaluation.domains.items()},
        **({} if original is None else {"against": _intervals(evaluation, original)}),
    }


def _intervals(evaluation: Evaluation, original: Evaluation) -> dict[str, Any]:
    """Of all domains together, without words."""
    whole = against(evaluation, original)[ALL]
    return {name: whole[name] for name in ("loss", "kl", "agreement")}
