"""Data of the harness's tasks from a folder of JSONL files, instead of from the hub.

``NAME.jsonl`` holds what is measured, with the columns of the data set that the harness's task
reads. ``NAME_<split>.jsonl`` (``arc_easy_train.jsonl``, ``mmlu_dev.jsonl``) holds what few-shot
examples are drawn from; without it they come from the measured file, but for the question itself.
Of a group's file (``mmlu.jsonl``) each task takes the rows that name it, in whichever column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.errors import DataError
from moeprune.evaluation.harness.catalogue import Leaf

Row = dict[str, Any]
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass
class Folder:
    """Files of tasks; each is read once.

    Args:
        path: the folder.
    """

    path: Path
    _read: dict[Path, list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise DataError(
                f"no such folder of task data: {self.path}", "--task-data DIR with NAME.jsonl files"
            )

    def rows(self, file: Path) -> list[Row]:
        """A file's objects.

        Raises:
            DataError: not UTF-8, or a line is no JSON object.
        """
        if file not in self._read:
            self._read[file] = list(_objects(file))
        return self._read[file]

    def overrides(self, leaf: Leaf, asked: str) -> dict[str, Any]:
        """What to change in a task's configuration, so that it reads from here.

        Args:
            leaf: the task.
            asked: the name that led to it; a group's file serves its tasks.

        Raises:
            DataError: there is no file for it, or nothing in it.
        """
        split = leaf.evaluated
        if split is None or "class" in leaf.config:
            raise DataError(
                f"task {leaf.name!r} brings its own way of reading data", "leave it out"
            )
        rows = self._of(leaf, asked, "")
        if not rows:
            names = " or ".join(dict.fromkeys((f"{asked}.jsonl", f"{leaf.name}.jsonl")))
            source = leaf.config.get("dataset_path")
            raise DataError(
                f"no data of task {leaf.name!r} in {self.path}",
                f"put {names} there: one JSON object a line, with the columns of {source}",
            )
        splits: dict[str, list[Row]] = {str(split): rows}
        found: dict[str, Any] = dict.fromkeys(_SPLITS)
        found |= {key: split for key in _SPLITS[1:3] if leaf.config.get(key) == split}
        for key in ("training_split", "fewshot_split"):
            name = str(leaf.config.get(key) or "")
            shots = self._of(leaf, asked, f"_{name}") if name and name != split else []
            if shots:
                splits[name] = shots
                found[key] = name
        return {
            **found,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": None,
            "custom_dataset": _reader(splits),
        }

    def has_shots(self, leaf: Leaf, asked: str) -> bool:
        """Whether few-shot examples come from a file of their own."""
        names = {leaf.config.get(key) for key in ("training_split", "fewshot_split")}
        return any(self._of(leaf, asked, f"_{name}") for name in names if name)

    def _of(self, leaf: Leaf, asked: str, suffix: str) -> list[Row]:
        own = self.path / f"{leaf.name}{suffix}.jsonl"
        if own.is_file():
            return self.rows(own)
        shared = self.path / f"{asked}{suffix}.jsonl"
        if asked == leaf.name or not shared.is_file():
            return []
        part = str(leaf.overrides.get("dataset_name") or leaf.config.get("dataset_name"))
        return [row for row in self.rows(shared) if part in _texts(row)]


def _texts(row: Row) -> Iterable[str]:
    return [value for value in row.values() if isinstance(value, str)]


def _objects(file: Path) -> Iterable[Row]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text", "convert it to UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not JSON", "one object a line") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}: not a JSON object", "one object a line")
        yield row


def _reader(splits: dict[str, list[Row]]) -> Callable[..., dict[str, Any]]:
    def read(**_: Any) -> dict[str, Any]:
        import datasets

        return {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}

    return read


def no_data(leaf: Leaf, asked: str, reason: str) -> DataError:
    """What to say where the harness could not get a task's data."""
    source = leaf.config.get("dataset_path")
    return DataError(
        f"no data of task {leaf.name!r} ({source}) on this machine: {reason}",
        f"give --task-data DIR with {asked}.jsonl in it, one JSON object a line, columns as there",
    )
