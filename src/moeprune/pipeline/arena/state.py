"""The directory of a comparison: what is finished stays finished, whatever happens in between.

``compare.json`` is written anew, under a temporary name, after every step; plans and statistics
stand beside it. A second run in the same directory goes on where the first one stopped, and is
refused if anything that decides numbers has changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeprune.errors import OutputError
from moeprune.files import (
    is_partial,
    json_bytes,
    load_json,
    locked,
    refuse_existing,
    remove_partial,
    write_together,
)

FORMAT = "moeprune.compare/1"
RESULT = "compare.json"
PAGE = "compare.html"
PICTURE = "pareto.svg"
PLANS, STATISTICS, CHECKPOINTS, WORK = "plans", "statistics", "checkpoints", ".work"
_MAX = 1 << 28
_OTHER = "choose another --out, or start afresh with --force"


@dataclass
class Run:
    """A comparison on disk.

    Attributes:
        path: its directory.
        identity: what must not change between two runs in it, by name.
        cells: by key, what is known of every cell that was begun.
        facts: everything else, as it stands in the file.
    """

    path: Path
    identity: dict[str, Any]
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """For checkpoints that are deleted again."""
        return self.path / WORK

    def plan_file(self, slug: str) -> Path:
        """Where a cell's plan stands."""
        return self.path / PLANS / f"{slug}.json"

    def save(self, key: str | None = None, cell: dict[str, Any] | None = None) -> None:
        """Write what is known, with ``cell`` among it; on the disk when this returns."""
        if key is not None and cell is not None:
            self.cells[key] = cell
            order = {name: place for place, name in enumerate(self.facts.get("order", ()))}
            last = len(order)
            if order.get(key, last) < max(order.get(name, last) for name in self.cells):
                ranked = sorted(self.cells, key=lambda name: order.get(name, last))
                self.cells = {name: self.cells[name] for name in ranked}
        write_together({self.path / RESULT: json_bytes(self.result())}, force=True)

    def result(self) -> dict[str, Any]:
        """What stands in the file."""
        return {"format": FORMAT, **self.facts, "identity": self.identity, "cells": self.cells}


@contextmanager
def open_run(out: Path, identity: Mapping[str, Any], force: bool = False) -> Iterator[Run]:
    """A new comparison in ``out``, or the one that stands there.

    Raises:
        OutputError: ``out`` holds something else, another process works in it, or it was made from
            other inputs; the message says which.
    """
    file = out / RESULT
    if not out.exists():
        refuse_existing(out, force=False)
    elif out.is_dir() and not _foreign(out):
        pass  # empty, or a beginning that was cut
    elif force:
        refuse_existing(out, force)
    elif file.is_file():
        _read(file, identity)  # before a lock is left in what is not ours
    else:
        raise OutputError(f"output exists, and is no comparison: {out}", "choose another --out")
    with locked(out):
        if force:
            _clear(out, Run(out, dict(identity)))
        found = _read(file, identity) if file.is_file() else Run(out, dict(identity))
        shutil.rmtree(found.work, ignore_errors=True)
        for folder in filter(Path.is_dir, (out, out / PLANS)):
            remove_partial(folder)
        try:
            yield found
        finally:
            shutil.rmtree(found.work, ignore_errors=True)


def _foreign(out: Path) -> bool:
    """Whether a directory holds more than an interrupted beginning of ours.

    The result stands there before any statistics; without it they are of nobody knows what.
    """
    return any(
        entry.name not in (WORK, ".lock") and not is_partial(entry) for entry in out.iterdir()
    )


def _clear(out: Path, new: Run) -> None:
    """Take away what a comparison writes, and nothing else; a result becomes that of a new one.

    It comes first: whoever is killed meanwhile does not go on with cells whose plans are gone.
    """
    if (out / RESULT).is_file():
        new.save()
    for name in (PLANS, STATISTICS, CHECKPOINTS, WORK):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (PAGE, PICTURE):
        (out / name).unlink(missing_ok=True)


def _read(file: Path, identity: Mapping[str, Any]) -> Run:
    try:
        data = load_json(file, _MAX)
    except ValueError as error:
        raise OutputError(f"{file} is damaged: {error}", _OTHER) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise OutputError(f"{file} is not of format {FORMAT}", _OTHER)
    before, cells = data.pop("identity", None), data.pop("cells", None)
    if not isinstance(before, dict) or not isinstance(cells, dict):
        raise OutputError(f"{file} is damaged: it says nothing of its inputs", _OTHER)
    refuse_difference(file.parent, before, identity)
    data.pop("format")
    return Run(file.parent, {**before, **identity}, cells, data)


def refuse_difference(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ``OutputError`` unless all that both name is the same."""
    for name in before:
        if name in now and before[name] != now[name]:
            raise OutputError(
                f"{out} was made with other inputs: {name} was {before[name]}, now {now[name]}",
                _OTHER,
            )
