"""Statistics: one walk over text that feeds every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moeprune.core.accumulators import LIGHT
from moeprune.core.statistics import LayerStatistics
from moeprune.files import refuse_existing
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import refuse
from moeprune.models.loading import LayeredModel
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
    out = Path(out)
    refuse_existing(out, force)
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
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

        observe(model, domains, compute, sorted(collect), visit, progress, text.seed)
    return StatisticsStore.open(out)


def observe(
    model: LayeredModel,
    domains: Sequence[data.Domain],
    compute: Compute,
    needs: Sequence[str],
    visit: Callable[[MoESite, LayerStatistics], bool],
    progress: Progress = silent,
    seed: int = 0,
    opened: Callable[[Walk], None] = lambda walk: None,
) -> None:
    """Walk ``model`` over ``domains`` and show ``visit`` every MoE layer with its statistics.

    If ``visit`` returns True it has changed the layer's weights, and the layers behind it see that.
    ``opened`` gets the walk before it starts: ``visit`` can let it run the layer again.
    """

    def tell(done: int, total: int) -> None:
        progress("walking", done, total)

    with Walk(model, data.batches(domains, seed), compute.workers, tell) as walk:
        opened(walk)
        walk.layers(needs, visit)
