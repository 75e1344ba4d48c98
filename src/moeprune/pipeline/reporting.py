"""``moeprune report``: the page of whatever a folder holds of a run, finished or not."""

from __future__ import annotations

import glob
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.core.accumulators import Routing
from moeprune.errors import MoepruneError
from moeprune.files import json_bytes, load_json, write_together
from moeprune.models.checkpoint import REPORT_FILES, Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.models.store import StatisticsStore
from moeprune.pipeline import facts
from moeprune.pipeline.arena.pages import compare_page
from moeprune.pipeline.arena.state import FORMAT as COMPARE
from moeprune.pipeline.arena.state import PAGE as COMPARE_PAGE
from moeprune.pipeline.arena.state import RESULT as COMPARE_RESULT
from moeprune.pipeline.atlas import SHORT, atlas, routing
from moeprune.pipeline.gathering import evaluations, gather
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    read_beginnings,
    silent,
)
from moeprune.pipeline.steps import StepDone
from moeprune.report.html import render_report
from moeprune.report.reading import FORMAT

PAGE, RUN = REPORT_FILES
_RESULTS = (RUN, "demo.json")
UNMEASURED = "what was lost was not measured: "
UNROUTED = "routing after the cut was not measured: "
_MAX = 1 << 28
_STATE = "run.json"  # in the folder of an interrupted stage, beside its output
_FINISHED = ("done", "refused", "failed", "same")


@dataclass(frozen=True)
class Reported:
    """Where the page stands, and what could not be shown because the run does not hold it."""

    path: Path
    missing: tuple[str, ...]


def report(source: Source, out: Source | None = None, force: bool = False) -> Reported:
    """Draw the report of a run's folder.

    Args:
        source: what ``demo``, ``prune``, ``compare`` or ``run`` wrote, or a folder with plans,
            statistics, checkpoints and evaluations (``evaluate --json``) in it.
        out: the page; by default ``report.html`` in the folder, or a comparison's own page.
        force: replace an existing page.

    Raises:
        MoepruneError: the folder holds nothing of a run, or a file of it is damaged.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise _absent(folder)
    page, missing, name = _drawn(folder)
    path = folder / name if out is None else Path(out)
    write_together({path: page.encode()}, force)
    return Reported(path, tuple(missing))


def _absent(folder: Path) -> MoepruneError:
    """No output; perhaps the command that makes it was interrupted, and can go on."""
    kept = sorted(folder.parent.glob(f"{glob.escape(folder.name)}.*/{_STATE}"))
    if kept:
        return MoepruneError(
            f"{folder} is not finished: {kept[0].parent} holds what was done so far",
            "run the same command again, it goes on from there",
        )
    return MoepruneError(f"no such folder: {folder}", "give what demo, prune, compare or run wrote")


def _drawn(folder: Path) -> tuple[str, list[str], str]:
    """The page, what is missing, and the name that it has by default."""
    if (folder / COMPARE_RESULT).is_file():
        result = _read(folder / COMPARE_RESULT, COMPARE)
        if result.get("original") is None:
            raise MoepruneError(
                f"{folder} has measured nothing yet", "run the same moeprune compare again"
            )
        try:
            return compare_page(folder, result)[0], _unfinished(result), COMPARE_PAGE
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise MoepruneError(
                f"{folder / COMPARE_RESULT} is damaged: {error!r}", "make the run again"
            ) from error
    for name in _RESULTS:
        if (folder / name).is_file():
            result = _read(folder / name, FORMAT)
            return render_report(_completed(result, folder)), [], PAGE
    result, missing = gather(folder)
    return render_report(result), missing, PAGE


def _read(file: Path, form: str) -> dict[str, Any]:
    try:
        data = load_json(file, _MAX)
    except ValueError as error:
        raise MoepruneError(f"{file} is damaged: {error}", "make the run again") from error
    if not isinstance(data, dict) or data.get("format") != form:
        raise MoepruneError(f"{file} is not of format {form}", "make the run again")
    return data


def _completed(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result with evaluations that were made since and stand beside it."""
    rows = result.get("rows")
    if not isinstance(rows, list):
        return result
    if any(not isinstance(row, dict) or row.get("perplexity") for row in rows):
        return result  # damaged, or measured by the run itself: other text is not mixed with it
    found = {str(one.get("model")): one for one in evaluations(folder)}
    model = result.get("model")
    base = str(model.get("name")) if isinstance(model, dict) else ""
    used = [found[str(row.get("name"))] for row in rows if str(row.get("name")) in found]
    if not used:
        return result
    filled = [
        row | facts.measured(found.get(str(row.get("name"))))
        if row.get("method") is not None
        else row | facts.measured_original(base, used)
        for row in rows
    ]
    told = [text for text in result.get("warnings") or [] if not text.startswith(UNMEASURED)]
    return {**result, "rows": filled, "warnings": told}


def _unfinished(result: Mapping[str, Any]) -> list[str]:
    """What a comparison was asked for and has not done."""
    cells = result.get("cells") or {}
    open_cells = [
        key
        for key in result.get("order") or ()
        if cells.get(key, {}).get("status") not in _FINISHED
    ]
    if not open_cells:
        return []
    total = len(result["order"])
    return [
        f"{len(open_cells)} of {total} cells are not finished, the first is {open_cells[0]}: run "
        "the same command again"
    ]


