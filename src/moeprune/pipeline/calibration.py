"""Statistics: one walk over text that feeds every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeprune.core.accumulators import LIGHT, Routing
from moeprune.core.residual import NAME
from moeprune.core.statistics import LayerStatistics
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.kept_statistics import KeptStatistics
from moeprune.models.layout import refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.residual import ResidualTap
from moeprune.models.sites import MoESite
from moeprune.models.store import StatisticsStore, versions
from moeprune.models.walk import Walk
from moeprune.models.walk_state import WalkStates
from moeprune.pipeline.inputs import (
    Compute,
    Note,
    Progress,
    Source,
    Text,
    code_of,
    describe_model,
    model_name,
    read_calibration,
    refuse_source,
    say,
    silent,
)
from moeprune.pipeline.sharing import drop_others, kept_by, merged, own_batches
from moeprune.work import refuse_finished, work_folder

STAGE = "calibration"


def calibrate(
    source: Source,
    out: Source,
    text: Text = Text(),
    collect: Sequence[str] = LIGHT,
    compute: Compute = Compute(),
    force: bool = False,
    progress: Progress = silent,
    note: Note = say,
) -> StatisticsStore:
    """Walk the model over calibration text and save the statistics of every MoE layer.

    What is done is kept in ``<out>.calibration`` until ``out`` appears; the same call goes on from
    it, and ends with the same bytes as one that was never interrupted.

    Raises:
        MoepruneError: anything the user can mend; ``out`` is as it was before.
    """
    out, ranks = Path(out), compute.ranks
    if ranks.first:
        refuse_finished(out, STAGE, force=force)
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    refuse_source(checkpoint, out)
    model = compute.open(checkpoint)
    refuse(model)
    domains = read_calibration(checkpoint, text)
    # a walk without sums of its own sees no layer: the lightest ones say that it was there
    needs = sorted({*collect} - {NAME}) or [Routing.name]
    header = {
        "model": describe_model(model, model_name(source)),
        "data": {**data.describe(domains), "seed": text.seed},
        "dtype": str(model.dtype).removeprefix("torch."),
        "collect": sorted({*collect, *needs}),
    }
    LayerStatistics.empty(next(iter(model.sites.values())).shape, needs)  # names are checked now
    identity = {**identify(model, domains, text.seed), "collect": header["collect"]}
    with work_folder(*kept_by(out, STAGE, ranks, identity), force, note) as folder:
        if not ranks.broadcast(folder.published):
            if ranks.first:
                refuse_existing(out, force)
            kept, states = KeptStatistics(folder), WalkStates(folder, model, ranks=ranks)
            batches, _ = own_batches(domains, text.seed, ranks)
            tap = ResidualTap(batches) if NAME in collect else None
            if tap is not None:
                model.limits = replace(model.limits, beside=tap.nbytes(model))
            _resume(kept, tap, states)
            if not states.finished:
                _walk(model, domains, compute, needs, progress, text.seed, kept, tap, states)
            if tap is not None:
                angles = merged(ranks.gather(tap.result()))
                if ranks.first:
                    kept.save(angles)
            if ranks.first:
                kept.publish(header, force)
            ranks.barrier()  # what the others keep is needed until then
    if not ranks.first:
        return StatisticsStore(out)
    drop_others(out, STAGE)
    return StatisticsStore.open(out)


def _walk(
    model: LayeredModel,
    domains: Sequence[data.Domain],
    compute: Compute,
    needs: Sequence[str],
    progress: Progress,
    seed: int,
    kept: KeptStatistics,
    tap: ResidualTap | None,
    states: WalkStates,
) -> None:
    """All layers that are left, each kept when it is done."""

    def visit(site: MoESite, statistics: LayerStatistics) -> bool:
        if compute.ranks.first:
            kept.save(statistics)
        return False

    def done(index: int) -> None:
        for number, rows in enumerate([] if tap is None else tap.points):
            if number >= index:
                kept.save_point(number, rows)

    stream = None if tap is None else tap.note
    observe(
        model, domains, compute, needs, visit, progress, seed,
        stream=stream, done=done, states=states, chunks=True,
    )  # fmt: skip


def _resume(kept: KeptStatistics, tap: ResidualTap | None, states: WalkStates) -> None:
    """Find out where a calibration goes on."""
    model = states.model
    points = [] if tap is None else kept.points()

    def has(index: int) -> bool:
        last = index == len(model.layers) - 1
        whole = tap is None or len(points) > index + last  # of the last one, what it hands on too
        return whole and (
            index not in model.sites or not states.ranks.first or kept.has(index)
        )  # rank 0 keeps the statistics of all

    states.resume(has, STAGE)
    if tap is not None:
        tap.points += points[: states.reached + 1 + states.finished]


def identify(model: LayeredModel, domains: Sequence[data.Domain], seed: int) -> dict[str, Any]:
    """What decides every number of a walk, for ``work_folder``."""
    return {
        "model": model.checkpoint.fingerprint,
        "code": code_of(model.checkpoint),
        "text": data.describe(domains)["hash"],
        "length": data.describe(domains)["length"],
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "versions": versions(),
    }


def observe(
    model: LayeredModel,
    domains: Sequence[data.Domain],
    compute: Compute,
    needs: Sequence[str],
    visit: Callable[[MoESite, LayerStatistics], bool],
    progress: Progress = silent,
    seed: int = 0,
    opened: Callable[[Walk], None] = lambda walk: None,
    stream: Callable[[Sequence[object]], None] | None = None,
    done: Callable[[int], None] = lambda index: None,
    states: WalkStates | None = None,
    chunks: bool = False,
) -> None:
    """Walk ``model`` over ``domains`` and show ``visit`` every MoE layer with its statistics.

    If ``visit`` returns True it has changed the layer's weights, and the layers behind it see that.
    ``opened`` gets the walk before it starts: ``visit`` can let it run the layer again.
    ``stream`` is as in ``Walk.layers``; ``done`` is told every layer that is done. With ``states``
    the walk begins at their start, and they keep what layers make of the text, after ``done``.
    ``chunks`` is as in ``Walk``: for visits that look at statistics alone.
    """

    def tell(steps: int, total: int) -> None:
        progress("walking", steps, total)

    def finished(index: int, outputs: Sequence[object]) -> None:
        done(index)
        if states is not None and index + 1 < len(model.layers):
            states.save(index, outputs, written=walk.rest)

    ranks, start = compute.ranks, None if states is None else states.start
    batches, offset = own_batches(domains, seed, ranks)

    def together(entered: Sequence[object]) -> None:
        ranks.barrier()  # those of one machine read a layer at the same time, so from disk once
        if stream is not None:
            stream(entered)

    with Walk(model, batches, compute.workers, tell, start, ranks, offset, needs, chunks) as walk:
        opened(walk)
        walk.layers(needs, visit, stream if ranks.size == 1 else together, finished)
