"""Rules about shapes: the model that config.json describes against the tensors that are stored.

The tensors' shapes go through transformers' own conversion on the meta device, so a fused, renamed
or transposed layout is judged like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from moeprune.models.loading import LayeredModel
from moeprune.models.scan import digest
from moeprune.models.special import flat_matrices
from moeprune.models.writer import copied
from moeprune.verification.experts import troubled
from moeprune.verification.finding import ERROR, WARNING, Finding, Found, Rule, Skip
from moeprune.verification.shards import AsFound
from moeprune.verification.subject import ADDED, COMPANIONS, CONFIG, Subject, layer_in_name

_TOGETHER = "config.json and the weights do not belong together: copy or write both again"


@dataclass(frozen=True)
class Misfit:
    """A parameter that what is stored does not make.

    Attributes:
        name: in the model.
        key: a tensor that it is made of, or the parameter's name where there is none.
        kind: ``rows``, ``vector`` (routers), ``count``, ``expert`` (experts) or ``other``.
        layer: the decoder layer.
        problem: the two shapes, or why the conversion failed.
        found, expected: the shapes; empty where the conversion failed.
    """

    name: str
    key: str
    kind: str
    layer: int
    problem: str
    found: tuple[int, ...] = ()
    expected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Fit:
    """What transformers would report about loading, without its exceptions.

    Attributes:
        misfits: parameters of another shape.
        missing: parameters of which nothing is stored.
    """

    misfits: tuple[Misfit, ...]
    missing: tuple[str, ...]


def fit(subject: Subject) -> Fit:
    """Convert all shapes.

    Raises:
        Skip: the model cannot be built, or its conversion needs values.
    """
    subject.require_all()
    if subject.fit is None:
        subject.fit = _fit(subject)
    if isinstance(subject.fit, Exception):
        raise Skip(f"shapes alone cannot be converted: {subject.fit}")
    assert isinstance(subject.fit, Fit)
    return subject.fit


def _fit(subject: Subject) -> Fit | Exception:
    model = subject.model
    try:
        report = LayeredModel(AsFound(subject.path)).load_shapes()
    except Exception as error:  # a conversion of transformers that looks at values
        return error
    sources: dict[str, str] = {}
    for key in subject.tensors:
        name = subject.target(key)
        if name is not None:
            sources.setdefault(name, key)
    misfits = []
    for name, found, expected in sorted(report.mismatched_keys):
        key, sizes = sources.get(name, name), (tuple(found), tuple(expected))
        kind = _kind(model, name, *sizes)
        problem = f"{list(found)} is stored, the model has {list(expected)}"
        layer = model.group(name)
        misfits.append(Misfit(name, key, kind, layer, problem, *sizes))
    for name, text in sorted(report.conversion_errors.items()):
        kind = "expert" if _kind(model, name, (), ()) in ("count", "expert") else "other"
        why = str(text).strip().splitlines()[-1][:160]
        problem = f"its parts do not fit together: {why}"
        misfits.append(Misfit(name, sources.get(name, name), kind, model.group(name), problem))
    known = {misfit.name for misfit in misfits}
    known |= set(model.model.all_tied_weights_keys)
    ignored = model.model._keys_to_ignore_on_load_missing or ()
    missing = [
        name
        for name in sorted(report.missing_keys)
        if name not in known and not any(re.search(pattern, name) for pattern in ignored)
    ]
    return Fit(tuple(misfits), tuple(missing))


def _kind(model: LayeredModel, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    site = model.sites.get(model.group(name))
    if site is None:
        return "other"
    for tensor in site.router_tensors:
        if tensor.name == name:
            return "rows" if len(expected) == 2 and tensor.dim == 0 else "vector"
    if name.startswith(f"{site.experts_name}."):
        return "count" if found[:1] != expected[:1] and found[1:] == expected[1:] else "expert"
    return "other"


def _report(subject: Subject, rule: str, kind: str, remedy: str) -> Iterator[Finding]:
    for misfit in fit(subject).misfits:
        if misfit.kind == kind:
            yield subject.at(rule, ERROR, misfit.key, misfit.problem, remedy)


def expert_count(subject: Subject) -> Found:
    """E of config.json, or of the layer's own entry, against what is stored."""
    subject.require_all()
    layers = set()
    for group in subject.decoder_groups:
        layers.add(group.layer)
        there = {*group.matrices, *group.novices, *subject.absent_of(group.layer)}
        expected = subject.experts(group.layer)
        if len(there) != expected and len(there) == max(there) + 1:
            key = min(group.matrices[max(group.matrices)].values()) if group.matrices else ""
            problem = f"layer {group.layer} has {len(there)} experts, config.json says {expected}"
            yield subject.at("expert-count", ERROR, key, problem, _count_remedy(subject))
    for key, info in subject.tensors.items():
        layer = layer_in_name(key)
        if key.endswith(("_blocks", "_scales")) and ".experts." in key and info.shape:
            expected = subject.experts(layer)
            if info.shape[0] != expected and layer not in layers and not subject.attached(key):
                layers.add(layer)
                problem = f"layer {layer} has {info.shape[0]} experts, config.json says {expected}"
                yield subject.at("expert-count", ERROR, key, problem, _count_remedy(subject))
    for misfit in fit(subject).misfits:
        if misfit.kind == "count" and misfit.layer not in layers:
            layers.add(misfit.layer)
            rows = _rows_per_expert(subject.model, misfit)
            problem = (
                f"layer {misfit.layer} has {misfit.found[0] // rows} experts, "
                f"config.json says {misfit.expected[0] // rows}"
            )
            remedy = _count_remedy(subject)
            yield subject.at("expert-count", ERROR, misfit.key, problem, remedy)


