"""Rules about the original: what was copied is equal, what was cut was cut as the plan says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from moeprune.core.ops.masks import prune_count
from moeprune.core.ops.tables import redirect_table
from moeprune.errors import MoepruneError, PlanError
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.counts import PAD_BIAS, Slots
from moeprune.models.depth import SeveralStates
from moeprune.models.scan import FLOAT_DTYPES, digest
from moeprune.models.surgery import PROVENANCE
from moeprune.models.writer import computed, copied, given, sliced, zeros
from moeprune.verification.edits import Edit, Mask
from moeprune.verification.finding import ERROR, Finding, Found, Rule, Skip
from moeprune.verification.logits import compare_logits
from moeprune.verification.rebuilt import planned_layers
from moeprune.verification.reference import Reference, Source
from moeprune.verification.shards import AsFound, read_json
from moeprune.verification.subject import ADDED, CONFIG, Subject

_AGAIN = "apply the plan to the original again"


def _reference(subject: Subject) -> tuple[Reference, dict[int, Edit]]:
    if subject.reference is None:
        raise Skip("no original was given (--against)")
    _ = subject.config
    subject.require_all()
    record = read_json(subject.path / PROVENANCE)
    if isinstance(record, dict) and _trained_last(record):
        raise Skip("its weights were trained after the plan was applied (moeprune recover)")
    try:
        return subject.reference, subject.reference.edits
    except MoepruneError as error:
        raise Skip(error.problem) from error


def _trained_last(record: Mapping[str, Any]) -> bool:
    """Whether a recovery came after the last plan; those before it made the plan's original."""
    steps, told = record.get("steps"), record.get("recovered")
    number = len(steps) if isinstance(steps, list) else 1
    if not isinstance(told, list):
        return bool(told)
    last = [one.get("after_steps") if isinstance(one, dict) else None for one in told]
    return any(not isinstance(after, int) or after >= number for after in last)


def plan(subject: Subject) -> Found:
    """The plan is one, and for this original."""
    reference = subject.reference
    if reference is None:
        raise Skip("no original was given (--against)")
    if reference.plan_file is None:
        raise Skip("there is no plan")
    name = reference.plan_file.name
    if reference.planned_for != reference.checkpoint.fingerprint:
        problem = f"the plan was made for another model than {reference.checkpoint.path.name}"
        remedy = "give --against the model that the plan names"
        yield Finding("against-plan", ERROR, name, None, problem, remedy)
    try:
        _ = reference.edits
    except PlanError as error:
        remedy = error.hint or "give the plan of this checkpoint: --plan plan.json"
        yield Finding("against-plan", ERROR, name, None, error.problem, remedy)


def tensors(subject: Subject) -> Found:
    """Byte for byte, but for what was masked."""
    reference, _ = _reference(subject)
    expected = dict(reference.sources())
    total = sum(subject.tensors[key].nbytes for key in expected if key in subject.tensors)
    done = compared = 0
    for key, source in expected.items():
        stored = subject.tensors.get(key)
        if stored is None:
            problem = f"{source.key} of the original should be here"
            yield subject.at("against-tensors", ERROR, key, problem, _AGAIN)
            continue
        if source.masked is None and not source.rebuilt:
            why = _difference(subject, reference, key, source)
            if why:
                yield subject.at("against-tensors", ERROR, key, why, _AGAIN)
            compared += 1
        done += stored.nbytes
        subject.progress("comparing tensors", done, total)
    for key in subject.tensors:
        if key not in expected and not key.endswith(ADDED):
            problem = "the original and the plan make no tensor of this name"
            yield subject.at("against-tensors", ERROR, key, problem, _AGAIN)
    subject.comparison["tensors_compared"] = compared


