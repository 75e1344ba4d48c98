"""The plan: what happens to every layer, with the scores that led there, as readable JSON.

Vectors (novices, mask scales, lists of neurons) stand in a safetensors file beside it; a plan never
holds a mask or a weight. Matrices that no list can describe stand in files of their own, one per
layer. ``Plan.to_json`` and ``Plan.from_json`` are the format's only definition; it is described in
docs/formats.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from moeprune.core.edits import MaskEdit, StoredWeights
from moeprune.core.layer_plan import LayerPlan
from moeprune.core.plan_json import get, ids, layer_from_json, layer_to_json, layer_vectors, texts
from moeprune.core.shapes import LayerShape
from moeprune.errors import PlanError
from moeprune.files import json_bytes

__all__ = ["FORMAT", "LayerPlan", "MaskEdit", "Plan"]

FORMAT = "moeprune.plan/1"

_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Plan:
    """A decision for a whole model, with where it came from.

    Attributes:
        layers: edits by layer index.
        method: name of the method.
        options: all its options, defaults included.
        budget: what was asked for.
        model: hash and facts of the model that it was made for.
        statistics: hash and facts of the calibration; empty for a data-free method.
        seed: the seed of whatever was random.
        warnings: what the method wants the user to know.
        versions: of moeprune, torch, transformers, numpy.
        drop_layers: decoder layers, dense or not, that go as a whole, ascending.
    """

    layers: Mapping[int, LayerPlan]
    method: str
    options: Mapping[str, Any]
    budget: Mapping[str, Any]
    model: Mapping[str, Any]
    statistics: Mapping[str, Any]
    seed: int
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    drop_layers: tuple[int, ...] = ()

    def check(self, shapes: Mapping[int, LayerShape]) -> None:
        """Raise ``PlanError`` unless every layer's edit fits the model's layers."""
        unknown = sorted(set(self.layers) - set(shapes))
        if unknown:
            raise PlanError(
                f"plan names layer {unknown[0]}, which is not an MoE layer of the model"
            )
        for index, layer in self.layers.items():
            layer.check(shapes[index])

    def vectors(self) -> dict[str, Tensor]:
        """What goes into the safetensors file, by name."""
        return {
            f"layers.{index}.{name}": tensor.contiguous()
            for index, layer in sorted(self.layers.items())
            for name, tensor in layer_vectors(layer).items()
        }

    def to_json(self, vectors: Mapping[str, Any] | None) -> dict[str, Any]:
        """The plan as JSON; ``vectors`` names the safetensors file and its hash."""
        return {
            "format": FORMAT,
            "method": self.method,
            "options": dict(self.options),
            "budget": dict(self.budget),
            "seed": self.seed,
            "model": dict(self.model),
            "statistics": dict(self.statistics),
            "versions": dict(self.versions),
            "vectors": None if vectors is None else dict(vectors),
            "warnings": list(self.warnings),
            **({"drop_layers": list(self.drop_layers)} if self.drop_layers else {}),
            "layers": {str(i): layer_to_json(layer) for i, layer in sorted(self.layers.items())},
        }

    @classmethod
    def from_json(
        cls,
        data: Any,
        vectors: Mapping[str, Tensor],
        stored: Mapping[int, StoredWeights] = MappingProxyType({}),
    ) -> Plan:
        """Read a plan, possibly edited by hand; ``stored`` are the matrices that it brings.

        Raises:
            PlanError: a field is missing or of the wrong kind; the message names it.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"not a plan: 'format' is not {FORMAT!r}", "make one: moeprune plan")
        layers = get(data, "layers", dict, "plan")
        parsed = {}
        for key, entry in layers.items():
            if not _INDEX.fullmatch(str(key)) or not isinstance(entry, dict):
                raise PlanError(f"plan: layers.{key} is not a layer index with an object")
            parsed[int(key)] = layer_from_json(int(key), entry, vectors, stored.get(int(key)))
        plan = cls(
            layers=parsed,
            method=get(data, "method", str, "plan"),
            options=get(data, "options", dict, "plan"),
            budget=get(data, "budget", dict, "plan"),
            model=get(data, "model", dict, "plan"),
            statistics=get(data, "statistics", dict, "plan"),
            seed=get(data, "seed", int, "plan"),
            warnings=texts(data, "warnings", "plan"),
            versions=get(data, "versions", dict, "plan"),
            drop_layers=ids({"drop_layers": []} | data, "drop_layers", "plan", "layer"),
        )
        try:
            json_bytes(data)
        except (
            ValueError,
            RecursionError,
        ) as error:  # infinite numbers and half characters: Python reads, JSON not
            raise PlanError(f"plan: holds what JSON cannot: {error}") from error
        return plan
