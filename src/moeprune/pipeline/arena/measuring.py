"""Checkpoints are measured in groups, each together with the original.

The original is walked once per group. Keeping its log-probabilities instead would take vocabulary
times tokens times 4 bytes (25 GB for 150 000 words and 40 000 tokens); a group of twelve makes its
walk one thirteenth of all walking, and holds twelve checkpoints on disk.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeprune.errors import MoepruneError
from moeprune.evaluation.perplexity import Evaluation
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import Domain
from moeprune.models.loading import LayeredModel
from moeprune.pipeline.evaluating import measure as measure_models
from moeprune.pipeline.inputs import Compute, Progress, Source

ORIGINAL = "original"
MOST = 12
_STATES = 4  # hidden states that a parked batch may hold: its own, the residual, masks, positions
_SHARE = 0.25  # of the free memory; and half of the free disk


@dataclass(frozen=True)
class Measured:
    """What came of a group.

    Attributes:
        found: evaluations by name, the original's under ``original``.
        layers: of the checkpoints that could be opened.
        wrong: why some could not be measured.
        seconds: for all of them.
    """

    found: dict[str, Evaluation]
    layers: dict[str, int]
    wrong: dict[str, str]
    seconds: float


@dataclass
class Measuring:
    """Measures checkpoints against the original.

    Attributes:
        source: the original.
        heldout: what is read.
        compute, progress: as in the stages.
    """

    source: Source
    heldout: Sequence[Domain]
    compute: Compute
    progress: Progress

    def group_size(self, model: LayeredModel, folder: Path) -> int:
        """How many checkpoints are measured together: what memory and disk allow, at most 12."""
        tokens = sum(domain.ids_NL.numel() for domain in self.heldout)
        hidden = next(iter(model.sites.values())).shape.hidden
        states = tokens * hidden * 4 * _STATES
        by_memory = int(_free_memory() * _SHARE / states)
        by_disk = int(shutil.disk_usage(folder).free / 2 / max(1, model.checkpoint.nbytes))
        return max(1, min(MOST, by_memory - 1, by_disk))

    def measure(self, folders: Mapping[str, Path]) -> Measured:
        """Measure checkpoints by name.

        If a group fails, its members are measured one by one to find the culprit.
        """
        start = time.perf_counter()
        found, layers, wrong = self._measure(folders)
        return Measured(found, layers, wrong, time.perf_counter() - start)

    def _measure(
        self, folders: Mapping[str, Path]
    ) -> tuple[dict[str, Evaluation], dict[str, int], dict[str, str]]:
        models, wrong = self._open(folders)
        layers = {name: len(model.layers) for name, model in models.items()}
        try:
            return self._run(models), layers, wrong
        except (MoepruneError, RuntimeError, ValueError) as error:
            if len(folders) < 2:
                wrong |= dict.fromkeys(folders, said(error))
                return {}, layers, wrong
        found: dict[str, Evaluation] = {}
        for name, folder in folders.items():
            if name in models:
                one, _, why = self._measure({name: folder})
                found, wrong = {**found, **one}, {**wrong, **why}
        return found, layers, wrong

    def original(self) -> Evaluation:
        """The original alone."""
        checkpoint = Checkpoint.open(self.source, self.compute.trust_remote_code)
        return self._run({ORIGINAL: self.compute.open(checkpoint)})[ORIGINAL]

    def _open(self, folders: Mapping[str, Path]) -> tuple[dict[str, LayeredModel], dict[str, str]]:
        trust = self.compute.trust_remote_code
        models = {ORIGINAL: self.compute.open(Checkpoint.open(self.source, trust))}
        wrong = {}
        for name, folder in folders.items():
            try:
                models[name] = self.compute.open(Checkpoint.open(folder, trust))
            except (MoepruneError, RuntimeError, ValueError) as error:
                wrong[name] = said(error)
        return models, wrong

    def _run(self, models: Mapping[str, LayeredModel]) -> dict[str, Evaluation]:
        return measure_models(models, self.heldout, ORIGINAL, self.compute, self.progress)


def said(error: Exception) -> str:
    """What went wrong, in one line; errors that are not ours say what they are."""
    if isinstance(error, MoepruneError):
        return error.problem
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _free_memory() -> int:
    """Bytes that can be used without swapping; 4 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return 1 << 32
