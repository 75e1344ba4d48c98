"""The stages, as functions: inspect, calibrate, plan, apply, prune, evaluate."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moeprune.core.accumulators import LIGHT
from moeprune.core.budget import Budget
from moeprune.core.method import Context, LayerView, Method, make_method
from moeprune.core.plan import LayerPlan, Plan
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import DataError, MoepruneError, PlanError
from moeprune.evaluation.perplexity import evaluate as evaluate_models
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import DiskExperts, DiskTensor, expert_layout, refuse
from moeprune.models.loading import LayeredModel, text_config
from moeprune.models.sites import MoESite
from moeprune.models.store import (
    StatisticsStore,
    read_plan,
    same_model,
    versions,
    write_plan,
    writing_statistics,
)
from moeprune.models.surgery import Sizes, apply_plan, mask_in_memory
from moeprune.models.walk import Walk
from moeprune.pipeline.measure import peak_memory, reset_peak_memory

Source = str | os.PathLike[str]
Progress = Callable[[str, int, int], None]
"""Called with (what, steps done, steps in all)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Text:
    """What to read, for calibration or evaluation.

    Attributes:
        sources: ``name=path`` or ``path``; none takes the embedded text.
        sequences: how many in all (calibration), or per domain (evaluation).
        length: tokens per sequence; clipped to what the model was built for.
        seed: of the draw.
    """

    sources: tuple[str, ...] = ()
    sequences: int = 128
    length: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class Compute:
    """Where and how to compute.

    Attributes:
        device: a torch device.
        dtype: ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
        workers: batches that compute at once; 0 takes one per core.
    """

    device: str = "cpu"
    dtype: str = "auto"
    workers: int = 0

    def open(self, checkpoint: Checkpoint) -> LayeredModel:
        """The model, ready to walk.

        Raises:
            MoepruneError: no such dtype or device.
        """
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise MoepruneError(f"unknown dtype {self.dtype!r}", f"auto, {', '.join(DTYPES)}")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise MoepruneError(
                f"device {self.device!r} cannot be used", "use --device cpu"
            ) from error
        return LayeredModel(checkpoint, DTYPES.get(self.dtype), device)


def describe_model(model: LayeredModel, name: str) -> dict[str, Any]:
    """The facts of a model that plans and statistics carry."""
    shape = next(iter(model.sites.values())).shape
    return {
        "name": name,
        "model_type": text_config(model.config).model_type,
        "fingerprint": model.checkpoint.fingerprint,
        "layers": len(model.layers),
        "moe_layers": sorted(model.sites),
        "experts": shape.experts,
        "top_k": shape.top_k,
    }


def model_name(source: Source) -> str:
    """A short name for tables and plans."""
    text = os.fspath(source)
    return Path(text).resolve().name if Path(text).exists() else text


def inspect(source: Source) -> dict[str, Any]:
    """What a checkpoint is, without reading its weights."""
    checkpoint = Checkpoint.open(source)
    model = LayeredModel(checkpoint)
    try:
        refuse(model)
        expert_layout(model)
        reason = None
    except MoepruneError as error:
        reason = error.problem
    if not model.sites and reason is not None and "dense" in reason:
        refuse(model)
    facts: dict[str, Any] = {
        "name": model_name(source),
        "path": str(checkpoint.path),
        "architecture": (checkpoint.config.get("architectures") or ["?"])[0],
        "model_type": text_config(model.config).model_type,
        "layers": len(model.layers),
        "moe_layers": sorted(model.sites),
        "parameters": checkpoint.numel,
        "bytes": checkpoint.nbytes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": checkpoint.fingerprint,
        "supported": reason is None,
        "reason": reason,
    }
    if model.sites:
        shapes = [site.shape for site in model.sites.values()]
        routed = sum(shape.experts * shape.expert_parameters for shape in shapes)
        idle = sum((shape.experts - shape.top_k) * shape.expert_parameters for shape in shapes)
        facts |= {
            "experts": shapes[0].experts,
            "top_k": shapes[0].top_k,
            "groups": shapes[0].groups,
            "hidden": shapes[0].hidden,
            "intermediate": shapes[0].intermediate,
            "expert_parameters": routed,
            "active_parameters": checkpoint.numel - idle,
        }
    return facts


def read_calibration(checkpoint: Checkpoint, text: Text) -> list[data.Domain]:
    """Sequences for calibration.

    Raises:
        DataError: nothing to read, or less than one sequence.
    """
    sources = data.parse_sources(text.sources, "calibration")
    domains = data.load_domains(data.load_tokenizer(checkpoint), sources, _length(checkpoint, text))
    if text.sequences < 1:
        raise DataError(f"--sequences must be at least 1 (got {text.sequences})")
    return data.draw(domains, text.sequences, text.seed)


