"""The statistics that a comparison plans from: one pass over every text, for all methods."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moeprune.core.accumulators import LIGHT
from moeprune.errors import MoepruneError
from moeprune.models.loading import LayeredModel
from moeprune.models.store import StatisticsStore, merge_statistics
from moeprune.pipeline.arena.asking import Calibration, Entry
from moeprune.pipeline.calibration import STAGE, calibrate
from moeprune.pipeline.inputs import Compute, Progress, Source, Text
from moeprune.work import drop_finished

GRAM = ("input-gram", "hidden-gram")
MOST_GRAM_BYTES = 1 << 30


def reads_statistics(entry: Entry) -> bool:
    """Whether a method plans from saved statistics."""
    return bool(entry.method.needs) and not entry.method.sequential


def gram_bytes(model: LayeredModel, names: Iterable[str]) -> int:
    """Bytes of the Gram matrices among ``names``, of all layers."""
    wanted, total = set(names), 0
    for site in model.sites.values():
        shape = site.shape
        if "input-gram" in wanted:
            total += 4 * shape.experts * shape.hidden**2
        if "hidden-gram" in wanted:
            total += 4 * shape.experts * shape.intermediate**2
        if "novice-gram" in wanted:
            total += 4 * shape.experts * (shape.hidden + 1) * (2 * shape.hidden + 1)
    return total


def refuse_gram(entry: Entry, model: LayeredModel) -> None:
    """Raise if the Gram matrices that a method asks for are too large to be stored."""
    size = gram_bytes(model, entry.method.needs) if reads_statistics(entry) else 0
    if size > MOST_GRAM_BYTES:
        raise MoepruneError(
            f"{entry.label} needs {size / 2**30:.1f} GiB of Gram matrices, which are not stored",
            f"at most {MOST_GRAM_BYTES / 2**30:.0f} GiB are",
        )


def union(entries: Sequence[Entry], model: LayeredModel) -> list[str]:
    """The accumulators that one pass collects, such that every method can plan from it."""
    found = {*LIGHT}
    for entry in entries:
        if reads_statistics(entry) and gram_bytes(model, entry.method.needs) <= MOST_GRAM_BYTES:
            found |= {*entry.method.needs}
    return sorted(found)


class Scoring:
    """Statistics by calibration text; each is made when it is first asked for.

    Args:
        source: the model.
        folder: where they are kept.
        fingerprint: of the model.
        collect: what the pass collects.
        compute, progress: as in the stages.
    """

    def __init__(
        self,
        source: Source,
        folder: Path,
        fingerprint: str,
        collect: Sequence[str],
        compute: Compute,
        progress: Progress,
    ) -> None:
        self._source, self._folder, self._fingerprint = source, folder, fingerprint
        self.collect, self._compute, self._progress = list(collect), compute, progress
        self.facts: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0

    def path(self, calibration: Calibration) -> Path:
        """The statistics of a text; of several domains, the exact sum of theirs."""
        path = self._folder / calibration.name
        start = time.perf_counter()
        if self._missing(path):
            if len(calibration.parts) < 2:
                self._walk(path, calibration.text)
            else:
                parts = [self._part(name, text) for name, text in calibration.parts]
                merge_statistics(parts, path, force=path.exists())
        spent = time.perf_counter() - start
        self.seconds += spent
        if calibration.name not in self.facts:
            data = StatisticsStore.open(path).manifest["data"]
            self.facts[calibration.name] = {
                **{key: data[key] for key in ("hash", "tokens", "sequences", "domains")},
                "merged": len(calibration.parts) > 1,
                "seconds": round(spent, 2),
            }
        return path

    def _part(self, name: str, text: Text) -> Path:
        path = self._folder / "parts" / name
        if self._missing(path, exactly=True):  # sums of the same sums only can be added
            self._walk(path, text)
        return path

    def _walk(self, path: Path, text: Text) -> None:
        shutil.rmtree(path, ignore_errors=True)
        # an interrupted walk is gone on with, unless other sums are wanted now
        calibrate(self._source, path, text, self.collect, self._compute, True, self._progress)

    def _missing(self, path: Path, exactly: bool = False) -> bool:
        """Whether there is nothing, something damaged, or statistics that lack a sum.

        With ``exactly`` those that have others as well are of no use either.
        """
        drop_finished(path, STAGE)
        try:
            store = StatisticsStore.open(path)
        except MoepruneError:
            return True
        if store.manifest["model"]["fingerprint"] != self._fingerprint:
            return True
        wanted, found = {*self.collect}, {*store.manifest["collect"]}
        return wanted != found if exactly else not wanted <= found
