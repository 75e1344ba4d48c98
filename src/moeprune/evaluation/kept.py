"""What an evaluation keeps until its end: states of its walks, and the sums of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moeprune.evaluation.perplexity import Sums
from moeprune.files import json_bytes, parse_json
from moeprune.models.loading import LayeredModel
from moeprune.models.walk_state import Pace, WalkStates
from moeprune.work import WorkFolder

Scores = dict[str, Sums]
"""Of one batch, by name of the model."""


@dataclass
class KeptEvaluation:
    """What is kept in a work folder.

    Attributes:
        folder: where.
    """

    folder: WorkFolder
    _waiting: dict[int, Scores] = field(default_factory=dict)
    _pace: Pace = field(default_factory=Pace)

    def walk(self, name: str, model: LayeredModel) -> WalkStates:
        """States of the walk through a model; with where it goes on."""
        states = WalkStates(self.folder, model, f"walk-{name}")
        newest = max(states.layers(), default=-1)
        states.resume(lambda index: index <= newest, f"the walk through the {name}", outputs=True)
        return states

    def save(
        self,
        states: WalkStates,
        index: int,
        outputs: Sequence[object],
        spent: float,
        written: Callable[[int], None] = lambda batch: None,
    ) -> None:
        """Keep a layer of a walk, and how many seconds it took; the last one in any case.

        ``written`` is as in ``WalkStates.save``.
        """
        states.save(index, outputs, index + 1 == len(states.model.layers), written)
        if states.layers()[-1:] == [index]:
            self.folder.write(f"{states.name}/seconds.json", json_bytes(spent))

    def seconds(self, states: WalkStates) -> float:
        """How long the part of a walk took that is done."""
        known = self.folder.read(f"{states.name}/seconds.json")
        return 0.0 if known is None or states.start is None else float(parse_json(known))

    def scores(self) -> dict[int, Scores]:
        """The batches that were scored."""
        found: dict[int, Scores] = {}
        for name in self.folder.names():
            file = self.folder.find(name) if name.startswith("sums/") else None
            for key, sums_5N in ({} if file is None else load_file(file)).items():
                index, _, model = key.partition(".")
                found.setdefault(int(index), {})[model] = Sums(*sums_5N.numpy())
        return found

    def add(self, index: int, scores: Scores) -> None:
        """Keep the sums of a batch; of several together where batches take no time."""
        self._waiting[index] = scores
        if not self._pace.due():
            return
        began = self._pace.now()
        tensors = {
            f"{i}.{model}": torch.from_numpy(np.stack(astuple(sums)))
            for i, by_model in self._waiting.items()
            for model, sums in by_model.items()
        }
        with self.folder.new_file(f"sums/{min(self._waiting):07d}.safetensors") as part:
            save_file(tensors, part)
        self._waiting.clear()
        self._pace.written(began)
