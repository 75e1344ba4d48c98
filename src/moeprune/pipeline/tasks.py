"""Tasks of an evaluation: those of lm-evaluation-harness, those of the papers, and our sample.

Everything that can be refused is refused when ``Tasks`` is made, before the long walk over text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moeprune.errors import DataError, MoepruneError
from moeprune.evaluation import blimp
from moeprune.evaluation.harness import doors, running
from moeprune.evaluation.harness.catalogue import Catalogue, harness_version
from moeprune.evaluation.harness.protocols import PROTOCOLS, Protocol
from moeprune.evaluation.harness.running import Asked, Outcome, Ready
from moeprune.evaluation.harness.scores import mean_score, score
from moeprune.evaluation.likelihood import BATCH_SIZE
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import load_tokenizer
from moeprune.models.runtime import load
from moeprune.pipeline.inputs import DTYPES, Compute, Progress, Source
from moeprune.pipeline.sample import measure_sample, sample_entry
from moeprune.pipeline.tokenizers import refuse_other_tokenizer

STUDENT, TEACHER = "model", "teacher"


@dataclass(frozen=True)
class TaskOptions:
    """What ``--tasks`` and its companions say.

    Attributes:
        names: tasks, groups and tags of the harness, protocols, ``blimp_sample``.
        limit: the first so many questions of every task.
        data: folder of ``NAME.jsonl``; None lets the harness find its own data.
        include: folder with task files of the harness's form.
        shots: labelled examples before each question; None takes each task's own.
        door: ``streamed`` or ``whole``.
        batch_size: rows that go through together.
    """

    names: tuple[str, ...]
    limit: int | None = None
    data: Path | None = None
    include: Path | None = None
    shots: int | None = None
    door: str = doors.DOORS[0]
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        if not self.names:
            raise MoepruneError("--tasks names no task", "for example --tasks blimp_sample")
        if self.door not in doors.DOORS:
            raise MoepruneError(f"unknown --door {self.door!r}", " or ".join(doors.DOORS))
        for name, value, least in (
            ("limit", self.limit, 1),
            ("num-fewshot", self.shots, 0),
            ("batch-size", self.batch_size, 1),
        ):
            if value is not None and value < least:
                raise MoepruneError(f"--{name} must be at least {least} (got {value})")
        fixed = [name for name in self.names if name in PROTOCOLS]
        if self.shots is not None and fixed:
            shots = PROTOCOLS[fixed[0]].shots
            raise MoepruneError(
                f"{fixed[0]} is a protocol: its shots are {shots}",
                "leave --num-fewshot out, or name its tasks one by one",
            )


class Tasks:
    """Measures tasks on a model and its teacher.

    Args:
        options: what to measure.

    Raises:
        MoepruneError: a name is unknown, a task's data are not there, the harness is missing.
    """

    def __init__(self, options: TaskOptions) -> None:
        self.options = options
        self._protocols = [PROTOCOLS[n] for n in dict.fromkeys(options.names) if n in PROTOCOLS]
        names = dict.fromkeys(n for n in options.names if n not in PROTOCOLS)
        self._sample = blimp.NAME in names
        plain = [Asked(name, options.shots) for name in names if name != blimp.NAME]
        self._ready: list[Ready] = []
        self._left_out: dict[Asked, MoepruneError] = {}
        self._version = ""
        self._entries: dict[str, dict[str, Any]] = {}
        self._outcomes: dict[Asked, dict[str, Outcome]] = {}
        wanted = [Asked(t, p.shots) for p in self._protocols for t in p.metrics]
        if plain or wanted:
            self._prepare(plain, wanted)

    def _prepare(self, plain: list[Asked], wanted: list[Asked]) -> None:
        self._version = harness_version()
        asked = list(dict.fromkeys((*plain, *wanted)))
        catalogue = Catalogue([one.task for one in asked], self.options.include)
        folder = running.data_folder(self.options.data)
        generates = self.options.door == "whole"
        self._ready, self._left_out = running.prepare(asked, catalogue, folder, generates)
        for one in plain:
            if one in self._left_out:
                raise self._left_out[one]
        if not self._ready and not self._sample:
            first = next(iter(self._left_out.values()))
            raise DataError(
                f"no task of {self._protocols[0].name} can run: {first.problem}", first.hint
            )

    def tasks(
        self, source: Source, teacher: Source | None, compute: Compute, progress: Progress
    ) -> dict[str, Any]:
        """The section ``tasks``: an entry per task, ``protocol/task`` for those of a protocol."""
        both = {STUDENT: source} | ({} if teacher is None else {TEACHER: teacher})
        checkpoints = {
            name: Checkpoint.open(one, compute.trust_remote_code) for name, one in both.items()
        }
        if TEACHER in checkpoints:
            refuse_other_tokenizer(checkpoints[STUDENT], checkpoints[TEACHER])
        tokenizer = load_tokenizer(checkpoints[STUDENT])
        if self._sample:
            self._entries[blimp.NAME] = _sample_entry(
                self.options, checkpoints, tokenizer, compute, progress
            )
        if self._ready:
            self._outcomes = self._measure(both, checkpoints, tokenizer, compute, progress)
        for one in self._ready:
            for name, metric, protocol in self._rows(one):
                outcomes = self._outcomes[one.asked]
                self._entries[name] = {
                    **_entry(outcomes, metric),
                    "shots": one.shots,
                    "protocol": protocol,
                    "door": self.options.door,
                    "limit": self.options.limit,
                    "harness": self._version,
                    "task_version": one.version,
                    "cut": outcomes[STUDENT].cut,
                    "notes": one.notes,
                }
        return self._entries

    def _rows(self, one: Ready) -> list[tuple[str, str | None, str | None]]:
        """Under which names a task's outcome stands, with which metric."""
        found: list[tuple[str, str | None, str | None]] = [
            (f"{p.name}/{one.asked.task}", p.metrics[one.asked.task], p.name)
            for p in self._protocols
            if one.asked.task in p.metrics and one.asked.shots == p.shots
        ]
        if one.asked.task in self.options.names and one.asked.shots == self.options.shots:
            found.append((one.asked.task, None, None))
        return found

    def _measure(
        self,
        sources: Mapping[str, Source],
        checkpoints: Mapping[str, Checkpoint],
        tokenizer: Any,
        compute: Compute,
        progress: Progress,
    ) -> dict[Asked, dict[str, Outcome]]:
        def tell(done: int, total: int) -> None:
            progress("tasks", done, total)

        size = self.options.batch_size
        opened: dict[str, Callable[[], Any]] = {}
        if self.options.door == "streamed":
            models = {name: compute.open(checkpoint) for name, checkpoint in checkpoints.items()}
            shared = doors.Shared(models, size, compute.workers, tell)
            opened = {name: partial(doors.streamed, shared, name, tokenizer) for name in models}
        else:

            def in_memory(source: Source) -> Any:
                return doors.whole(_whole(source, compute), tokenizer, size, tell)

            opened = {name: partial(in_memory, source) for name, source in sources.items()}
        return running.measure(self._ready, opened, self.options.limit)

    def protocols(self, *_: Any) -> dict[str, Any]:
        """The section ``protocols``: what ran, what did not and why, the mean if all ran."""
        return {protocol.name: self._protocol(protocol) for protocol in self._protocols}

    def _protocol(self, protocol: Protocol) -> dict[str, Any]:
        names = {task: f"{protocol.name}/{task}" for task in protocol.metrics}
        there = {task: name for task, name in names.items() if name in self._entries}
        errors = {task: self._left_out.get(Asked(task, protocol.shots)) for task in names}
        mean = None
        if len(there) == len(names):
            own, other = (self._items(protocol, name) for name in (STUDENT, TEACHER))
            mean = mean_score(own, other or None)
        return {
            "source": protocol.source,
            "shots": protocol.shots,
            "remark": protocol.remark,
            "tasks": list(there.values()),
            "left_out": {task: error.problem for task, error in errors.items() if error},
            "mean": mean,
        }

    def _items(self, protocol: Protocol, model: str) -> list[list[float]]:
        found = []
        for task, metric in protocol.metrics.items():
            outcomes = self._outcomes[Asked(task, protocol.shots)]
            if model in outcomes:
                found.append(outcomes[model].items[metric])
        return found


