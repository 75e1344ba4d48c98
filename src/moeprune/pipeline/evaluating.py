"""What was lost, as ``moeprune.evaluation/1``: on held-out text, and what else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moeprune.evaluation.perplexity import evaluate as evaluate_models
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.store import versions
from moeprune.pipeline.inputs import (
    Compute,
    Progress,
    Source,
    Text,
    model_name,
    read_heldout,
    silent,
)

FORMAT = "moeprune.evaluation/1"

Section = Callable[[Source, Source | None, Compute, Progress], dict[str, Any]]
"""Measures one more thing: (model, teacher or None, where to compute, whom to tell) -> JSON."""

SECTIONS = ("tasks", "generation", "efficiency")


def evaluate(
    source: Source,
    teacher: Source | None = None,
    text: Text = Text(sequences=64, length=256),
    compute: Compute = Compute(),
    progress: Progress = silent,
    sections: Mapping[str, Section] | None = None,
) -> dict[str, Any]:
    """Held-out perplexity per domain and, against a teacher, mean KL and top-1 agreement.

    Args:
        source: the model.
        teacher: what it was made from.
        text: what to read; ``text.sequences`` is per domain here, 0 takes all.
        compute, progress: as in the stages.
        sections: what else to measure, by its name in the result (``SECTIONS``).

    Raises:
        MoepruneError: anything the user can mend.
    """
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    models = {"model": compute.open(checkpoint)}
    if teacher is not None:
        models["teacher"] = compute.open(Checkpoint.open(teacher, compute.trust_remote_code))
    domains = read_heldout(checkpoint, text)
    results = evaluate_models(
        models,
        domains,
        "teacher" if teacher is not None else None,
        compute.workers,
        lambda done, total: progress("evaluating", done, total),
    )
    measured = results["model"]
    found: dict[str, Any] = {
        "format": FORMAT,
        "model": model_name(source),
        "teacher": None if teacher is None else model_name(teacher),
        "dtype": str(models["model"].dtype).removeprefix("torch."),
        "data": data.describe(domains),
        "versions": versions(),
        "seconds": measured.seconds,
        "domains": {name: score.to_json() for name, score in measured.domains.items()},
        "groups": {"all": measured.total().to_json()},
        "findings": [],
    }
    for name, section in (sections or {}).items():
        found[name] = section(source, teacher, compute, progress)
    return found
