"""An audit before the cut: how prunable a model is, from one small walk."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moeprune.core.accumulators import LIGHT
from moeprune.core.method import Method, make_method
from moeprune.core.ranking import Ranking
from moeprune.core.replacing import Replacer
from moeprune.errors import BudgetError, DataError, MoepruneError, UnsupportedModelError
from moeprune.evaluation.damage import measure
from moeprune.evaluation.perplexity import window_rows
from moeprune.models import data
from moeprune.models.abilities import abilities
from moeprune.models.bounds import statistics_bytes
from moeprune.models.branches import BranchedWalk
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.layout import expert_layout, refuse
from moeprune.models.loading import LayeredModel
from moeprune.models.native import text_config
from moeprune.models.store import StatisticsStore, same_model, versions
from moeprune.models.walk import Batch
from moeprune.pipeline.audit_findings import judged
from moeprune.pipeline.audit_layers import RESAMPLES, LayerAuditor
from moeprune.pipeline.audit_result import Cells, result_of
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
from moeprune.pipeline.views import Views

FORMAT = "moeprune.audit/1"
RATIOS = (0.25, 0.5, 0.75)

_PARTS = 16  # into which the calibration text is cut, to be resampled
_HELD_TOKENS = 2048  # that go together: several logits of them are in memory at once
_MASKED_LAYERS = 6  # in which zeroed weights are compared with cut experts, at most


@dataclass(frozen=True)
class Trial:
    """What an audit tries.

    Attributes:
        method: chooses which experts go: any method that ranks them by one score. None takes
            ``mone``, or ``reap`` where experts cannot be replaced by constants.
        ratios: shares of the experts that are taken away.
        max_loss: the rise of the held-out loss that is acceptable, nats per token.
        held: sequences on which damage is measured.
        layers: layers that are cut one at a time, evenly spread if there are more.
    """

    method: str | None = None
    ratios: tuple[float, ...] = RATIOS
    max_loss: float = 0.05
    held: int = 32
    layers: int = 12


def audit(
    source: Source,
    text: Text = Text(sequences=96, length=512),
    statistics: Source | None = None,
    trial: Trial = Trial(),
    compute: Compute = Compute(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """How prunable a model is, as ``moeprune.audit/1``; nothing is written.

    One walk observes calibration text, and takes other sequences of the same sources, which are
    held out, through the model and through versions of it of which one layer, or all, are cut.
    With ``statistics`` no text is observed, and how stable a choice is remains unknown.

    Raises:
        MoepruneError: anything the user can mend.
    """
    start = time.perf_counter()
    _check(trial)
    checkpoint = Checkpoint.open(source, compute.trust_remote_code)
    model = compute.open(checkpoint)
    refuse(model)
    layout = expert_layout(model)
    method = _method(model, trial.method)
    store = None
    if statistics is not None:
        store = StatisticsStore.open(Path(statistics))
        same_model(store, checkpoint.fingerprint, model_name(source))
    seen, held = _texts(checkpoint, text, trial.held, store is not None)
    batches, part_of = _parts(seen, text.seed)
    cells = Cells.of(sorted(model.sites), trial.ratios, trial.layers, _MASKED_LAYERS)
    auditor = LayerAuditor(
        model,
        Views(model, layout, store, silent),
        method,
        make_method("moe-pruner", {"propagate": "dense"}),
        trial.ratios,
        cells.mask_ratio,
        part_of,
        text.seed,
        None if store is None else store.layer,
    )
    # of every part of the text, and of every sample of them
    sets = len({*part_of}) + RESAMPLES if part_of else 0
    model.limits = replace(model.limits, beside=sets * statistics_bytes(model, auditor.kept))
    walk = BranchedWalk(
        model,
        batches,
        compute.workers,
        lambda done, total: progress("walking", done, total),
        needs=LIGHT if batches else (),
        held=_held_batches(model, held),
        branches=cells.branches,
        decide=auditor.decide,
        part=auditor.part,
    )
    with walk:
        walk.layers(LIGHT)
        damage = measure(
            walk, *_clusters(held), lambda done, total: progress("measuring", done, total)
        )
    described = {
        "format": FORMAT,
        "model": describe_model(model, model_name(source)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "method": {"name": method.name, "options": method.options()},
        "data": {
            "calibration": store.manifest["data"] if store else data.describe(seen),
            "held": data.describe(held),
            "seed": text.seed,
        },
        "statistics": None if store is None else store.summary["sha256"],
        "versions": versions(),
    }
    found = result_of(auditor.found, cells, damage, walk.squares, trial.max_loss)
    return {
        **described,
        "seconds": time.perf_counter() - start,
        **judged({**described, **found}),
        **found,
    }


def _check(trial: Trial) -> None:
    ratios = trial.ratios
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise BudgetError("--ratios are shares of the experts: above 0 and below 1")
    if list(ratios) != sorted(set(ratios)):
        raise BudgetError("--ratios must ascend, without repetition", "for example 0.25,0.5,0.75")
    if not trial.max_loss > 0 or trial.max_loss == float("inf"):
        raise MoepruneError(f"--max-loss must be above 0 (got {trial.max_loss:g})")
    if trial.held < 1 or trial.layers < 0:
        raise MoepruneError("--held must be at least 1, and --layers at least 0")


def _method(model: LayeredModel, name: str | None) -> Method:
    """The method that chooses experts.

    Raises:
        MoepruneError: it does not rank experts, wants more than an audit collects, or needs
            constants where this family can have none.
    """
    no_constants = abilities(model).can["replace by constants"].startswith("no")
    method = make_method(name or ("reap" if no_constants else "mone"))
    if not isinstance(method, Ranking):
        raise MoepruneError(
            f"an audit tries methods that rank experts by one score, and {method.name} does not",
            "for example --method mone, reap or frequency",
        )
    missing = sorted(set(method.needs) - set(LIGHT))
    if missing:
        raise MoepruneError(
            f"{method.name} needs {', '.join(missing)}, which an audit does not collect",
            "for example --method mone, reap or frequency",
        )
    if no_constants and isinstance(method, Replacer):
        reason = abilities(model).can["replace by constants"].removeprefix("no: ")
        raise UnsupportedModelError(
            f"experts of {text_config(model.config).model_type} cannot be replaced by constants: "
            f"{reason}",
            "leave out --method, or give one that deletes experts: --method reap",
        )
    return method


def _texts(
    checkpoint: Checkpoint, text: Text, held: int, observed: bool
) -> tuple[list[data.Domain], list[data.Domain]]:
    """Sequences to observe (none if they were ``observed`` before) and others, to measure on.

    Where there is less text than was asked for, both get less of it.

    Raises:
        DataError: there are not two sequences.
    """
    wanted = held if observed else text.sequences + held
    if text.sequences < 1:
        raise DataError(f"--sequences must be at least 1 (got {text.sequences})")
    drawn = read_calibration(checkpoint, replace(text, sequences=wanted))
    if observed:
        return [], drawn
    count = sum(len(domain.ids_NL) for domain in drawn)
    if count < 2:
        raise DataError(
            "an audit needs at least two sequences, one of them to measure on",
            "give more text (--data), or a smaller --length",
        )
    sizes = [round(held / wanted * len(domain.ids_NL)) for domain in drawn]
    if not any(sizes):
        sizes[0] = 1
    if sum(sizes) == count:
        sizes[-1] -= 1
    watched, rest = [], []
    for domain, size in zip(drawn, sizes, strict=True):
        rows = list(range(len(domain.ids_NL)))
        random.Random(f"{text.seed}:held:{domain.name}").shuffle(rows)
        rest.append(_rows(domain, sorted(rows[:size])))
        watched.append(_rows(domain, sorted(rows[size:])))
    return [d for d in watched if len(d.ids_NL)], [d for d in rest if len(d.ids_NL)]


def _rows(domain: data.Domain, rows: list[int]) -> data.Domain:
    document_N = None if domain.document_N is None else domain.document_N[rows]
    return replace(domain, ids_NL=domain.ids_NL[rows], document_N=document_N)


def _parts(domains: Sequence[data.Domain], seed: int) -> tuple[list[Batch], list[int]]:
    """Batches, and for each the part of the text that it belongs to.

    Every part has about as much of every domain as the whole.
    """
    if not domains:
        return [], []
    ids_NL = torch.cat([domain.ids_NL for domain in domains])
    count = min(_PARTS, len(ids_NL))
    found: list[Batch] = []
    part_of: list[int] = []
    for number in range(count):
        own = data.batches([data.Domain("", ids_NL[number::count], 1.0)], seed)
        found += own
        part_of += [number] * len(own)
    return found, part_of


def _held_batches(model: LayeredModel, domains: Sequence[data.Domain]) -> list[Batch]:
    ids_NL = torch.cat([domain.ids_NL for domain in domains])
    length = ids_NL.shape[1]
    rows = window_rows(text_config(model.config).vocab_size, length)
    rows = min(rows, max(1, _HELD_TOKENS // length))
    parts = [ids_NL[start : start + rows] for start in range(0, len(ids_NL), rows)]
    return [Batch(part, data.token_keys(part)) for part in parts]


def _clusters(domains: Sequence[data.Domain]) -> tuple[NDArray[np.int64], str]:
    """The document of every held-out sequence, and what that is called."""
    if any(domain.document_N is None for domain in domains):
        return np.arange(sum(len(domain.ids_NL) for domain in domains)), "windows"
    found, above = [], 0
    for domain in domains:
        assert domain.document_N is not None
        found.append(domain.document_N.numpy() + above)
        above = int(found[-1].max()) + 1
    return np.concatenate(found), "documents"
