"""What was lost, as ``moeprune.evaluation/1``: on held-out text, and what else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moeprune.errors import MoepruneError, nearest
from moeprune.evaluation.paired import WANTED
from moeprune.evaluation.perplexity import Evaluation, refuse_other_vocabulary
from moeprune.evaluation.perplexity import evaluate as evaluate_models
from moeprune.evaluation.schema import FORMAT, SECTIONS
from moeprune.evaluation.summary import summary
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
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
from moeprune.pipeline.seen import seen_domains
from moeprune.pipeline.tokenizers import refuse_other_tokenizer

Section = Callable[[Source, Source | None, Compute, Progress], dict[str, Any]]
"""Measures one more thing: (model, teacher or None, where to compute, whom to tell) -> JSON."""

_MODEL, _TEACHER = "model", "teacher"


def evaluate(
    source: Source,
    teacher: Source | None = None,
    text: Text = Text(sequences=64, length=256),
    compute: Compute = Compute(),
    progress: Progress = silent,
    sections: Mapping[str, Section] | None = None,
    smallest: float = WANTED,
) -> dict[str, Any]:
    """Held-out loss per domain and, against a teacher, what was lost, with intervals.

    Args:
        source: the model.
        teacher: what it was made from.
        text: what to read; ``text.sequences`` is per domain here, 0 takes all.
        compute, progress: as in the stages.
        sections: what else to measure, by its name in the result (``SECTIONS``).
        smallest: the difference of loss that matters, nats per token.

    Raises:
        MoepruneError: anything the user can mend.
    """
    _check(sections or {}, smallest)
    if sections and compute.ranks.size > 1:
        raise MoepruneError(
            f"{', '.join(sections)}: measured by one process",
            "leave them out, or run without torchrun",
        )
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    models = {_MODEL: compute.open(checkpoint)}
    if teacher is not None:
        original = Checkpoint.open(teacher, compute.trust_remote_code)
        models[_TEACHER] = compute.open(original)
        refuse_other_vocabulary(models)
        refuse_other_tokenizer(checkpoint, original)
    domains = read_heldout(checkpoint, text)
    results = measure(models, domains, None if teacher is None else _TEACHER, compute, progress)
    found: dict[str, Any] = {
        "format": FORMAT,
        "model": model_name(source),
        "teacher": None if teacher is None else model_name(teacher),
        "dtype": str(models[_MODEL].dtype).removeprefix("torch."),
        "data": data.describe(domains),
        "versions": versions(),
        "seconds": results[_MODEL].seconds,
        **summary(
            results[_MODEL],
            results.get(_TEACHER),
            seen_domains(checkpoint.path),
            text.sequences,
            smallest,
        ),
    }
    for name, section in (sections or {}).items():
        found[name] = section(source, teacher, compute, progress)
    return found


def measure(
    models: Mapping[str, LayeredModel],
    domains: Sequence[data.Domain],
    teacher: str | None,
    compute: Compute,
    progress: Progress = silent,
) -> dict[str, Evaluation]:
    """Several models on the same windows, each walked once; ``teacher`` names one of them."""
    return evaluate_models(
        models,
        domains,
        teacher,
        compute.workers,
        lambda done, total: progress("evaluating", done, total),
        compute.ranks,
    )


def _check(sections: Mapping[str, Section], smallest: float) -> None:
    for name in sections:
        if name not in SECTIONS:
            raise MoepruneError(f"an evaluation has no section {name!r}", nearest(name, SECTIONS))
    if not 0.0 < smallest < float("inf"):
        raise MoepruneError(
            f"--smallest must be above 0 (got {smallest})", "in nats per token: 0.02 is about 2 %"
        )