def _difference(subject: Subject, reference: Reference, key: str, source: Source) -> str:
    """In which way a tensor is not what it was, or empty."""
    stored, original = subject.tensors[key], reference.checkpoint.tensors[source.key]
    piece = copied(key, original)
    origin = f"{source.key} of the original"
    if source.zero:
        piece, origin = zeros(piece), "padding"
    elif source.table is not None:
        table_VK = reference.checkpoint.read(source.key)
        edit = source.table
        piece = computed(piece, lambda: redirect_table(table_VK, edit.keep, edit.experts))
        origin = f"{origin} with the experts' new numbers"
    elif source.dim is not None and source.disk is not None:
        fill = PAD_BIAS if original.shape[source.dim] == original.numel else 0.0
        piece = sliced(key, original, source.dim, source.ids, source.disk.rows, fill)
        if piece.shape != original.shape:
            origin = f"entries {_listed(source.ids)} of {origin}"
    if (stored.dtype, stored.shape) != (piece.dtype, piece.shape):
        return (
            f"{stored.dtype} {list(stored.shape)} is stored, "
            f"{origin} is {piece.dtype} {list(piece.shape)}"
        )
    if digest(copied(key, stored)) == digest(piece):
        return ""
    return f"its bytes are not those of {origin}"


def _listed(ids: Slots) -> str:
    shown = ", ".join("padding" if e is None else str(e) for e in ids[:6])
    return f"{shown}, ..." if len(ids) > 6 else shown


def constants(subject: Subject) -> Found:
    """Novices' vectors against those of the plan that was given."""
    reference, edits = _reference(subject)
    if not any(edit.replaced for edit in edits.values()):
        raise Skip("no expert is replaced by a constant")
    if reference.full_plan is None:
        raise Skip("no plan with vectors was given (--plan)")
    for index, layer in reference.full_plan.layers.items():
        if layer.novices_NH is None:
            continue
        stored = stored_constants(subject, index)
        for row, expert in enumerate(layer.replaced):
            if expert not in stored:
                continue  # the rule 'novices' tells
            key, value_H = stored[expert]
            planned_H = layer.novices_NH[row].to(value_H.dtype)
            if digest(given(key, planned_H.clone())) != digest(given(key, value_H)):
                problem = f"expert {expert}: this is not the vector of the plan"
                yield subject.at("against-constants", ERROR, key, problem, _AGAIN)


def stored_constants(subject: Subject, layer: int) -> dict[int, tuple[str, Tensor]]:
    """By expert, the name and the vector of the constant that replaces it."""
    checkpoint = AsFound(subject.path)
    for group in subject.decoder_groups:
        if group.layer == layer and group.novices:
            return {e: (key, checkpoint.read(key)) for e, key in group.novices.items()}
    ids = sorted(subject.novices_of(layer))
    for key in subject.tensors:
        if key.endswith(".novice_value") and f".{layer}." in key:
            return {e: (key, checkpoint.read_row(key, row)) for row, e in enumerate(ids)}
    return {}


def masks(subject: Subject) -> Found:
    """Weights that are not zero are the original's, and as many are zero as the plan says."""
    reference, _ = _reference(subject)
    masked = {key: source for key, source in reference.sources() if source.masked is not None}
    if not masked:
        raise Skip("no weights are masked")
    stored = AsFound(subject.path)
    for key, source in masked.items():
        info = subject.tensors.get(key)
        if info is None or info.dtype not in FLOAT_DTYPES:
            continue  # its absence is told by against-tensors
        assert source.masked is not None and source.masked.mask is not None
        for problem in _masked_rows(stored, reference.checkpoint, key, source, source.masked.mask):
            yield subject.at("against-masks", ERROR, key, problem, _AGAIN)
            break
    subject.comparison["masked_tensors_compared"] = len(masked)


def _masked_rows(
    stored: Checkpoint, original: Checkpoint, key: str, source: Source, mask: Mask
) -> Iterator[str]:
    disk = source.disk
    assert disk is not None
    for row, expert in enumerate(source.ids if source.dim is not None else (None,)):
        if source.dim is None:
            now, before = stored.read(key), original.read(source.key)
        elif expert is None:
            continue  # padding
        elif disk.rows > 1:
            now = stored.read_rows(key, row * disk.rows, disk.rows)
            before = original.read_rows(source.key, expert * disk.rows, disk.rows)
        else:
            now, before = stored.read_row(key, row), original.read_row(source.key, expert)
        if now.shape != before.shape:
            yield f"{list(now.shape)} is stored, the original has {list(before.shape)}"
            return
        if disk.input_dim == -2:
            now, before = now.T, before.T
        pairs = zip(
            _single_matrices(now, disk.role, disk.interleaved),
            _single_matrices(before, disk.role, disk.interleaved),
            strict=True,
        )
        why = next(filter(None, (_mask_problem(*pair, mask) for pair in pairs)), "")
        if why:
            yield why if expert is None else f"expert {expert}: {why}"


