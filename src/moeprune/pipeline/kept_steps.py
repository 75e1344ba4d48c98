"""What a recipe that was cut keeps: the steps that are done, and the checkpoint of the last one.

``<out>.recipe`` holds for every step what ``pruning_place`` holds for one, its checkpoint
(``step-1``; of the last step ``output``) until the next one is whole, and for every step that is
done ``step-1.json``: what it did, and the SHA-256 of every file that it wrote.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeprune.errors import CheckpointError, DataError, MoepruneError, OutputError
from moeprune.files import json_bytes, new_directory, parse_json, refuse_existing, sha256_file
from moeprune.models.surgery import PROVENANCE, checksums_of
from moeprune.pipeline.pruning_place import pruning_place
from moeprune.work import WorkFolder

RECIPE = "recipe"
_KEEPING = "keeping"


@contextmanager
def recipe_place(out: Path, identity: Mapping[str, Any], force: bool) -> Iterator[WorkFolder]:
    """The work folder of a recipe; it goes after an error that would only come again."""
    with pruning_place(out, identity, force, RECIPE) as folder:
        try:
            yield folder
        except MoepruneError as error:
            if not isinstance(error, CheckpointError | DataError | OutputError):
                folder.forget()  # what would end it well is another recipe
            raise


@dataclass(frozen=True)
class KeptSteps:
    """The steps of a recipe in its work folder.

    Attributes:
        folder: where.
        total: how many steps there are.
        every: whether the checkpoint of a step stays when the next one's is whole.
    """

    folder: WorkFolder
    total: int
    every: bool

    def checkpoint(self, number: int) -> Path:
        """Where a step, counted from 0, writes."""
        last = number + 1 == self.total
        return self.folder.output if last else self.folder.path / f"step-{number + 1}"

    def save(self, number: int, told: Mapping[str, Any]) -> None:
        """Note that a step is done, and what is to be known of it; the one before it may go."""
        files = _sums(self.checkpoint(number), checksums_of(self.checkpoint(number)))
        self.folder.write(_record(number), json_bytes({**told, "files": files}))
        self._drop_before(number)

    def told(self, number: int) -> dict[str, Any] | None:
        """What was noted of a step that is done; None if it is not."""
        found = self.folder.read(_record(number))
        return None if found is None else dict(parse_json(found))

    def reached(self) -> int:
        """How many steps need not be done again: the checkpoint of the last of them is whole."""
        if self.every:
            return next((n for n in range(self.total) if not self._whole(n)), self.total)
        return next((n + 1 for n in reversed(range(self.total)) if self._whole(n)), 0)

    def published(self) -> bool:
        """Whether the output has appeared, and is still what the last step wrote."""
        told = self.told(self.total - 1) if self.folder.published else None
        record = self.folder.out / PROVENANCE
        return (
            told is not None
            and record.is_file()
            and told["files"].get(PROVENANCE) == sha256_file(record)
        )

    def begin_at(self, reached: int) -> None:
        """Forget steps from ``reached`` on: their checkpoints are not there, or not whole."""
        for number in range(reached, self.total):
            self.folder.remove(_record(number))
            shutil.rmtree(self.checkpoint(number), ignore_errors=True)
        self._drop_before(reached - 1)

    def keep(self, place: Path) -> None:
        """Put the checkpoints between the steps into a new directory ``place``, all or none."""
        if self.folder.find(_KEEPING) is not None and place.exists():
            return  # before an interruption
        refuse_existing(place, False)
        self.folder.write(_KEEPING, b"")
        with new_directory(place) as work:
            for number in range(self.total - 1):
                source = self.checkpoint(number)
                shutil.copytree(source, work / source.name, copy_function=_link)

    def refuse_kept(self, place: Path) -> None:
        """Raise ``OutputError`` if ``place`` exists, and not because ``keep`` has made it."""
        if self.folder.find(_KEEPING) is None:
            refuse_existing(place, False)

    def _drop_before(self, number: int) -> None:
        if not self.every:
            for before in range(number):
                shutil.rmtree(self.checkpoint(before), ignore_errors=True)

    def _whole(self, number: int) -> bool:
        """Whether a step is done, and every byte of its checkpoint is as it was written."""
        place = self.checkpoint(number)
        if not place.is_dir() or (told := self.told(number)) is None:
            return False
        try:
            whole = bool(_sums(place) == told["files"])
        except OSError:
            whole = False
        if not whole:
            self.folder.note(f"{place} is damaged, and is made again")
        return whole


def _record(number: int) -> str:
    return f"step-{number + 1}.json"


def _sums(place: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of all files below ``place``, by name; ``known`` are not read again."""
    files = {file.relative_to(place).as_posix(): file for file in place.rglob("*")}
    return {
        name: (known or {}).get(name) or sha256_file(file)
        for name, file in sorted(files.items())
        if file.is_file()
    }


def _link(source: str, target: str) -> None:
    """Another name for a file, or a copy on another disk."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