@dataclass
class Witness:
    """Keeps of a run what its report shows, and writes the report into the new checkpoint.

    Attributes:
        source: the original.
        compute: as in the stages.
        command: what was run.
        text: that routing is measured on, before and after; None measures nothing.
        progress: as in the stages.
    """

    source: Source
    compute: Compute
    command: str
    text: Text | None = None
    progress: Progress = silent
    _began: float = field(default_factory=time.perf_counter)
    _observed: dict[str, Any] = field(default_factory=dict)

    def observe(self, statistics: Path) -> None:
        """Take what is to be known of the original's statistics; they may be deleted then."""
        store = StatisticsStore.open(statistics)
        if Routing.name not in store.manifest["collect"]:
            return
        checkpoint = Checkpoint.open(self.source, self.compute.trust_remote_code)
        self._observed = {
            "calibration": {**facts.calibration(store), "seconds": None},
            "usage": facts.usage(store),
            "atlas": atlas(store, load_tokenizer(checkpoint)),
        }

    def write(
        self,
        out: Path,
        steps: Sequence[StepDone],
        measured: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """Put the result and its page into the checkpoint ``out``, which the last step wrote.

        The arguments are those of ``known``.
        """
        self.finish(out, self.known(out, steps, measured, names))

    def known(
        self,
        out: Path,
        steps: Sequence[StepDone],
        measured: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The result of ``out`` before routing is measured.

        ``measured`` is the evaluation against the original, if there was one; ``names`` are those
        of all steps, if others than ``steps`` were between or after them.
        """
        base, first, last = dict(steps[0].plan.model), steps[0], steps[-1]
        # layers may have different numbers; a plan of dropped layers names no expert
        base["experts"] = max([base["experts"], *(p.experts for p in first.plan.layers.values())])
        base |= {"parameters": first.sizes.parameters[0], "bytes": first.sizes.bytes[0]}
        original = {
            "name": _originals_name(out), "method": None, "experts": first.sizes.experts[0],
            "experts_before": first.sizes.experts[0], "parameters": base["parameters"],
            "nonzero_parameters": first.sizes.nonzero[0], "bytes": base["bytes"],
            "perplexity": {}, "seconds": {},
        }  # fmt: skip
        return {
            "format": FORMAT,
            "command": self.command,
            "model": base,
            **self._observed,
            "atlas": self._observed.get("atlas"),
            "rows": [
                original | facts.measured_original(base["name"], [measured] if measured else []),
                _row(out, steps, names) | facts.measured(measured),
            ],
            "warnings": [] if measured else [self._what_to_run(out)],
            "versions": dict(last.plan.versions),
            "seconds": round(time.perf_counter() - self._began, 2),
        }

    def finish(self, out: Path, known: Mapping[str, Any]) -> None:
        """Measure routing, and put what is then known and its page into the checkpoint ``out``."""
        began = time.perf_counter()
        routed, unrouted = self._routing(out)
        result = {
            **known,
            "atlas": {**(known["atlas"] or {}), **routed} or None,
            "warnings": [*known["warnings"], *unrouted],
            "seconds": round(known["seconds"] + time.perf_counter() - began, 2),
        }
        page = render_report(result).encode()
        write_together({out / RUN: json_bytes(result), out / PAGE: page}, True)

    def _what_to_run(self, out: Path) -> str:
        found = shlex.quote(str(out / "evaluation.json"))
        result, original = shlex.quote(str(out)), shlex.quote(str(self.source))
        return (
            f"{UNMEASURED}moeprune evaluate {result} --teacher {original} --json > {found}, "
            f"then moeprune report {result} --force"
        )

    def _routing(self, out: Path) -> tuple[dict[str, Any], list[str]]:
        """Routing of both models on a few thousand tokens, or what to say in place of it.

        The checkpoint is written by now, so nothing that goes wrong here stops the command.
        """
        if self.text is None:
            return {}, [f"{UNROUTED}the same command with --routing measures it"]
        trust = self.compute.trust_remote_code
        try:
            original = Checkpoint.open(self.source, trust)
            models = {
                _originals_name(out): self.compute.open(original),
                out.resolve().name: self.compute.open(Checkpoint.open(out, trust)),
            }
            domains = read_beginnings(original, self.text, SHORT)
            found = routing(models, domains, self.compute.workers, self.progress)
        except MoepruneError as error:
            return {}, [f"{UNROUTED}{error.problem}"]
        unseen = [name for name in models if name not in found["rows"]]
        if unseen:
            return {}, [f"{UNROUTED}that of {' and '.join(unseen)} cannot be observed"]
        return {"routing": found}, []


def _originals_name(out: Path) -> str:
    """What the original is called beside the result, which may be in a folder of that name."""
    return "original" if out.resolve().name != "original" else "the original"


def _row(out: Path, steps: Sequence[StepDone], names: Sequence[str]) -> dict[str, Any]:
    """The new checkpoint; its plan is the first step's, because the atlas is of the original."""
    first, last = steps[0], steps[-1]
    seconds: dict[str, float] = {}
    for step in steps:
        for name, value in step.seconds.items():
            seconds[name] = round(seconds.get(name, 0.0) + value, 2)
    return {
        "name": out.resolve().name,
        "method": " + ".join(names or [step.plan.method for step in steps]),
        "budget": dict(last.plan.budget),
        "options": dict(last.plan.options),
        "seed": last.plan.seed,
        "experts": last.sizes.experts[1],
        "experts_before": first.sizes.experts[0],
        "parameters": last.sizes.parameters[1],
        "nonzero_parameters": last.sizes.nonzero[1],
        "bytes": last.sizes.bytes[1],
        "perplexity": {},
        "seconds": seconds,
        "path": str(out),
        "warnings": [text for step in steps for text in step.plan.warnings],
        "plan": facts.plan_facts(first.plan),
    }
