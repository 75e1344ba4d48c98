"""Rules about experts that were rebuilt, that answer for others, or have constants in outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from moeprune.core.plan import LayerPlan
from moeprune.errors import MoepruneError
from moeprune.models.editing import Writing
from moeprune.models.scan import FLOAT_DTYPES
from moeprune.models.surgery import pieces_of
from moeprune.models.writer import TORCH_DTYPES, Piece
from moeprune.verification.edits import Edit
from moeprune.verification.finding import ERROR, Finding, Found, Rule, Skip
from moeprune.verification.reference import Reference
from moeprune.verification.shards import AsFound
from moeprune.verification.subject import CONFIG, Subject

_AGAIN = "apply the plan to the original again"
_CLOSE = 1e-2
"""Largest difference of a rebuilt weight, as a fraction of the largest in its tensor: the last bits
of half precision, and of a decomposition on another machine."""


def answers(subject: Subject) -> Found:
    """The table of who answers for whom, against who is stored."""
    subject.require_all()
    if not subject.served and subject.entry("experts_served_by") is None:
        raise Skip("no expert answers for another")
    for name, table in subject.served.items():
        yield from _table_findings(subject, name, table)


def _wrong(rule: str, problem: str) -> Finding:
    return Finding(rule, ERROR, CONFIG, None, problem, "write the checkpoint again")


def _table_findings(subject: Subject, name: str, table: object) -> Iterator[Finding]:
    where, count = f"experts_served_by.{name}", subject.layer_count
    if not name.isdecimal() or (count is not None and int(name) >= count):
        yield _wrong("answers", f"experts_served_by names {name!r}, which is no layer")
        return
    total = subject.experts(int(name))
    known = isinstance(table, list) and all(type(e) is int and 0 <= e < total for e in table)
    if not isinstance(table, list) or not known or len(table) != total:
        yield _wrong("answers", f"{where} is not a list of {total} ids below {total}")
        return
    astray = [e for e in sorted(set(table)) if table[e] != e]
    if astray:
        yield _wrong("answers", f"{where}: expert {astray[0]} answers for others, not for itself")
    group = next((g for g in subject.decoder_groups if g.layer == int(name)), None)
    if group is not None and set(group.matrices) != set(table):
        odd = min(set(group.matrices) ^ set(table))
        what = "is stored, and answers for nobody" if odd in group.matrices else "is not stored"
        yield _wrong("answers", f"{where}: expert {odd} {what}")


def offsets(subject: Subject) -> Found:
    """The list of layers with constants, against the constants; values are finite elsewhere."""
    subject.require_all()
    listed = subject.entry("expert_offsets")
    keys = {key for key in subject.tensors if key.endswith(".output_offset")}
    if not listed and not keys:
        raise Skip("no expert has a constant in its output")
    if not isinstance(listed, list) or not all(type(i) is int for i in listed):
        yield _wrong("offsets", "expert_offsets is not a list of layers")
        return
    sites = subject.model.sites
    for index in sorted(set(listed) - set(sites)):
        yield _wrong("offsets", f"expert_offsets names {index}, which is no MoE layer")
    for key in sorted(keys):
        site = sites.get(subject.layer_of(key))
        if site is None or site.layer not in listed:
            problem = "it is a constant of a layer that expert_offsets does not list"
            yield subject.at("offsets", ERROR, key, problem, _AGAIN)
            continue
        shape = subject.tensors[key].shape
        if shape[-1:] != (site.shape.hidden,) or len(shape) > 2:
            problem = f"{list(shape)} is stored, outputs have {site.shape.hidden} values"
            yield subject.at("offsets", ERROR, key, problem, _AGAIN)
    for group in subject.decoder_groups:
        lost = sorted(set(group.matrices) - set(group.offsets))
        if group.layer in listed and lost:
            key = f"{group.prefix}{lost[0]}.output_offset"
            problem = f"expert {lost[0]} of layer {group.layer} has no constant, and others have"
            yield subject.at("offsets", ERROR, key, problem, _AGAIN)


def rebuilt(subject: Subject) -> Found:
    """Rebuilt tensors against what the plan that was given makes of the original."""
    reference = subject.reference
    if reference is None:
        raise Skip("no original was given (--against)")
    try:
        edits = reference.edits
    except MoepruneError as error:
        raise Skip(error.problem) from error
    if not any(edit.rebuilds or edit.offsets for edit in edits.values()):
        raise Skip("no expert is rebuilt")
    if reference.full_plan is None:
        raise Skip("no plan with vectors was given (--plan)")
    pieces = {piece.name: piece for piece in _pieces(subject, reference)}
    wanted = [key for key, source in reference.sources() if source.rebuilt]
    wanted += [key for key in pieces if key.endswith(".output_offset")]
    for done, key in enumerate(wanted):
        info = subject.tensors.get(key)
        if info is not None and key in pieces and info.dtype in FLOAT_DTYPES:
            problem = _difference(AsFound(subject.path).read(key), pieces[key])
            if problem:
                yield subject.at("against-rebuilt", ERROR, key, problem, _AGAIN)
        subject.progress("rebuilding", done + 1, len(wanted))
    subject.comparison["rebuilt_tensors_compared"] = len(wanted)


def _pieces(subject: Subject, reference: Reference) -> list[Piece]:
    assert reference.full_plan is not None
    heads = any(subject.attached(key) for key in subject.tensors)
    quantised = reference.model.quantisation.method is not None and subject.quantised is None
    writing = Writing(
        pad=any(subject.pads(index) for index in reference.model.sites),
        mtp="keep-pruned" if heads else "drop",
        dequantize=quantised,
    )
    try:
        return pieces_of(reference.model, reference.full_plan, writing)
    except MoepruneError as error:
        raise Skip(f"the plan cannot be applied: {error.problem}") from error


def _difference(stored: Tensor, piece: Piece) -> str:
    if tuple(stored.shape) != piece.shape:
        return f"{list(stored.shape)} is stored, the plan makes {list(piece.shape)}"
    data = bytearray(b"".join(bytes(block) for block in piece.blocks()))
    made = torch.frombuffer(data, dtype=TORCH_DTYPES[piece.dtype]).view(piece.shape).float()
    largest = float(made.abs().max())
    apart = float((stored.float() - made).abs().max())
    if apart <= _CLOSE * largest:
        return ""
    return f"its values differ by up to {apart:.3g} from what the plan makes of the original"


def planned_layers(
    subject: Subject, reference: Reference, edits: Mapping[int, Edit]
) -> dict[int, LayerPlan] | None:
    """Plans by which the original computes what the result should; None where slicing is enough.

    Raises:
        Skip: matrices were rebuilt, and there is no plan that says from what.
    """
    if not any(edit.rebuilds or edit.served_by or edit.offsets for edit in edits.values()):
        return None
    if reference.full_plan is not None:
        return dict(reference.full_plan.layers)
    if any(edit.rebuilds for edit in edits.values()):
        raise Skip("experts are rebuilt, and no plan with vectors was given (--plan)")
    found = {}
    for index, edit in edits.items():
        if edit.mask is not None:
            raise Skip("weights are masked as well, and no plan with vectors was given (--plan)")
        constants = _stored_offsets(subject, index, edit) if edit.offsets else None
        served = edit.served_by or None
        found[index] = LayerPlan(
            index, edit.experts, edit.keep, served_by=served, offsets_CH=constants
        )
    return found


def _stored_offsets(subject: Subject, layer: int, edit: Edit) -> Tensor:
    stored = AsFound(subject.path)
    for group in subject.decoder_groups:
        if group.layer == layer and group.offsets:
            rows = [stored.read(group.offsets[e]).float() for e in sorted(group.offsets)]
            return torch.stack(rows)
    for key in subject.tensors:
        if key.endswith(".output_offset") and subject.layer_of(key) == layer:
            table: Tensor = stored.read(key).float()
            return table
    raise Skip(f"the constants of layer {layer} are not stored")


RULES = (
    Rule("answers", "who answers for other experts is stored and named right", answers),
    Rule("offsets", "constants of outputs are stored where expert_offsets lists them", offsets),
    Rule("against-rebuilt", "with --against --plan: rebuilt experts are the plan's", rebuilt),
)
