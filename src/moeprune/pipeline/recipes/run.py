"""``moeprune run``: a recipe from its file to the last checkpoint, and what it says of itself."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError
from moeprune.files import json_bytes, parse_json, sha256_bytes, sha256_file
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.store import versions
from moeprune.pipeline.cards import write_measured
from moeprune.pipeline.evaluating import evaluate
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    model_name,
    read_heldout,
    silent,
)
from moeprune.pipeline.pruning_place import text_of
from moeprune.pipeline.recipes.schema import Loaded, load_recipe
from moeprune.pipeline.recovery_steps import RecoveryDone
from moeprune.pipeline.reporting import Witness
from moeprune.pipeline.steps import StepDone, Steps
from moeprune.work import WorkFolder

RESULT_FORMAT = "moeprune.recipe-run/1"
_MEASURED = "evaluation.json"


def run(
    recipe: Source,
    out: Source | None = None,
    force: bool = False,
    keep: Source | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
    command: str = "",
) -> dict[str, Any]:
    """Do what a recipe says.

    What is done is kept in ``<out>.recipe`` until the end; the same call goes on from it, and ends
    with the same bytes as one that was never interrupted.

    Args:
        recipe: a YAML file; docs/recipes.md says what stands in it.
        out: the new checkpoint; by default where the recipe says, relative to it.
        force: replace an existing output.
        keep: a new directory for the checkpoints between the steps, which are deleted otherwise.
        trust_remote_code: run Python files that the model brings.
        progress: as in the stages.
        command: what was run; with it the checkpoint also gets a report.

    Returns:
        ``moeprune.recipe-run/1``: the steps with their plans' hashes, and the measurements.

    Raises:
        MoepruneError: anything the user can mend, with the line of the recipe; the output is there
            whole or not at all.
    """
    loaded = load_recipe(Path(recipe))
    begin = time.perf_counter()
    target = _target(loaded, out)
    compute = loaded.compute()
    if trust_remote_code:
        compute = replace(compute, trust_remote_code=True)
    witness = (
        Witness(loaded.model(), compute, command, loaded.text(), progress) if command else None
    )
    heldout, measured = loaded.heldout(), dict[str, Any]()

    def finish(folder: WorkFolder) -> None:
        if heldout is not None:
            measured.update(_measured(folder, target, loaded, heldout, compute, progress))
            write_measured(target, measured)
        if witness is not None:
            witness.write(target, steps.done, measured or None, [one.name for one in steps.steps])

    steps = Steps(
        loaded.model(),
        loaded.steps(),
        target,
        loaded.text(),
        None,
        compute,
        loaded.writing(),
        progress,
        force,
        None if keep is None else Path(keep),
        None if witness is None else witness.observe,
        {
            "evaluation": None if heldout is None else text_of(heldout, "heldout"),
            "report": witness is not None,
        },
        finish,
    )
    if heldout is not None:  # a missing file shows before hours of work
        checkpoint = Checkpoint.open(loaded.model(), compute.trust_remote_code)
        read_heldout(checkpoint, heldout)
    steps.run()
    seconds = time.perf_counter() - begin
    return _result(loaded, steps, measured or None, seconds)


def _result(
    loaded: Loaded, steps: Steps, measured: dict[str, Any] | None, seconds: float
) -> dict[str, Any]:
    """``moeprune.recipe-run/1``."""
    return {
        "format": RESULT_FORMAT,
        "recipe": {"file": loaded.path.name, "sha256": sha256_file(loaded.path)},
        "about": loaded.recipe.about,
        "model": model_name(loaded.model()),
        "path": str(steps.out),
        "steps": _all_described(steps),
        "evaluation": measured,
        "peak_memory_bytes": steps.peak,
        "seconds": round(seconds, 2),
        "versions": versions(),
    }


def _measured(
    folder: WorkFolder, out: Path, loaded: Loaded, text: Text, compute: Compute, progress: Progress
) -> dict[str, Any]:
    """What was lost, measured now or before an interruption."""
    found = folder.read(_MEASURED)
    if found is not None:
        return dict(parse_json(found))
    name = folder.path / "result"
    result = evaluate(out, loaded.model(), text, compute, progress, resume=name)
    folder.write(_MEASURED, json_bytes(result))
    return result


def _target(loaded: Loaded, out: Source | None) -> Path:
    if out is not None:
        return Path(out)
    if loaded.recipe.out is None:
        raise MoepruneError(f"{loaded.path} names no output", "give --out DIR")
    return loaded.path.parent / loaded.recipe.out


def _all_described(steps: Steps) -> list[dict[str, Any]]:
    pruned = iter(steps.done)
    return [
        _recovered(steps.recovered[number])
        if number in steps.recovered
        else _described(next(pruned))
        for number in range(len(steps.steps))
    ]


def _recovered(step: RecoveryDone) -> dict[str, Any]:
    made, result = step.recovery.training, dict(step.result)
    return {
        "recover": made.how,
        "options": made.to_json(),
        "teacher": step.teacher,
        "result": result,
        "seconds": {name: round(value, 2) for name, value in step.seconds.items()},
        "warnings": [],
    }


def _described(step: StepDone) -> dict[str, Any]:
    plan, sizes = step.plan, step.sizes
    return {
        "method": plan.method,
        "options": dict(plan.options),
        "budget": dict(plan.budget),
        "seed": plan.seed,
        "plan_sha256": sha256_bytes(json_bytes(plan.to_json(None))),
        "base_fingerprint": plan.model["fingerprint"],
        "observed": step.observed,
        "experts": list(sizes.experts),
        "parameters": list(sizes.parameters),
        "nonzero": list(sizes.nonzero),
        "bytes": list(sizes.bytes),
        "seconds": {name: round(value, 2) for name, value in step.seconds.items()},
        "warnings": list(plan.warnings),
    }