def _entry(outcomes: Mapping[str, Outcome], metric: str | None) -> dict[str, Any]:
    own, other = outcomes[STUDENT], outcomes.get(TEACHER)
    if metric is None:
        metric = "acc" if "acc" in own.values else next(iter(own.values))
    items = own.items.get(metric, [])
    values = {
        name: {"value": value, "teacher": None if other is None else other.values[name]}
        for name, value in own.values.items()
    }
    if items and math.isclose(math.fsum(items) / len(items), own.values[metric], rel_tol=1e-9):
        found = score(items, None if other is None else other.items[metric])
    else:  # no mean over questions, such as a perplexity: the harness's number alone
        empty = dict.fromkeys(("low", "high", "difference", "p", "verdict"))
        found = {"items": len(own.questions), **values[metric], **empty}
    return {"metric": metric, **found, "metrics": values}


def _sample_entry(
    options: TaskOptions,
    checkpoints: Mapping[str, Checkpoint],
    tokenizer: Any,
    compute: Compute,
    progress: Progress,
) -> dict[str, Any]:
    models = {name: compute.open(checkpoint) for name, checkpoint in checkpoints.items()}
    size = options.batch_size
    right = measure_sample(models, tokenizer, options.limit, compute, progress, size)
    return sample_entry(right[STUDENT], right.get(TEACHER), options.limit)


def _whole(source: Source, compute: Compute) -> Any:
    dtype = DTYPES.get(compute.dtype, "auto")
    return load(source, dtype, compute.device, compute.trust_remote_code)