def _rows_per_expert(model: LayeredModel, misfit: Misfit) -> int:
    site = model.sites[misfit.layer]
    flat = misfit.name.removeprefix(f"{site.experts_name}.") in flat_matrices(site.experts)
    return site.shape.intermediate if flat else 1


def _count_remedy(subject: Subject) -> str:
    return (
        f"set {subject.experts_key} in config.json to the number that is stored, "
        "or write the missing experts"
    )


def router_rows(subject: Subject) -> Found:
    """The router's matrix."""
    remedy = "slice the router's rows like the experts: one row per expert, in the same order"
    return _report(subject, "router-rows", "rows", remedy)


def router_vectors(subject: Subject) -> Found:
    """Correction biases and the like."""
    remedy = "slice it like the experts: one entry per expert, in the same order"
    return _report(subject, "router-vectors", "vector", remedy)


def expert_shape(subject: Subject) -> Found:
    """Hidden and intermediate sizes of the experts."""
    subject.require_all()
    skip = troubled(subject)
    for misfit in fit(subject).misfits:
        if misfit.kind == "expert" and misfit.layer not in skip:
            yield subject.at("expert-shape", ERROR, misfit.key, misfit.problem, _TOGETHER)


def tensor_shape(subject: Subject) -> Found:
    """All other tensors."""
    return _report(subject, "tensor-shape", "other", _TOGETHER)


def missing(subject: Subject) -> Found:
    """Parameters of which nothing is stored."""
    subject.require_all()
    skip = troubled(subject)
    head = _head(subject.model)
    quantised = {subject.target(key) for key in subject.tensors if key.endswith(COMPANIONS)}
    for name in fit(subject).missing:
        in_experts = _kind(subject.model, name, (), ()) == "expert"
        if name == head or (in_experts and subject.model.group(name) in skip):
            continue
        if name in quantised:
            continue  # stored in quantised form
        problem = "the model needs it: transformers would fill it with random numbers"
        remedy = "copy it from the original"
        yield subject.at("missing-tensors", ERROR, name, problem, remedy)


def unused(subject: Subject) -> Found:
    """Tensors that transformers leaves aside."""
    model = subject.model
    ignored = [*(model.model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    for key in subject.tensors:
        if subject.target(key) is not None or subject.attached(key) or key.endswith(COMPANIONS):
            continue
        if key.endswith(ADDED):
            continue  # the rules 'novices' and 'offsets' know more
        if not any(re.search(pattern, key) for pattern in ignored):
            problem = "no parameter of the model has this name: transformers ignores it"
            remedy = "delete it, or correct its name"
            yield subject.at("unused-tensors", WARNING, key, problem, remedy)


def _head(model: LayeredModel) -> str | None:
    head = model.model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return next((n for n, p in model.model.named_parameters() if p is weight), None)


def tied(subject: Subject) -> Found:
    """Embeddings and head: one matrix or two."""
    subject.require_all()
    model = subject.model
    sources = {subject.target(key): key for key in subject.tensors}
    for target, source in sorted(model.model.all_tied_weights_keys.items()):
        keys = [sources[name] for name in (target, source) if name in sources]
        if not keys:
            problem = f"neither {target} nor {source}, with which it is tied, is stored"
            yield subject.at("tied-weights", ERROR, source, problem, "copy it from the original")
        elif len(keys) == 2 and not _same(subject, *keys):
            problem = f"config.json ties it to {keys[1]}, but their values differ"
            remedy = f"delete it, or set tie_word_embeddings to false in {CONFIG}"
            yield subject.at("tied-weights", WARNING, keys[0], problem, remedy)
    head = _head(model)
    if head is not None and head not in sources and head not in model.model.all_tied_weights_keys:
        if head not in fit(subject).missing:
            return
        problem = "config.json does not tie the head to the embeddings, but no head is stored"
        remedy = f"copy it from the original, or set tie_word_embeddings to true in {CONFIG}"
        yield subject.at("tied-weights", ERROR, head, problem, remedy)


def _same(subject: Subject, a: str, b: str) -> bool:
    one, two = (subject.tensors[key] for key in (a, b))
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return digest(copied(a, one)) == digest(copied(b, two))


RULES = (
    Rule("expert-count", "every layer stores as many experts as config.json says", expert_count),
    Rule("router-rows", "every router has one row per expert", router_rows),
    Rule(
        "router-vectors", "biases and scales of routers have one entry per expert", router_vectors
    ),
    Rule("expert-shape", "experts have the sizes that config.json says", expert_shape),
    Rule("tensor-shape", "all other tensors have the shapes of the model", tensor_shape),
    Rule("missing-tensors", "every parameter of the model is stored", missing),
    Rule("unused-tensors", "no tensor is stored that the model does not use", unused),
    Rule("tied-weights", "embeddings and head are tied as config.json says", tied),
)
