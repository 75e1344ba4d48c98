"""Runs tasks of the harness on several models, question by question.

What the harness's ``simple_evaluate`` does before and around ``evaluate``: the same seeds, the same
rule for shots, the same draw of few-shot examples for every model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moeprune.errors import DataError, MoepruneError
from moeprune.evaluation.harness.catalogue import Catalogue, Leaf, quiet
from moeprune.evaluation.harness.doors import refuse_generation
from moeprune.evaluation.harness.local import Folder, no_data

_SEED, _OTHER_SEED = 0, 1234  # the harness's own


@dataclass(frozen=True)
class Asked:
    """A task and how many labelled examples stand before each question; None: its own number."""

    task: str
    shots: int | None = None


@dataclass
class Ready:
    """A task whose data are there.

    Attributes:
        asked: what was asked for.
        tasks: the harness's tasks that it leads to, by name.
        by_size: whether questions count alike, or tasks.
        shots: labelled examples before each question.
        notes: where it differs from the harness's own task.
    """

    asked: Asked
    tasks: dict[str, Any]
    by_size: bool
    shots: int
    notes: list[str] = field(default_factory=list)

    @property
    def version(self) -> str:
        """The harness's version of the task."""
        return ", ".join(sorted({str(task.VERSION) for task in self.tasks.values()}))


@dataclass
class Outcome:
    """One model on one task.

    Attributes:
        values: by metric, as the harness computes them.
        items: by metric, one number per question.
        questions: which question each item is: task and number.
        loglikelihoods: of each question's answers.
        cut: questions whose prompt was longer than the model reads, and lost its beginning.
    """

    values: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    questions: list[tuple[str, int]] = field(default_factory=list)
    loglikelihoods: list[list[float]] = field(default_factory=list)
    cut: int = 0


def prepare(
    asked: Iterable[Asked], catalogue: Catalogue, folder: Folder | None, generates: bool
) -> tuple[list[Ready], dict[Asked, MoepruneError]]:
    """Tasks with their data, and why the others cannot be measured.

    Args:
        asked: each once.
        catalogue: holds all their names.
        folder: local data; None lets the harness find its own.
        generates: whether the door can generate text.
    """
    ready, left_out = [], {}
    for each in asked:
        try:
            ready.append(_prepare(each, catalogue, folder, generates))
        except MoepruneError as error:
            left_out[each] = error
    return ready, left_out


def _prepare(asked: Asked, catalogue: Catalogue, folder: Folder | None, generates: bool) -> Ready:
    name = asked.task
    tasks: dict[str, Any] = {}
    leaves = catalogue.leaves(name)
    for leaf in leaves:
        own = {} if folder is None else folder.overrides(leaf, name)
        task = _load(catalogue, leaf, {**leaf.overrides, **own}, name, folder)
        if task.OUTPUT_TYPE == "generate_until" and not generates:
            raise refuse_generation(name)
        _set_shots(task, asked.shots)
        tasks[leaf.name] = task
        _try(task, leaf, folder)
    shots = max(int(task.get_config("num_fewshot")) for task in tasks.values())
    ready = Ready(asked, tasks, catalogue.by_size(name), shots)
    if shots and folder is not None and not folder.has_shots(leaves[0], name):
        ready.notes.append(
            "few-shot examples are drawn from the measured questions themselves, never the "
            "question asked: no TASK_train.jsonl was given"
        )
    return ready


def _load(
    catalogue: Catalogue, leaf: Leaf, changes: dict[str, Any], asked: str, folder: Folder | None
) -> Any:
    group = {"group": "moeprune", "task": [{"task": leaf.name, **changes}]}
    try:
        with quiet():
            [task] = catalogue.manager.load(group)["tasks"].values()
    except Exception as error:  # whatever the data set library or the task's own code raises
        reason = _reason(error)
        if folder is None:
            raise no_data(leaf, asked, reason) from error
        raise _misfit(leaf, folder, reason) from error
    return task


def _set_shots(task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):  # a task's own 0 is never changed
        task.set_config(key="num_fewshot", value=shots or 0)


def _try(task: Any, leaf: Leaf, folder: Folder | None) -> None:
    """Build the first question, so that columns that do not fit show before the long run."""
    try:
        with quiet():
            task.set_fewshot_seed(seed=_OTHER_SEED)
            task.build_all_requests(limit=1)
    except Exception as error:
        raise _misfit(leaf, folder, _reason(error)) from error