def _mask_problem(now_OI: Tensor, before_OI: Tensor, mask: Mask) -> str:
    zero_OI = now_OI == 0
    changed = ~zero_OI & (now_OI != before_OI)
    if bool(changed.any()):
        return f"{int(changed.sum())} weights are neither zero nor the original's"
    if mask.pattern is not None:
        expected, size = mask.pattern
        zero_OI = zero_OI.reshape(-1, size)
    elif mask.ratio is not None:
        if mask.group == "matrix":
            zero_OI = zero_OI.reshape(1, -1)
        size = zero_OI.shape[1]
        expected = prune_count(size, mask.ratio)
    else:
        return ""
    cut_OI = zero_OI & (before_OI != 0).reshape(zero_OI.shape)
    few, many = int(zero_OI.sum(1).min()), int(cut_OI.sum(1).max())
    if few < expected or many > expected:
        wrong = few if few < expected else many
        return f"{wrong} of {size} weights are zero where the plan says {expected}"
    return ""


def logits(subject: Subject) -> Found:
    """Both models on the same text."""
    reference, edits = _reference(subject)
    planned = planned_layers(subject, reference, edits)
    restrictions = {}
    for layer, edit in edits.items() if planned is None else ():
        found = {e: value for e, (_, value) in stored_constants(subject, layer).items()}
        lost = sorted(set(edit.replaced) - set(found))
        if lost:
            raise Skip(f"the constant of expert {lost[0]} in layer {layer} is not stored")
        restrictions[layer] = reference.restriction(layer, found)
    try:
        result = compare_logits(
            AsFound(subject.path),
            reference.checkpoint,
            restrictions,
            reference.dtype,
            reference.device,
            lambda done, total: subject.progress("comparing logits", done, total),
            () if reference.shallower is None else reference.shallower.dropped,
            planned,
            reference.limits,
        )
    except SeveralStates as error:
        raise Skip(
            f"dropped layers of the original cannot be passed by: {error.problem}"
        ) from error
    except (MoepruneError, RuntimeError, ValueError, IndexError) as error:
        problem = f"it cannot be run: {str(error).splitlines()[0][:160]}"
        yield Finding("against-logits", ERROR, CONFIG, None, problem, "mend the other findings")
        return
    subject.comparison["logits"] = result
    if not result["passed"]:
        problem = (
            f"logits differ from the restricted original's by up to {result['difference']:.3g} "
            f"(tolerance {result['tolerance']:.3g})"
        )
        remedy = "compare config.json with the original's: routing, scaling factors, activation"
        yield Finding("against-logits", ERROR, CONFIG, None, problem, remedy)


RULES = (
    Rule("against-plan", "with --against: the plan is for that original", plan),
    Rule("against-tensors", "with --against: what was kept is equal byte for byte", tensors),
    Rule("against-constants", "with --against --plan: constants are the plan's", constants),
    Rule("against-masks", "with --against: masked weights are zero or the original's", masks),
    Rule("against-logits", "with --against: logits are those of the restricted original", logits),
)


def _single_matrices(weight_OI: Tensor, role: str, interleaved: bool) -> tuple[Tensor, ...]:
    """Views of the gate and the up matrix in a ``gate_up``; any other matrix as it is."""
    if role != "gate_up":
        return (weight_OI,)
    if interleaved:
        return weight_OI[0::2], weight_OI[1::2]
    gate_OI, up_OI = weight_OI.chunk(2)
    return gate_OI, up_OI