def _length(checkpoint: Checkpoint, text: Text) -> int:
    if text.length < 2:  # noqa: PLR2004  (one token predicts nothing)
        raise DataError(f"--length must be at least 2 (got {text.length})")
    config = checkpoint.config.get("text_config") or checkpoint.config
    limit = config.get("max_position_embeddings")
    return min(text.length, limit) if isinstance(limit, int) else text.length


def calibrate(
    source: Source,
    out: Path,
    text: Text = Text(),
    collect: Sequence[str] = LIGHT,
    compute: Compute = Compute(),
    force: bool = False,
    progress: Progress = silent,
) -> StatisticsStore:
    """Walk the model over calibration text and save the statistics of every MoE layer.

    Raises:
        MoepruneError: anything the user can mend; nothing is left behind.
    """
    refuse_existing(out, force)
    checkpoint = Checkpoint.open(source)
    model = compute.open(checkpoint)
    refuse(model)
    domains = read_calibration(checkpoint, text)
    header = {
        "model": describe_model(model, model_name(source)),
        "data": {**data.describe(domains), "seed": text.seed},
        "dtype": str(model.dtype).removeprefix("torch."),
        "collect": sorted(collect),
    }
    LayerStatistics.empty(next(iter(model.sites.values())).shape, collect)  # names are checked now
    with writing_statistics(out, header, force) as save_layer:

        def visit(site: MoESite, statistics: LayerStatistics) -> bool:
            save_layer(statistics)
            return False

        _walk(model, domains, compute, progress, "calibrating").layers(sorted(collect), visit)
    return StatisticsStore.open(out)


class _walk:  # noqa: N801  (reads as a verb: walk(...).layers(...))
    """A walk that is opened and closed around one call of ``layers``."""

    def __init__(
        self,
        model: LayeredModel,
        domains: Sequence[data.Domain],
        compute: Compute,
        progress: Progress,
        what: str,
    ) -> None:
        self._walk = Walk(
            model,
            data.batches(domains),
            compute.workers,
            lambda done, total: progress(what, done, total),
        )

    def layers(
        self, needs: Sequence[str], visit: Callable[[MoESite, LayerStatistics], bool]
    ) -> None:
        with self._walk as walk:
            walk.layers(needs, visit)


class _Views:
    """One ``LayerView`` after another; can be iterated more than once."""

    def __init__(
        self,
        model: LayeredModel,
        layout: Mapping[str, DiskTensor],
        store: StatisticsStore | None,
        progress: Progress,
    ) -> None:
        self._model, self._layout, self._store = model, dict(layout), store
        self._progress = progress

    def view(self, site: MoESite, statistics: LayerStatistics | None) -> LayerView:
        experts = DiskExperts(self._model.checkpoint, self._layout, site)
        return LayerView(site.shape, statistics, experts)

    def __iter__(self) -> Iterator[LayerView]:
        for number, (index, site) in enumerate(sorted(self._model.sites.items())):
            statistics = None if self._store is None else self._store.layer(index)
            yield self.view(site, statistics)
            self._progress("planning", number + 1, len(self._model.sites))


def plan(
    source: Source,
    method: str | Method,
    budget: Budget,
    statistics: Path | None = None,
    text: Text | None = None,
    options: Mapping[str, Any] | None = None,
    compute: Compute = Compute(),
    seed: int = 0,
    progress: Progress = silent,
) -> Plan:
    """Decide what happens to every expert.

    A method that scores on calibration text reads ``statistics``; one that edits a layer before
    the next is observed (``sequential``) walks the model over ``text`` instead.

    Raises:
        MoepruneError: anything the user can mend.
    """
    chosen = method if isinstance(method, Method) else make_method(method, options)
    chosen.accept(budget)
    checkpoint = Checkpoint.open(source)
    model = compute.open(checkpoint)
    layout = expert_layout(model)
    warnings: list[str] = []
    context = Context(
        budget, seed, warnings.append, lambda done, total, what: progress(what, done, total)
    )
    facts: dict[str, Any] = {}
    store = None
    if statistics is not None and chosen.needs and not chosen.sequential:
        store = StatisticsStore.open(statistics)
        same_model(store, checkpoint.fingerprint, model_name(source))
        facts = store.summary
    views = _Views(model, layout, store, progress)
    if chosen.sequential:
        layers, facts = _plan_sequentially(chosen, model, views, context, text, compute, progress)
    else:
        layers = chosen.plan_model(views, context)
    result = Plan(
        layers=layers,
        method=chosen.name,
        options=chosen.options(),
        budget=budget.to_json(),
        model=describe_model(model, model_name(source)),
        statistics=facts,
        seed=seed,
        warnings=tuple(warnings),
        versions=versions(),
    )
    result.check({index: site.shape for index, site in model.sites.items()})
    return result


