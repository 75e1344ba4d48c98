"""Rules about experts by name: none missing, twice or half there; constants where listed."""

from __future__ import annotations

from collections.abc import Iterator

from moeprune.verification.finding import ERROR, WARNING, Finding, Found, Rule, Skip
from moeprune.verification.subject import COMPANIONS, CONFIG, Group, Subject

_AGAIN = "write the checkpoint again from the original"


def _named(subject: Subject) -> list[Group]:
    subject.require_all()
    found = list(subject.decoder_groups)
    if not found:
        raise Skip("no experts are stored one by one")
    return found


def _missing(subject: Subject, group: Group) -> list[int]:
    """Ids below the highest that no tensor has and no list of constants names."""
    there = {*group.matrices, *group.novices, *subject.absent_of(group.layer)}
    return [e for e in range(max(there, default=-1) + 1) if e not in there]


def _incomplete(group: Group) -> Iterator[tuple[int, str]]:
    """(id, what follows the id in the name) of tensors that other experts of the block have."""
    tails = {tail for matrices in group.matrices.values() for tail in matrices}
    for tail in sorted(tail for tail in tails if not tail.endswith(COMPANIONS)):
        for expert, matrices in sorted(group.matrices.items()):
            # a quantised matrix goes by another name: that is for expert-dtype to tell
            if not any(t == tail or t.startswith(f"{tail}_") for t in matrices):
                yield expert, tail


def troubled(subject: Subject) -> set[int | None]:
    """Layers whose experts have wrong names or counts: their shapes say nothing more."""
    found: set[int | None] = {
        int(layer)
        for layer in subject.novices
        if layer.isdecimal() and any(True for _ in _novice_findings(subject, int(layer)))
    }
    for group in subject.decoder_groups:
        count = len({*group.matrices, *group.novices, *subject.absent_of(group.layer)})
        wrong = count != subject.experts(group.layer) or group.twice or _missing(subject, group)
        if wrong or any(True for _ in _incomplete(group)):
            found.add(group.layer)
    return found


def ids(subject: Subject) -> Found:
    """0..E-1, each once."""
    for group in _named(subject):
        tail = min((t for m in group.matrices.values() for t in m), default="weight")
        for expert in _missing(subject, group):
            problem = f"expert {expert} of layer {group.layer} is missing, and later ones are there"
            remedy = f"number the experts of a layer without a gap, or {_AGAIN}"
            yield subject.at("expert-ids", ERROR, f"{group.prefix}{expert}.{tail}", problem, remedy)
        for key in group.twice:
            problem = "another name stands for the same expert"
            yield subject.at("expert-ids", ERROR, key, problem, "delete one of the two")


def matrices(subject: Subject) -> Found:
    """Every expert has what the others of its block have."""
    for group in _named(subject):
        for expert, tail in _incomplete(group):
            problem = f"expert {expert} of layer {group.layer} has no {tail}, and others have one"
            key = f"{group.prefix}{expert}.{tail}"
            yield subject.at("expert-matrices", ERROR, key, problem, _AGAIN)


def dtypes(subject: Subject) -> Found:
    """One dtype per kind of matrix and block."""
    for group in _named(subject):
        kinds: dict[str, dict[str, str]] = {}
        for expert in sorted(group.matrices):
            for tail, key in group.matrices[expert].items():
                if not tail.endswith(COMPANIONS):
                    kinds.setdefault(tail, {}).setdefault(subject.tensors[key].dtype, key)
        for tail, by_dtype in kinds.items():
            if len(by_dtype) > 1:
                first, second = list(by_dtype)[:2]
                problem = f"{tail} is {second} here and {first} in other experts of the layer"
                remedy = "store all experts of a layer in one dtype"
                yield subject.at("expert-dtype", ERROR, by_dtype[second], problem, remedy)


def novices(subject: Subject) -> Found:
    """The list of constants against the constants."""
    subject.require_all()
    listed = set(subject.novices)
    stored = {str(group.layer) for group in subject.decoder_groups if group.novices}
    if not listed and not stored:
        raise Skip("no expert is a constant")
    for name in sorted(listed - {n for n in listed if n.isdecimal()}):
        yield _list_error(f"approximate_experts names {name!r}, which is no layer")
    for layer in sorted({int(name) for name in listed | stored if name.isdecimal()}):
        yield from _novice_findings(subject, layer)


def _list_error(problem: str) -> Finding:
    return Finding("novices", ERROR, CONFIG, None, problem, f"correct the list, or {_AGAIN}")


