"""The report that ``prune`` writes into its checkpoint, if it is cut while it measures routing.

The checkpoint is there by then. What its report says besides stands in ``<out>.report`` until the
report does, so that the same command only measures routing again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeprune.core.plan import Plan
from moeprune.files import json_bytes, load_json, parse_json, sha256_file
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.editing import Sizes
from moeprune.models.store import StatisticsStore
from moeprune.models.surgery import PLAN_COPY, PROVENANCE
from moeprune.pipeline.pruning_place import inputs_of
from moeprune.pipeline.reporting import Witness
from moeprune.pipeline.steps import Step, StepDone, Steps
from moeprune.work import folder_of, work_folder

REPORT = "report"
_KNOWN = "known.json"
_MOST = 1 << 28


@dataclass(frozen=True)
class KeptReport:
    """The report of the checkpoint that one step writes.

    Attributes:
        witness: writes it.
        steps: have that step.
    """

    witness: Witness
    steps: Steps

    def go_on(self) -> StepDone | None:
        """Finish a report that was cut; what the step was that its checkpoint came from.

        None if nothing was cut, or the checkpoint is no longer the one that was written then. The
        plan is without its layers.

        Raises:
            OutputError: another command was cut there, or another process works there.
        """
        out, force = self.steps.out, self.steps.force
        if not folder_of(out, REPORT).is_dir() or not out.is_dir():
            return None
        with work_folder(out, REPORT, self._identity(), force) as folder:
            kept = folder.read(_KNOWN)
            told = {} if kept is None else parse_json(kept)
            if not told or told["record"] != _record(out):
                return None
            plan = load_json(out / PLAN_COPY, _MOST)
            self.witness.finish(out, told["result"])
        return StepDone(
            Plan.from_json({**plan, "layers": {}}, {}),
            Sizes.from_json(told["sizes"]),
            told["seconds"],
            told["observed"],
        )

    def write(self, done: StepDone) -> None:
        """Write it into the checkpoint that has just appeared."""
        out = self.steps.out
        with work_folder(out, REPORT, self._identity(), force=True) as folder:
            known = self.witness.known(out, [done])
            told = {
                "record": _record(out),
                "result": known,
                "sizes": asdict(done.sizes),
                "seconds": done.seconds,
                "observed": done.observed,
            }
            folder.write(_KNOWN, json_bytes(told))
            self.witness.finish(out, known)

    def _identity(self) -> dict[str, Any]:
        """What decides the checkpoint, for ``work_folder``."""
        steps = self.steps
        (step,) = steps.steps
        assert isinstance(step, Step)
        given = steps.statistics
        known = None if given is None else StatisticsStore.open(given).summary["sha256"]
        return {
            **inputs_of(
                Checkpoint.open(steps.source, steps.compute.trust_remote_code),
                steps.text,
                steps.compute,
            ),
            **step.inputs(),
            "writing": asdict(steps.writing),
            "given statistics": known,
        }


def _record(out: Path) -> str | None:
    """What tells a checkpoint from another one that took its place."""
    file = out / PROVENANCE
    return sha256_file(file) if file.is_file() else None
