"""The BLiMP sample on one or more models; needs nothing that is not installed with the package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeprune.evaluation import blimp
from moeprune.evaluation.harness.scores import score
from moeprune.evaluation.likelihood import BATCH_SIZE
from moeprune.models.checkpoint import DEMO, Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.pipeline.inputs import Compute, Progress

DEMO_PAIRS = 402
"""6 of each of 67 paradigms: a seventh of the time of the demo at most."""

_READS = 2048  # where a configuration does not say how much, as in the harness


def measure_sample(
    models: Mapping[str, LayeredModel],
    tokenizer: Any,
    limit: int | None,
    compute: Compute,
    progress: Progress,
    batch_size: int = BATCH_SIZE,
) -> dict[str, list[bool]]:
    """Which pairs each model gets right, in one pass over the models.

    Args:
        models: by name; all of the same tokenizer.
        tokenizer: theirs.
        limit: so many pairs, as balanced over paradigms as can be; None takes all.
        compute: how many batches at once.
        progress: whom to tell.
        batch_size: rows that go through together.
    """
    return blimp.blimp(
        models,
        tokenizer,
        min(_reads(model) for model in models.values()),
        limit,
        batch_size,
        compute.workers,
        lambda done, total: progress(blimp.NAME, done, total),
    )


def sample_entry(
    right: list[bool], teacher: list[bool] | None, limit: int | None = None
) -> dict[str, Any]:
    """The entry of the sample in the section ``tasks``, as those of the harness's tasks."""
    other = None if teacher is None else [float(each) for each in teacher]
    numbers = score([float(each) for each in right], other)
    return {
        "metric": "acc",
        **numbers,
        "metrics": {"acc": {"value": numbers["value"], "teacher": numbers["teacher"]}},
        "shots": 0,
        "chance": blimp.CHANCE,
        "protocol": None,
        "door": "streamed",
        "limit": limit,
        "harness": None,
        "task_version": "1.0",
        "cut": 0,
        "notes": [],
    }


def with_sample(
    rows: list[dict[str, Any]], work: Path, pairs: int, compute: Compute, progress: Progress
) -> list[dict[str, Any]]:
    """Rows of a demo run with ``tasks``: every model on the same pairs, against the first.

    Args:
        rows: the original first, the others' checkpoints under their names in ``work``.
        work: where these stand.
        pairs: how many; 0 leaves the rows as they are.
        compute, progress: as everywhere.
    """
    if not pairs:
        return rows
    sources = {row["name"]: DEMO if row["path"] is None else work / row["name"] for row in rows}
    models = {name: compute.open(Checkpoint.open(source)) for name, source in sources.items()}
    tokenizer = load_tokenizer(Checkpoint.open(DEMO))
    right = measure_sample(models, tokenizer, pairs, compute, progress)
    first = rows[0]["name"]
    for row in rows:
        teacher = None if row["name"] == first else right[first]
        row["tasks"] = {blimp.NAME: sample_entry(right[row["name"]], teacher, pairs)}
    return rows


def _reads(model: LayeredModel) -> int:
    found = getattr(text_config(model.config), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 1 else _READS