def _plan_sequentially(
    method: Method,
    model: LayeredModel,
    views: _Views,
    context: Context,
    text: Text | None,
    compute: Compute,
    progress: Progress,
) -> tuple[dict[int, LayerPlan], dict[str, Any]]:
    if text is None:
        raise MoepruneError(
            f"{method.name} edits each layer before it observes the next, so it walks the model",
            "give calibration text (--data, or --data demo), or -o propagate=dense with --statistics",
        )
    domains = read_calibration(model.checkpoint, text)
    layers: dict[int, LayerPlan] = {}

    def visit(site: MoESite, statistics: LayerStatistics) -> bool:
        layer = method.plan_layer(views.view(site, statistics), context)
        layers[site.shape.layer] = layer
        mask_in_memory(site, layer)
        return True

    _walk(model, domains, compute, progress, "pruning layer by layer").layers(method.needs, visit)
    described = {**data.describe(domains), "seed": text.seed}
    return layers, {"data": described, "dtype": str(model.dtype).removeprefix("torch.")}


def apply(
    source: Source,
    plan_or_path: Plan | Path,
    out: Path,
    force: bool = False,
    progress: Progress = silent,
) -> Sizes:
    """Write the checkpoint that a plan describes.

    Raises:
        MoepruneError: the plan does not fit the model, or the output cannot be written.
    """
    refuse_existing(out, force)
    checkpoint = Checkpoint.open(source)
    chosen = plan_or_path if isinstance(plan_or_path, Plan) else read_plan(plan_or_path)
    if out.resolve() == checkpoint.path:
        raise PlanError("the output is the model itself", "choose another --out")
    return apply_plan(
        checkpoint, chosen, out, force, lambda done, total: progress("writing", done, total)
    )


@dataclass(frozen=True)
class Pruned:
    """What ``prune`` did.

    Attributes:
        plan: the decision.
        sizes: before and after.
        seconds: per stage.
        peak_memory_bytes: of all stages; None where it cannot be known.
    """

    plan: Plan
    sizes: Sizes
    seconds: dict[str, float]
    peak_memory_bytes: int | None


def prune(
    source: Source,
    method: str | Method,
    budget: Budget,
    out: Path,
    text: Text = Text(),
    options: Mapping[str, Any] | None = None,
    statistics: Path | None = None,
    compute: Compute = Compute(),
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
) -> Pruned:
    """calibrate + plan + apply. The plan is kept in the new checkpoint as well.

    Raises:
        MoepruneError: anything the user can mend; nothing is left behind.
    """
    refuse_existing(out, force)
    reset_peak_memory()
    chosen = method if isinstance(method, Method) else make_method(method, options)
    chosen.accept(budget)
    seconds: dict[str, float] = {}
    work = Path(tempfile.mkdtemp(prefix="moeprune-"))
    try:
        start = time.perf_counter()
        if chosen.needs and not chosen.sequential and statistics is None:
            statistics = work / "statistics"
            seeded = replace(text, seed=seed)
            calibrate(source, statistics, seeded, chosen.needs, compute, progress=progress)
            seconds["calibrate"] = time.perf_counter() - start
        start = time.perf_counter()
        made = plan(
            source,
            chosen,
            budget,
            statistics,
            replace(text, seed=seed),
            None,
            compute,
            seed,
            progress,
        )
        seconds["plan"] = time.perf_counter() - start
        start = time.perf_counter()
        sizes = apply(source, made, out, force, progress)
        seconds["apply"] = time.perf_counter() - start
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Pruned(made, sizes, seconds, peak_memory())


def evaluate(
    source: Source,
    teacher: Source | None = None,
    text: Text = Text(sequences=64, length=256),
    compute: Compute = Compute(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Held-out perplexity per domain and, against a teacher, mean KL and top-1 agreement.

    ``text.sequences`` is per domain here; 0 takes all.

    Raises:
        MoepruneError: anything the user can mend.
    """
    checkpoint = Checkpoint.open(source)
    models = {"model": compute.open(checkpoint)}
    if teacher is not None:
        models["teacher"] = compute.open(Checkpoint.open(teacher))
    domains = read_heldout(checkpoint, text)
    results = evaluate_models(
        models,
        domains,
        "teacher" if teacher is not None else None,
        compute.workers,
        lambda done, total: progress("evaluating", done, total),
    )
    return {
        "format": "moeprune.evaluation/1",
        "model": model_name(source),
        "teacher": None if teacher is None else model_name(teacher),
        "data": data.describe(domains),
        "dtype": str(models["model"].dtype).removeprefix("torch."),
        **results["model"].to_json(),
    }


def read_heldout(checkpoint: Checkpoint, text: Text) -> list[data.Domain]:
    """Sequences for evaluation: ``text.sequences`` per domain from its beginning, 0 for all."""
    sources = data.parse_sources(text.sources, "heldout")
    tokenizer = data.load_tokenizer(checkpoint)
    return data.load_domains(tokenizer, sources, _length(checkpoint, text), text.sequences or None)


def save_plan(made: Plan, path: Path, force: bool = False) -> None:
    """Write a plan (and its vectors) to disk."""
    write_plan(made, path, force)