def _misfit(leaf: Leaf, folder: Folder | None, reason: str) -> DataError:
    where = "its data" if folder is None else f"the data in {folder.path}"
    return DataError(
        f"task {leaf.name!r} cannot be asked with {where}: {reason}",
        f"the columns must be those of {leaf.config.get('dataset_path')}",
    )


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def measure(
    ready: Sequence[Ready],
    models: Mapping[str, Callable[[], Any]],
    limit: int | None = None,
) -> dict[Asked, dict[str, Outcome]]:
    """Every model on the same questions.

    Args:
        ready: what to ask.
        models: what gives the harness's model, by name; one after another, each forgotten.
        limit: the first so many questions of every task.
    """
    found: dict[Asked, dict[str, Outcome]] = {one.asked: {} for one in ready}
    rounds: dict[int | None, list[Ready]] = {}
    for one in ready:
        rounds.setdefault(one.asked.shots, []).append(one)
    for name, opened in models.items():
        lm = opened()
        for together in rounds.values():
            result = _evaluate(lm, together, limit)
            for one in together:
                found[one.asked][name] = _outcome(one, result, lm)
        del lm
    return found


def _evaluate(lm: Any, together: Sequence[Ready], limit: int | None) -> Any:
    from lm_eval import evaluate

    random.seed(_SEED)
    np.random.seed(_OTHER_SEED)
    torch.manual_seed(_OTHER_SEED)
    tasks: dict[str, Any] = {}
    for one in together:
        for name, task in one.tasks.items():
            tasks.setdefault(name, task)
    for task in tasks.values():
        task.set_fewshot_seed(seed=_OTHER_SEED)
    loaded = {"tasks": tasks, "groups": {}, "group_map": {}}
    with quiet():
        return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)


def _outcome(one: Ready, result: Any, lm: Any) -> Outcome:
    parts = [_of_task(name, result, lm) for name in one.tasks]
    total = Outcome()
    for part in parts:
        total.questions += part.questions
        total.loglikelihoods += part.loglikelihoods
        total.cut += part.cut
        for metric, numbers in part.items.items():
            total.items.setdefault(metric, []).extend(numbers)
    for metric in parts[0].values:
        values = [part.values[metric] for part in parts if metric in part.values]
        sizes = [len(part.questions) if one.by_size else 1 for part in parts]
        if len(values) == len(parts):
            weighted = math.fsum(v * n for v, n in zip(values, sizes, strict=True))
            total.values[metric] = values[0] if len(values) == 1 else weighted / sum(sizes)
    return total


def _of_task(name: str, result: Any, lm: Any) -> Outcome:
    samples = result["samples"][name]
    first = samples[0]["filter"]
    samples = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    found = Outcome()
    for key, value in result["results"][name].items():
        metric, _, chosen = key.partition(",")
        if chosen == first and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            found.values[metric] = float(value)
    for sample in samples:
        found.questions.append((name, int(sample["doc_id"])))
        found.loglikelihoods.append(_likelihoods_of(sample["filtered_resps"]))
        found.cut += _is_cut(sample["arguments"], lm)
    for metric in found.values:
        numbers = [sample.get(metric) for sample in samples]
        if all(isinstance(number, (bool, int, float, np.number)) for number in numbers):
            found.items[metric] = [float(number) for number in numbers if number is not None]
    return found


def _likelihoods_of(answers: Sequence[Any]) -> list[float]:
    return [
        float(answer[0] if isinstance(answer, (tuple, list)) else answer)
        for answer in answers
        if isinstance(answer, (tuple, list, float))
    ]


def _is_cut(arguments: Sequence[Any], lm: Any) -> bool:
    """Whether any answer's prompt is longer than what the model reads; whole texts are not cut."""
    texts = ["".join(part) for part in arguments if len(part) > 1 and isinstance(part[1], str)]
    most = lm.max_length + 1
    # a token is one byte at least: short texts need not be read
    return any(len(t.encode()) >= most and len(lm.tok_encode(t)) > most for t in texts)


def data_folder(path: Path | None) -> Folder | None:
    """Local data, if a folder was given."""
    return None if path is None else Folder(path)
