"""Rules about what a checkpoint says of its own making."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.errors import PlanError
from moeprune.files import sha256_bytes, sha256_file
from moeprune.models.surgery import CHECKSUMS, PLAN_COPY, PROVENANCE
from moeprune.verification.edits import Edit, read_edits
from moeprune.verification.finding import ERROR, WARNING, Finding, Found, Rule, Skip
from moeprune.verification.shards import read_json
from moeprune.verification.subject import Subject

_FORMAT = "moeprune.checkpoint/1"
_AGAIN = "apply the plan to the original again"


def _record(subject: Subject) -> dict[str, Any]:
    if not (subject.path / PROVENANCE).is_file():
        raise Skip(f"there is no {PROVENANCE}")
    record = read_json(subject.path / PROVENANCE)
    return record if isinstance(record, dict) else {}


def record(subject: Subject) -> Found:
    """moeprune.json: its format, its plan, its sizes."""
    found = _record(subject)
    if found.get("format") != _FORMAT:
        problem = f"it is not JSON of format {_FORMAT}"
        yield Finding("provenance", ERROR, PROVENANCE, None, problem, _AGAIN)
        return
    plan = subject.path / PLAN_COPY
    if not plan.is_file():
        problem = "the plan that it names is not there"
        yield Finding("provenance", ERROR, PLAN_COPY, None, problem, _AGAIN)
    elif sha256_bytes(plan.read_bytes()) != found.get("plan_sha256"):
        problem = f"it is not the plan that {PROVENANCE} names: their SHA-256 differ"
        yield Finding("provenance", ERROR, PLAN_COPY, None, problem, _AGAIN)
    steps = found.get("steps")
    if steps is not None and (
        not isinstance(steps, list)
        or [step.get("plan_sha256") if isinstance(step, dict) else None for step in steps[-1:]]
        != [found.get("plan_sha256")]
    ):
        problem = "the last of its steps is not the plan that it names"
        yield Finding("provenance", ERROR, PROVENANCE, None, problem, _AGAIN)
    subject.require_all()
    stored = {"tensor_bytes": sum(info.nbytes for info in subject.tensors.values())}
    if subject.quantised is None:  # otherwise a value on disk may be half a weight, or a scale
        stored["parameters"] = sum(info.numel for info in subject.tensors.values())
    for key, after in stored.items():
        sizes = found.get(key)
        if not isinstance(sizes, list) or sizes[1:] != [after]:
            problem = f"{key} is {sizes}, but {after} are stored"
            remedy = f"the weights were changed after they were written: {_AGAIN}"
            yield Finding("provenance", WARNING, PROVENANCE, None, problem, remedy)


def checksums(subject: Subject) -> Found:
    """The files of weights against the SHA-256 that they were written with."""
    told = _record(subject).get(CHECKSUMS)
    if not isinstance(told, dict):
        raise Skip(f"{PROVENANCE} has no checksums of files")
    if not subject.values:
        raise Skip("values were not to be read")
    for name in sorted({*told, *subject.shards.names}):
        if not (subject.path / name).is_file() or Path(name).name != name:
            continue  # rules about files say so
        if name not in told:
            problem = f"{PROVENANCE} does not know this file"
        elif sha256_file(subject.path / name) != told[name]:
            problem = "it was changed since it was written: its SHA-256 is another"
        else:
            continue
        remedy = (
            f"copy it again, or {_AGAIN}; if it was meant, remove {CHECKSUMS!r} from {PROVENANCE}"
        )
        yield Finding("checksums", ERROR, name, None, problem, remedy)


def counts(subject: Subject) -> Found:
    """The plan's counts against the experts that are stored."""
    if not (subject.path / PLAN_COPY).is_file():
        raise Skip(f"there is no {PLAN_COPY}")
    try:
        edits = read_edits(subject.path / PLAN_COPY)
    except PlanError as error:
        yield Finding("plan-counts", ERROR, PLAN_COPY, None, error.problem, _AGAIN)
        return
    subject.require_all()
    most = max((len(edit.keep) for edit in edits.values()), default=0)
    for layer, edit in sorted(edits.items()):
        stored = _stored(subject, layer)
        padded = stored == most and len(subject.pads(layer)) == most - len(edit.keep)
        if stored is not None and stored != len(edit.keep) and not padded:
            problem = (
                f"layer {layer} keeps {len(edit.keep)} experts by the plan, {stored} are stored"
            )
            yield Finding("plan-counts", ERROR, PLAN_COPY, None, problem, _AGAIN)
    yield from _novices(subject, edits)
    yield from _answers(subject, edits)


def _novices(subject: Subject, edits: Mapping[int, Edit]) -> Found:
    planned = {str(layer): list(edit.replaced) for layer, edit in edits.items() if edit.replaced}
    if planned != subject.novices:
        wrong = sorted(
            layer
            for layer in {*planned, *subject.novices}
            if planned.get(layer) != subject.novices.get(layer)
        )
        problem = f"layer {wrong[0]}: approximate_experts and the plan name different experts"
        yield Finding("plan-counts", ERROR, PLAN_COPY, None, problem, _AGAIN)


def _answers(subject: Subject, edits: Mapping[int, Edit]) -> Found:
    """Who answers for whom, and the width of experts, by the plan and by what is stored."""
    planned = {str(layer): list(edit.served_by) for layer, edit in edits.items() if edit.served_by}
    if planned != subject.served:
        problem = "experts_served_by and the plan name different experts"
        yield Finding("plan-counts", ERROR, PLAN_COPY, None, problem, _AGAIN)
    widths = {edit.width for edit in edits.values() if edit.width is not None}
    try:
        stored = {site.shape.intermediate for site in subject.model.sites.values()}
    except Skip:
        return
    if widths and widths != stored:
        problem = f"experts have {min(widths)} neurons by the plan, {min(stored)} by config.json"
        yield Finding("plan-counts", ERROR, PLAN_COPY, None, problem, _AGAIN)


def _stored(subject: Subject, layer: int) -> int | None:
    """Experts with weights in a layer; None where their number cannot be seen."""
    for group in subject.decoder_groups:
        if group.layer == layer:
            return len(group.matrices)
    try:
        model = subject.model
    except Skip:
        return None
    rows = [
        info.shape[0]
        for key, info in subject.tensors.items()
        if subject.is_fused(key) and model.group(str(subject.target(key))) == layer
    ]
    return min(rows, default=None)


RULES = (
    Rule("provenance", "moeprune.json names the plan and the sizes that are there", record),
    Rule(
        "checksums", "weights are, to the bit, as moeprune.json says they were written", checksums
    ),
    Rule("plan-counts", "the plan keeps as many experts as are stored", counts),
)