def _novice_findings(subject: Subject, layer: int) -> Iterator[Finding]:
    entry = subject.novices.get(str(layer), [])
    total = subject.experts(layer)
    if not isinstance(entry, list) or not all(isinstance(e, int) and 0 <= e < total for e in entry):
        yield _list_error(f"approximate_experts.{layer} is not a list of ids below {total}")
        return
    if len(set(entry)) != len(entry):
        yield _list_error(f"approximate_experts.{layer} names an expert twice")
    group = next((g for g in subject.decoder_groups if g.layer == layer), None)
    if group is None:
        yield from _fused_novices(subject, layer, len(entry))
        return
    for expert in sorted(set(entry) - set(group.novices)):
        key = f"{group.prefix}{expert}.approx_value"
        problem = f"expert {expert} of layer {layer} is listed as a constant, but it is not there"
        yield subject.at("novices", ERROR, key, problem, _AGAIN)
    for expert in sorted(set(group.novices) - set(entry)):
        problem = "it is a constant that approximate_experts does not list"
        remedy = f"add {expert} to approximate_experts.{layer} in config.json"
        yield subject.at("novices", ERROR, group.novices[expert], problem, remedy)
    for expert in sorted(set(entry) & set(group.matrices)):
        key = min(group.matrices[expert].values())
        problem = "it is a matrix of an expert that is listed as a constant"
        yield subject.at("novices", ERROR, key, problem, f"delete one of the two, or {_AGAIN}")


def _fused_novices(subject: Subject, layer: int, listed: int) -> Iterator[Finding]:
    keys = [
        key
        for key in subject.tensors
        if key.endswith(".novice_value") and f".{layer}." in key and not subject.attached(key)
    ]
    if listed and not keys:
        yield _list_error(f"approximate_experts lists constants in layer {layer}, none are stored")
    for key in keys:
        rows = subject.tensors[key].shape[:1]
        if rows != (listed,):
            problem = f"{list(rows)} constants are stored, approximate_experts lists {listed}"
            yield subject.at("novices", ERROR, key, problem, _AGAIN)


def per_layer(subject: Subject) -> Found:
    """per_layer_config names layers, and no more experts than the model has."""
    if not subject.uneven:
        raise Skip("every layer has the same number of experts by config.json")
    most, count = subject.experts(), subject.layer_count
    for layer, experts in subject.uneven.items():
        problem = ""
        # one past the last is a prediction head
        if not layer.isdecimal() or (count is not None and int(layer) > count):
            problem = f"per_layer_config names {layer!r}, which is no layer"
        elif not 0 < experts <= most:
            problem = f"per_layer_config.{layer} has {experts} experts, the model {most}"
        if problem:
            remedy = f"{subject.experts_key} is the largest count of all layers; write both again"
            yield Finding("per-layer-config", ERROR, CONFIG, None, problem, remedy)


def zero_experts(subject: Subject) -> Found:
    """An expert with a matrix of zeros gives nothing; padding is meant to."""
    scans = subject.scans
    for group in subject.groups:
        zero = {
            expert: key
            for expert, by_tail in sorted(group.matrices.items())
            for key in sorted(by_tail.values())
            if len(subject.tensors[key].shape) == 2
            and not key.endswith(COMPANIONS)
            and key in scans
            and scans[key].zero_rows
        }
        pads = subject.pads(group.layer) if zero else set()
        for expert in sorted(set(zero) - pads):
            yield _zero(subject, zero[expert], expert)
    for key, scan in scans.items():
        if scan.zero_rows and subject.is_fused(key):
            pads = subject.pads(subject.model.group(str(subject.target(key))))
            for expert in sorted(set(scan.zero_rows) - pads):
                yield _zero(subject, key, expert)


def _zero(subject: Subject, key: str, expert: int) -> Finding:
    problem = f"all weights of this matrix of expert {expert} are zero"
    remedy = "prune the expert, or write it again; padding needs a router that never selects it"
    return subject.at("zero-experts", WARNING, key, problem, remedy)


RULES = (
    Rule("expert-ids", "experts are numbered from 0 without gap or repetition", ids),
    Rule("expert-matrices", "every expert has all the matrices of its neighbours", matrices),
    Rule("expert-dtype", "the experts of a layer have one dtype", dtypes),
    Rule("novices", "constants are stored where approximate_experts lists them", novices),
    Rule("per-layer-config", "entries for single layers are layers and counts", per_layer),
    Rule("zero-experts", "no expert has a matrix of nothing but zeros", zero_experts),
)
