"""Plans that are being made, in a work folder: what was decided about each layer stands there.

A layer is kept as a plan of its own (``models.store.write_plan``): JSON, and vectors and matrices
where it has any.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeprune.core.budget import Budget
from moeprune.core.plan import LayerPlan, Plan
from moeprune.errors import PlanError
from moeprune.files import json_bytes, sha256_bytes
from moeprune.models.loading import LayeredModel
from moeprune.models.ranks import ALONE, Ranks
from moeprune.models.store import read_plan, write_plan
from moeprune.models.walk_state import Pace, WalkStates
from moeprune.work import WorkFolder

Decision = tuple[LayerPlan, list[str]]
"""What happens to a layer, and the warnings of the method that decided it."""


@dataclass
class KeptLayers:
    """What was decided with one budget.

    Attributes:
        folder: where; None keeps nothing.
        model: that is decided about.
        budget: a plan for a size tries several.
        ranks: the processes that plan together; each keeps what it has decided itself.
    """

    folder: WorkFolder | None
    model: LayeredModel
    budget: Budget
    ranks: Ranks = ALONE
    _waiting: list[Decision] = field(default_factory=list)
    _pace: Pace = field(default_factory=Pace)

    @property
    def name(self) -> str:
        """Of the folder within ``folder``."""
        return f"layers-{sha256_bytes(json_bytes(self.budget.to_json()))[:12]}"

    def save(self, layer: LayerPlan, warnings: list[str]) -> None:
        """Keep a decision, and what it made the method say, now."""
        if self.folder is None:
            return
        plan = Plan({layer.layer: layer}, "", {}, {}, {}, {}, 0, tuple(warnings))
        where = self.folder.path
        with tempfile.TemporaryDirectory(prefix=".plan.", suffix=".partial", dir=where) as part:
            write_plan(plan, Path(part) / _file(layer.layer))
            files = sorted(p for p in Path(part).rglob("*") if p.is_file())
            # the plan itself last: where it stands, all that it needs does
            for file in sorted(files, key=lambda p: p.suffix == ".json"):
                name = f"{self.name}/{file.relative_to(part)}"
                (where / name).parent.mkdir(parents=True, exist_ok=True)
                self.folder.keep(name, file)

    def save_when_due(self, layer: LayerPlan, warnings: list[str]) -> None:
        """As ``save``, but decisions that take no time wait until there are several."""
        self._waiting.append((layer, warnings))
        if self._pace.due():
            began = self._pace.now()
            for one, said in self._waiting:
                self.save(one, said)
            self._waiting.clear()
            self._pace.written(began)

    def load(self, index: int) -> Decision | None:
        """What was decided about a layer."""
        if self.folder is None:
            return None
        stem = f"{self.name}/{_file(index).removesuffix('.json')}"
        file = self.folder.find(f"{stem}.json")
        needed = [n for n in self.folder.names() if n.startswith((f"{stem}.s", f"{stem}.w"))]
        if file is None:
            return None
        try:
            plan = None if None in map(self.folder.find, needed) else read_plan(file)
        except PlanError:  # what it needs was damaged, and is gone
            plan = None
        if plan is None:
            self.folder.remove(f"{stem}.json")
            return None
        return plan.layers[index], [*plan.warnings]

    def found(self, indices: Sequence[int]) -> dict[int, Decision]:
        """What was decided about these layers, which are this process's. All call it.

        Says of how many layers of all that is, unless of none or all.
        """
        if self.folder is None:
            return {}
        known = {index: entry for index in indices if (entry := self.load(index)) is not None}
        done, total = map(sum, zip(*self.ranks.gather((len(known), len(indices))), strict=True))
        if 0 < done < total:
            self.folder.note(f"{done} of {total} layers were planned before")
        return known

    def resume(self) -> tuple[WalkStates | None, dict[int, LayerPlan], list[str]]:
        """How far a sequential method came: its walk, what it decided, and what it said."""
        if self.folder is None:
            return None, {}, []
        found: dict[int, Decision] = {}

        def has(index: int) -> bool:
            entry = self.load(index) if index in self.model.sites else None
            if entry is not None:
                found[index] = entry
            return entry is not None or index not in self.model.sites

        states = WalkStates(self.folder, self.model, f"{self.name}/walk", ranks=self.ranks)
        states.resume(has, "planning")
        kept = {i: layer for i, (layer, _) in found.items() if i <= states.reached}
        return states, kept, [text for i in kept for text in found[i][1]]


def _file(layer: int) -> str:
    return f"layer-{layer:05d}.json"
