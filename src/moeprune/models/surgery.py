"""A plan becomes a checkpoint: tensors are sliced, renumbered or masked on disk, never in a model.

Everything is validated before the first byte is written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeprune.core.plan import Plan
from moeprune.errors import UnsupportedModelError
from moeprune.files import json_bytes, load_json, new_directory, refuse_existing, sha256_bytes
from moeprune.models.attached import (
    check_equal_counts,
    find_attached,
    refuse_narrow,
)
from moeprune.models.byte_exact import (
    refuse_changes,
    refuse_dequantize,
)
from moeprune.models.card import write_card
from moeprune.models.card_metadata import CARD, license_of
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.checks import check_plan
from moeprune.models.depth import Shallower
from moeprune.models.editing import Editor, Sizes, Writing
from moeprune.models.generated import (
    CODE_FILES,
)
from moeprune.models.layout import expert_layout
from moeprune.models.loading import LayeredModel
from moeprune.models.repeat import repeat_command
from moeprune.models.store import versions
from moeprune.models.width import new_width
from moeprune.models.writer import KeptShards, Piece, Shards, raw, write_shards
from moeprune.work import work_folder

PROVENANCE = "moeprune.json"
PLAN_COPY = "moeprune_plan.json"
PROVENANCE_FORMAT = "moeprune.checkpoint/1"
CHECKSUMS = "sha256"
"""Where moeprune.json names the SHA-256 of every file of weights."""
WRITING = "writing"
"""The stage whose work folder keeps shards (see ``moeprune.work``)."""
_MAX_PROVENANCE = 1 << 24


def apply_plan(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    writing: Writing = Writing(),
    resumable: bool = False,
) -> Sizes:
    """Write the checkpoint that ``plan`` describes to ``out``.

    Args:
        checkpoint: the model that the plan was made for.
        plan: what to do.
        out: the new directory.
        force: whether an existing output may be replaced.
        progress: told bytes written and in all.
        writing: choices that no method makes.
        resumable: whether shards that are whole stay in ``<out>.writing`` if the writing is cut,
            from which the same call goes on, to the same bytes.

    Raises:
        PlanError: the plan is not for this model, or asks for what its router cannot do.
        UnsupportedModelError: experts of this family cannot be edited, or only with ``dequantize``.
        OutputError: ``out`` exists, or could not be written, or another process writes it.
    """
    editor = _editor(LayeredModel(checkpoint), plan, writing)
    if not resumable:
        with new_directory(out, force) as work:
            return _write(editor, Shards(work), plan, writing, progress)
    identity = _identity(checkpoint, plan, writing)
    with work_folder(out, WRITING, identity, force) as folder:
        if folder.published:
            return editor.sizes(_written(editor)[0])
        refuse_existing(out, force)
        folder.clean_output()
        sizes = _write(editor, KeptShards(folder), plan, writing, progress)
        folder.publish(force)
    return sizes


def _identity(checkpoint: Checkpoint, plan: Plan, writing: Writing) -> dict[str, Any]:
    """All that decides a byte of the weights."""
    vectors = hashlib.sha256()
    for name, tensor in sorted(plan.vectors().items()):
        vectors.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        vectors.update(raw(tensor))
    return {
        "model": checkpoint.fingerprint,
        "plan": sha256_bytes(json_bytes(plan.to_json(None))),
        "vectors": vectors.hexdigest(),
        "writing": asdict(writing),
        "versions": versions(),
    }


def _write(
    editor: Editor,
    place: Shards,
    plan: Plan,
    writing: Writing,
    progress: Callable[[int, int], None],
) -> Sizes:
    """Write all files of the new checkpoint."""
    checkpoint, work = editor.checkpoint, place.directory
    pieces, config = _written(editor)
    others = checkpoint.other_files()
    checksums = write_shards(place, pieces, progress=progress)
    # raw JSON, edited: vendors' own key names stay
    (work / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for file in others:
        if file.name not in (PROVENANCE, PLAN_COPY, CARD, *CODE_FILES):
            shutil.copyfile(file, work / file.name)
    if editor.code is not None:
        for name, text in editor.code.files.items():
            (work / name).write_text(text, encoding="utf-8")
    sizes = editor.sizes(pieces)
    plan_json = plan.to_json(None)
    plan_bytes = json_bytes(plan_json)
    (work / PLAN_COPY).write_bytes(plan_bytes)
    record = _provenance(checkpoint, plan, plan_bytes, sizes, editor.dequantized)
    record |= {"command": repeat_command(plan, writing), CHECKSUMS: checksums}
    record = _with_steps(checkpoint, record)
    (work / PROVENANCE).write_bytes(json_bytes(record))
    write_card(work, checkpoint, record, plan_json)
    return sizes


def sizes_of(model: LayeredModel, plan: Plan, writing: Writing = Writing()) -> Sizes:
    """The sizes of the checkpoint that ``apply_plan`` would write, without writing it.

    Raises:
        MoepruneError: as ``apply_plan``, if it could not be written.
    """
    editor = _editor(model, plan, writing)
    return editor.sizes(_written(editor)[0])


def pieces_of(model: LayeredModel, plan: Plan, writing: Writing = Writing()) -> list[Piece]:
    """The tensors that ``apply_plan`` would write; each is made when it is read.

    Raises:
        MoepruneError: as ``apply_plan``, if they could not be written.
    """
    return _written(_editor(model, plan, writing))[0]


def _written(editor: Editor) -> tuple[list[Piece], dict[str, Any]]:
    """The tensors and the configuration of the new checkpoint."""
    pieces, config = editor.pieces(), editor.config()
    if editor.plan.drop_layers:
        shallower = Shallower(editor.model, editor.plan.drop_layers)
        config, pieces = shallower.config(config), shallower.pieces(pieces)
    return pieces, config


def _editor(model: LayeredModel, plan: Plan, writing: Writing) -> Editor:
    """The editor of a plan, after everything has been checked that can be."""
    checkpoint = model.checkpoint
    layout = expert_layout(model)
    check_plan(model, plan, writing.pad)
    if writing.pad and model.quantisation.method and not writing.dequantize:
        raise UnsupportedModelError(
            f"{checkpoint.path} is quantised, and pads have no quantised form",
            "leave out --pad, or add --dequantize",
        )
    if writing.dequantize:
        refuse_dequantize(checkpoint, model.quantisation)
    else:
        refuse_changes(plan, layout, model.quantisation)
    deletes = any(layer.unroutes for layer in plan.layers.values())
    attached = find_attached(model, layout, writing.mtp, deletes)
    refuse_narrow(attached, new_width(model, plan.layers))
    editor = Editor(model, plan, layout, attached, writing)
    check_equal_counts(editor.counts, attached)
    return editor


def _provenance(
    checkpoint: Checkpoint, plan: Plan, plan_bytes: bytes, sizes: Sizes, dequantized: str | None
) -> dict[str, Any]:
    return {
        "format": PROVENANCE_FORMAT,
        "base": dict(plan.model),
        "base_fingerprint": checkpoint.fingerprint,
        "method": plan.method,
        "options": dict(plan.options),
        "budget": dict(plan.budget),
        "seed": plan.seed,
        "plan_sha256": sha256_bytes(plan_bytes),
        "statistics": dict(plan.statistics),
        "versions": dict(plan.versions),
        "licence": license_of(checkpoint.path),
        "experts": list(sizes.experts),
        "parameters": list(sizes.parameters),
        "nonzero_parameters": list(sizes.nonzero),
        "tensor_bytes": list(sizes.bytes),
        "dequantized_from": dequantized,
        "attached": dict(sizes.attached),
        **({"dropped_layers": list(plan.drop_layers)} if plan.drop_layers else {}),
    }


def _with_steps(checkpoint: Checkpoint, made: dict[str, Any]) -> dict[str, Any]:
    before = steps_of(checkpoint.path)
    trained = [{"after_steps": len(before), **one} for one in recoveries_of(checkpoint.path)]
    told = {"recovered": trained} if trained else {}
    return made | ({"steps": [*before, step_of(made)]} if before else {}) | told


def recoveries_of(directory: Path) -> list[dict[str, Any]]:
    """How a checkpoint was trained before, as it says itself; as careful as ``steps_of``."""
    found = _record_of(directory).get("recovered")
    told = found if isinstance(found, list) else []
    return [one for one in told if isinstance(one, dict)]


def step_of(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a later step repeats of an earlier one, in a list from the original on."""
    keys = (
        "base_fingerprint", "method", "options", "budget", "seed", "plan_sha256", "statistics",
        "versions", "experts", "parameters", "nonzero_parameters", "tensor_bytes", "command",
    )  # fmt: skip
    base = made.get("base")
    name = base.get("name") if isinstance(base, Mapping) else None
    return {"base_name": name, **{key: made.get(key) for key in keys}}


def steps_of(directory: Path) -> list[dict[str, Any]]:
    """What was done to a checkpoint before, as it says itself; nothing if it does not say.

    It is somebody's file: what is not of our form is left out, and never a reason to fail.
    """
    found = _record_of(directory)
    if not found:
        return []
    steps = found.get("steps")
    if isinstance(steps, list) and steps and all(isinstance(step, dict) for step in steps):
        return steps
    return [step_of(found)]


def checksums_of(directory: Path) -> dict[str, str]:
    """The SHA-256 of a checkpoint's files of weights, as it says itself."""
    told = _record_of(directory).get(CHECKSUMS)
    return told if isinstance(told, dict) else {}


def _record_of(directory: Path) -> dict[str, Any]:
    try:
        found = load_json(directory / PROVENANCE, _MAX_PROVENANCE)
    except (OSError, ValueError):
        return {}
    ours = isinstance(found, dict) and found.get("format") == PROVENANCE_FORMAT
    return found if ours else {}
