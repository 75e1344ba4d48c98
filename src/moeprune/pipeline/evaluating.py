"""What was lost, as ``moeprune.evaluation/1``: on held-out text, and what else is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moeprune.errors import MoepruneError, nearest
from moeprune.evaluation.kept import KeptEvaluation
from moeprune.evaluation.paired import WANTED
from moeprune.evaluation.perplexity import Evaluation, refuse_other_vocabulary
from moeprune.evaluation.perplexity import evaluate as evaluate_models
from moeprune.evaluation.schema import FORMAT, SECTIONS
from moeprune.evaluation.summary import summary
from moeprune.models import data
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.store import versions
from moeprune.pipeline.calibration import identify
from moeprune.pipeline.inputs import (
    Compute,
    Note,
    Progress,
    Source,
    Text,
    code_of,
    model_name,
    read_heldout,
    say,
    silent,
)
from moeprune.pipeline.seen import seen_domains
from moeprune.pipeline.sharing import drop_others, kept_by
from moeprune.pipeline.tokenizers import refuse_other_tokenizer
from moeprune.work import work_folder

Section = Callable[[Source, Source | None, Compute, Progress], dict[str, Any]]
"""Measures one more thing: (model, teacher or None, where to compute, whom to tell) -> JSON."""

STAGE = "evaluation"
_MODEL, _TEACHER = "model", "teacher"


def evaluate(
    source: Source,
    teacher: Source | None = None,
    text: Text = Text(sequences=64, length=256),
    compute: Compute = Compute(),
    progress: Progress = silent,
    sections: Mapping[str, Section] | None = None,
    smallest: float = WANTED,
    resume: Source | None = None,
    note: Note = say,
) -> dict[str, Any]:
    """Held-out loss per domain and, against a teacher, what was lost, with intervals.

    Args:
        source: the model.
        teacher: what it was made from.
        text: what to read; ``text.sequences`` is per domain here, 0 takes all.
        compute, progress: as in the stages.
        sections: what else to measure, by its name in the result (``SECTIONS``).
        smallest: the difference of loss that matters, nats per token.
        resume: keep what is done in ``<resume>.evaluation`` until the end, and go on from there.
        note: told what a person should know of that.

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
    named = None if teacher is None else _TEACHER
    with ExitStack() as stack:
        kept = None
        if resume is not None:
            identity = _identity(models, domains)
            place = kept_by(Path(resume), STAGE, compute.ranks, identity)
            afresh = "give another --resume"
            folder = work_folder(*place, note=note, afresh=afresh)
            kept = KeptEvaluation(stack.enter_context(folder))
        results = measure(models, domains, named, compute, progress, kept)
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
    if resume is not None and compute.ranks.first:
        drop_others(Path(resume), STAGE)
    return found


def _identity(models: Mapping[str, LayeredModel], domains: Sequence[data.Domain]) -> dict[str, Any]:
    """What decides the sums of an evaluation, for ``work_folder``."""
    teacher = models.get(_TEACHER)
    return {
        **identify(models[_MODEL], domains, 0),
        "teacher": None if teacher is None else teacher.checkpoint.fingerprint,
        "teacher code": None if teacher is None else code_of(teacher.checkpoint),
        "teacher dtype": None if teacher is None else str(teacher.dtype).removeprefix("torch."),
    }


def measure(
    models: Mapping[str, LayeredModel],
    domains: Sequence[data.Domain],
    teacher: str | None,
    compute: Compute,
    progress: Progress = silent,
    kept: KeptEvaluation | None = None,
) -> dict[str, Evaluation]:
    """Several models on the same windows, each walked once; ``teacher`` names one of them.

    ``kept`` is as in ``evaluation.perplexity.evaluate``.
    """
    return evaluate_models(
        models,
        domains,
        teacher,
        compute.workers,
        lambda done, total: progress("evaluating", done, total),
        compute.ranks,
        kept,
    )


def _check(sections: Mapping[str, Section], smallest: float) -> None:
    for name in sections:
        if name not in SECTIONS:
            raise MoepruneError(f"an evaluation has no section {name!r}", nearest(name, SECTIONS))
    if not 0.0 < smallest < float("inf"):
        raise MoepruneError(
            f"--smallest must be above 0 (got {smallest})", "in nats per token: 0.02 is about 2 %"
        )
