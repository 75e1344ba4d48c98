"""The main job on the embedded model: calibrate once, plan six times, write, measure, report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.core.accumulators import LIGHT
from moeprune.core.budget import Budget
from moeprune.core.plan import Plan
from moeprune.evaluation.summary import summary
from moeprune.files import json_bytes, new_directory, refuse_existing
from moeprune.models.checkpoint import DEMO, Checkpoint
from moeprune.models.data import describe, load_tokenizer
from moeprune.models.editing import Sizes
from moeprune.models.loading import LayeredModel
from moeprune.models.store import StatisticsStore, versions, write_plan
from moeprune.pipeline import facts, stages
from moeprune.pipeline.atlas import atlas, routing
from moeprune.pipeline.cards import write_measured
from moeprune.pipeline.evaluating import measure
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Text,
    read_calibration,
    read_heldout,
    silent,
)
from moeprune.pipeline.measure import peak_memory, reset_peak_memory
from moeprune.pipeline.sample import DEMO_PAIRS, with_sample
from moeprune.pipeline.seen import seen_domains
from moeprune.report.html import render_report

RESULT = "demo.json"
REPORT = "report.html"
_ORIGINAL = "original"


@dataclass(frozen=True)
class Cell:
    """One method at one budget."""

    name: str
    method: str
    budget: Budget
    options: Mapping[str, Any] = field(default_factory=dict)


_DENSE = {"propagate": "dense"}  # so that one calibration serves all
CELLS = (
    Cell("mone-50", "mone", Budget(ratio=0.5)),
    Cell("mone-75", "mone", Budget(ratio=0.75)),
    Cell("moeits-50", "moeits", Budget(ratio=0.5)),
    Cell("moeits-75", "moeits", Budget(ratio=0.75)),
    Cell("moe-pruner-50", "moe-pruner", Budget(ratio=0.5), _DENSE),
    Cell("moe-pruner-2of4", "moe-pruner", Budget(pattern=(2, 4)), _DENSE),
)


@dataclass
class _Done:
    plan: Plan | None
    sizes: Sizes
    seconds: dict[str, float]
    peak: int | None
    measured: dict[str, Any] = field(default_factory=dict)


def demo(
    out: Path,
    cells: Sequence[Cell] = CELLS,
    text: Text = Text(sequences=120, length=512),
    heldout: Text = Text(sequences=32, length=256),
    compute: Compute = Compute(dtype="float32"),
    force: bool = False,
    command: str = "moeprune demo",
    progress: Progress = silent,
    pairs: int = DEMO_PAIRS,
) -> dict[str, Any]:
    """Compress the embedded model in several ways; write checkpoints, plans and a report.

    Returns:
        The result as JSON types (format ``moeprune.run/1``); it also stands in ``demo.json``.

    Raises:
        MoepruneError: the output exists or cannot be written; nothing is left behind.
    """
    refuse_existing(out, force)
    begin = time.perf_counter()
    with new_directory(out, force) as work:
        store = stages.calibrate(DEMO, work / "statistics", text, LIGHT, compute, progress=progress)
        calibrated = time.perf_counter() - begin
        done = {_ORIGINAL: _original()}
        for cell in cells:
            done[cell.name] = _compress(cell, work, compute, progress)
        _measure(done, work, heldout, compute, progress)
        rows = [_row(name, one, out) for name, one in done.items()]
        result = {
            "format": "moeprune.run/1",
            "command": command,
            "model": _model_facts(),
            "calibration": {
                **facts.calibration(store),
                "seconds": round(calibrated, 2),
            },
            "usage": facts.usage(store),
            "atlas": _atlas(store, done, work, text, compute, progress),
            "rows": with_sample(rows, work, pairs, compute, progress),
            "warnings": [],
            "versions": versions(),
            "seconds": round(time.perf_counter() - begin, 2),
        }
        (work / RESULT).write_bytes(json_bytes(result))
        (work / REPORT).write_text(render_report(result), encoding="utf-8")
    return result


def _original() -> _Done:
    checkpoint = Checkpoint.open(DEMO)
    model = LayeredModel(checkpoint)
    experts = sum(site.shape.experts for site in model.sites.values())
    numel, nbytes = checkpoint.numel, checkpoint.nbytes
    sizes = Sizes((experts, experts), (numel, numel), (numel, numel), (nbytes, nbytes))
    return _Done(None, sizes, {}, None)


def _compress(cell: Cell, work: Path, compute: Compute, progress: Progress) -> _Done:
    def named(what: str, done: int, total: int) -> None:
        progress(f"{cell.name}: {what}", done, total)

    reset_peak_memory()
    start = time.perf_counter()
    plan = stages.plan(
        DEMO,
        cell.method,
        cell.budget,
        work / "statistics",
        options=cell.options,
        compute=compute,
        progress=named,
    )
    planned = time.perf_counter()
    write_plan(plan, work / f"{cell.name}.plan.json")
    sizes = stages.apply(DEMO, plan, work / cell.name, progress=named)
    applied = time.perf_counter()
    seconds = {"plan": planned - start, "apply": applied - planned}
    return _Done(plan, sizes, seconds, peak_memory())


def _measure(
    done: dict[str, _Done], work: Path, heldout: Text, compute: Compute, progress: Progress
) -> None:
    """All models on the same held-out windows."""
    models = _open(done, work, compute)
    domains = read_heldout(Checkpoint.open(DEMO), heldout)
    scores = measure(models, domains, _ORIGINAL, compute, progress)
    for name, evaluation in scores.items():
        one = done[name]
        one.seconds["evaluate"] = evaluation.seconds
        if name == _ORIGINAL:
            one.measured = summary(evaluation)
            continue
        dtype = str(models[name].dtype).removeprefix("torch.")
        one.measured = {"teacher": DEMO, "dtype": dtype, "data": describe(domains)}
        one.measured |= summary(evaluation, scores[_ORIGINAL], seen_domains(work / name))
        write_measured(work / name, one.measured)


def _atlas(
    store: StatisticsStore,
    done: Mapping[str, _Done],
    work: Path,
    text: Text,
    compute: Compute,
    progress: Progress,
) -> dict[str, Any]:
    """What the experts served, and the routing of all models on some of the same text."""
    original = Checkpoint.open(DEMO)
    models = _open(done, work, compute)
    entropy = routing(models, read_calibration(original, text), compute.workers, progress)
    return {**atlas(store, load_tokenizer(original)), "routing": entropy}


def _open(names: Mapping[str, _Done], work: Path, compute: Compute) -> dict[str, LayeredModel]:
    return {
        name: compute.open(Checkpoint.open(DEMO if name == _ORIGINAL else work / name))
        for name in names
    }


def _model_facts() -> dict[str, Any]:
    found = stages.inspect(DEMO)
    keys = ("model_type", "layers", "moe_layers", "experts", "top_k", "parameters", "bytes")
    return {"name": DEMO, **{key: found[key] for key in (*keys, "fingerprint")}}


def _row(name: str, done: _Done, out: Path) -> dict[str, Any]:
    plan = done.plan
    return {
        "name": name,
        "method": None if plan is None else plan.method,
        "budget": None if plan is None else dict(plan.budget),
        "options": None if plan is None else dict(plan.options),
        "experts": done.sizes.experts[1],
        "experts_before": done.sizes.experts[0],
        "parameters": done.sizes.parameters[1],
        "nonzero_parameters": done.sizes.nonzero[1],
        "bytes": done.sizes.bytes[1],
        **facts.measured(done.measured),
        "seconds": {key: round(value, 3) for key, value in done.seconds.items()},
        "peak_memory_bytes": done.peak,
        "path": None if plan is None else str(out / name),
        "warnings": [] if plan is None else list(plan.warnings),
        "plan": None if plan is None else facts.plan_facts(plan),
    }
