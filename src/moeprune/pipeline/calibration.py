"""Statistics: one walk over text that feeds every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from moeprune.core.accumulators import LIGHT, Routing
from moeprune.core.residual import NAME, Residual
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import DataError
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.ranks import Ranks
from moeprune.models.residual import ResidualTap
from moeprune.models.sites import MoESite
from moeprune.models.store import StatisticsStore, writing_statistics
from moeprune.models.walk import Walk
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    describe_model,
    model_name,
    read_calibration,
    refuse_source,
    silent,
)


def calibrate(
    source: Source,
    out: Source,
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
    out, ranks = Path(out), compute.ranks
    if ranks.first:
        refuse_existing(out, force)
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
    with writing_statistics(out, header, force) if ranks.first else nullcontext(_drop) as save:

        def visit(site: MoESite, statistics: LayerStatistics) -> bool:
            save(statistics)
            return False

        angles = save if NAME in collect else None
        observe(model, domains, compute, needs, visit, progress, text.seed, residual=angles)
    ranks.barrier()  # rank 0 has written them
    return StatisticsStore.open(out) if ranks.first else StatisticsStore(out)


def _drop(statistics: LayerStatistics | Residual) -> None:
    """In all ranks but the first, which writes what all have."""


def observe(
    model: LayeredModel,
    domains: Sequence[data.Domain],
    compute: Compute,
    needs: Sequence[str],
    visit: Callable[[MoESite, LayerStatistics], bool],
    progress: Progress = silent,
    seed: int = 0,
    opened: Callable[[Walk], None] = lambda walk: None,
    residual: Callable[[Residual], None] | None = None,
) -> None:
    """Walk ``model`` over ``domains`` and show ``visit`` every MoE layer with its statistics.

    If ``visit`` returns True it has changed the layer's weights, and the layers behind it see that.
    ``opened`` gets the walk before it starts: ``visit`` can let it run the layer again.
    ``residual`` gets the angles of the residual stream, which are collected for it.
    """

    def tell(done: int, total: int) -> None:
        progress("walking", done, total)

    ranks = compute.ranks
    batches = data.batches(domains, seed)
    own = run_of_batches(len(batches), ranks)
    tap = None if residual is None else ResidualTap(batches[own])

    def between(states: Sequence[object]) -> None:
        ranks.barrier()  # those of one machine read a layer at the same time: from disk once
        if tap is not None:
            tap.note(states)

    with Walk(model, batches[own], compute.workers, tell, ranks=ranks, offset=own.start) as walk:
        opened(walk)
        walk.layers(needs, visit, None if tap is None and ranks.size == 1 else between)
    if residual is not None and tap is not None:
        residual(_merged(ranks.gather(tap.result())))


def run_of_batches(count: int, ranks: Ranks) -> slice:
    """Which batches are this process's own.

    Raises:
        DataError: there is not one for each.
    """
    if count < ranks.size:
        raise DataError(
            f"{ranks.size} processes share {count} batches of {data.TOKENS_PER_BATCH} tokens",
            f"start at most {count} processes, or give more --sequences",
        )
    return ranks.run_of(count)


def _merged(parts: Sequence[Residual]) -> Residual:
    """In order of ranks, which is that of the text."""
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    return total
