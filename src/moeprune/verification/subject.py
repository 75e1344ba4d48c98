"""A checkpoint as it is found, however broken: what cannot be read makes rules skip, not fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moeprune.errors import UnsupportedModelError
from moeprune.models import quirks
from moeprune.models.checkpoint import INDEX, TensorInfo
from moeprune.models.loading import LayeredModel
from moeprune.models.scan import FLOAT_DTYPES, Scan, scan
from moeprune.verification.finding import Finding, Skip
from moeprune.verification.shards import AsFound, Shards, read_json

if TYPE_CHECKING:
    from moeprune.verification.reference import Reference
    from moeprune.verification.shapes import Fit

CONFIG = "config.json"
LAYER_COUNT_KEYS = ("num_hidden_layers", "num_layers", "n_layers")
COMPANIONS = ("_scale_inv", "_scale", "_scales", "_blocks", "_packed", "_zero_point", "_g_idx")
"""Endings of tensors that stand beside a quantised weight, or for it."""
DECODED = ("fp8", "mxfp4")
"""Quantisations whose tensors have shapes from which those of the weights can be told."""

_EXPERT = re.compile(r"(?P<head>(?:.*\.)?experts\.)(?P<expert>\d+)\.(?P<tail>.+)")
_NOVICE, _OFFSET = "approx_value", "output_offset"
ADDED = (".approx_value", ".novice_value", ".output_offset")
"""Endings of tensors that no original has: constants in place of experts, or in their outputs."""
_RULED_OUT = -1e4  # no sum of scores reaches it; half precision cannot say much less


@dataclass(frozen=True)
class Group:
    """Experts that are stored one by one, of one MoE block.

    Attributes:
        prefix: their names up to and including ``experts.``.
        layer: the decoder layer in the prefix; None if there is no number in it.
        matrices: by id, the names of an expert's tensors by what follows the id.
        novices: by id, the names of constants.
        twice: names that stand for an expert that another name stands for already.
        offsets: by id, the names of constants in outputs.
    """

    prefix: str
    layer: int | None
    matrices: dict[int, dict[str, str]] = field(default_factory=dict)
    novices: dict[int, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    offsets: dict[int, str] = field(default_factory=dict)


def number(part: Mapping[str, Any], key: str) -> int | None:
    """An integer of a configuration; None for whatever else stands there."""
    value = part.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class Subject:
    """What the rules look at.

    Args:
        path: the directory.
        values: whether values may be read; without, only headers are.
        progress: told (what, bytes done, bytes in all).

    Attributes:
        reference: the original and what was done to it; set where one was given.
        fit: what ``shapes.fit`` found, once it was asked.
        comparison: what rules measured against the original.
    """

    def __init__(
        self,
        path: Path,
        values: bool = True,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.path = path
        self.values = values
        self.progress = progress
        self.reference: Reference | None = None
        self.fit: Fit | Exception | None = None
        self.comparison: dict[str, Any] = {}

    # --- files

    @cached_property
    def shards(self) -> Shards:
        """The weight files."""
        return Shards(self.path)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors that can be found, by name."""
        if not self.shards.tensors:
            raise Skip("no tensor can be read")
        return self.shards.tensors

    def require_all(self) -> None:
        """Raise ``Skip`` where a shard is missing: what is not there would be found everywhere."""
        lost = [*self.shards.damaged, *self.shards.absent]
        if lost:
            raise Skip(f"{lost[0]} is missing or damaged")

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Shards by tensor, as the index says; empty without an index."""
        index = read_json(self.path / INDEX)
        listed = index.get("weight_map") if isinstance(index, dict) else None
        pairs = listed.items() if isinstance(listed, dict) else ()
        return {str(tensor): str(file) for tensor, file in pairs}

    def at(self, rule: str, severity: str, tensor: str, problem: str, remedy: str) -> Finding:
        """A finding about a tensor, in the file in which it is, or should be by the index."""
        info = self.shards.tensors.get(tensor)
        file = self.shards.names[0] if self.shards.names else ""
        if info is not None:
            file = info.file.name
        elif self.weight_map:
            file = self.weight_map.get(tensor, INDEX)
        return Finding(rule, severity, file, tensor, problem, remedy)

    # --- configuration

    @cached_property
    def _config(self) -> Any:
        return read_json(self.path / CONFIG)

    @property
    def config(self) -> dict[str, Any]:
        """The raw config.json."""
        if not isinstance(self._config, dict):
            raise Skip("config.json cannot be read")
        return self._config

    @property
    def text(self) -> dict[str, Any]:
        """The language model's part of the configuration."""
        part = self.config.get("text_config")
        return part if isinstance(part, dict) else self.config

    def entry(self, key: str) -> Any:
        """A value of the language model's part, or of the whole."""
        return self.text.get(key, self.config.get(key))

    @property
    def layer_count(self) -> int | None:
        """Decoder layers."""
        return next((n for key in LAYER_COUNT_KEYS if (n := number(self.text, key))), None)

    def _first(self, keys: tuple[str, ...]) -> tuple[str, int] | None:
        parts = (self.text, self.text.get("ffn_config"), self.config)
        for part in [part for part in parts if isinstance(part, dict)]:
            for key in keys:
                if (value := number(part, key)) is not None:
                    return key, value
        return None

    @property
    def top_k(self) -> tuple[str, int]:
        """The key that holds K, and K."""
        found = self._first(quirks.TOP_K_KEYS)
        if found is None:
            raise Skip("config.json names no number of experts per token")
        return found

    @property
    def experts_key(self) -> str:
        """The key that holds E."""
        found = self._first(quirks.EXPERT_COUNT_KEYS)
        if found is None:
            raise Skip("config.json names no number of experts")
        return found[0]

    def experts(self, layer: int | None = None) -> int:
        """E of a layer by the configuration, or of all layers that have no entry of their own."""
        if layer is not None and str(layer) in self.uneven:
            return self.uneven[str(layer)]
        found = self._first(quirks.EXPERT_COUNT_KEYS)
        if found is None:
            raise Skip("config.json names no number of experts")
        return found[1]

    @property
    def uneven(self) -> dict[str, int]:
        """E of layers that have an entry of their own, by index as it stands there."""
        own, parts = self.entry("experts_per_layer"), self.entry("per_layer_config")
        found = {
            str(layer): value
            for layer, part in (parts.items() if isinstance(parts, dict) else ())
            for key in quirks.EXPERT_COUNT_KEYS
            if isinstance(part, dict) and (value := number(part, key)) is not None
        }
        for layer in own if isinstance(own, dict) else ():
            if (value := number(own, layer)) is not None:
                found[str(layer)] = value
        return found

    @property
    def novices(self) -> dict[str, Any]:
        """Ids of experts that are constants, by layer, as they stand there."""
        table = self.entry("approximate_experts")
        return table if isinstance(table, dict) else {}

    def novices_of(self, layer: int | None) -> list[int]:
        """Ids of a layer's experts that are constants by the configuration."""
        ids = self.novices.get(str(layer))
        return [e for e in ids if isinstance(e, int)] if isinstance(ids, list) else []

    @property
    def served(self) -> dict[str, Any]:
        """Who answers for each expert, by layer, as it stands there."""
        table = self.entry("experts_served_by")
        return table if isinstance(table, dict) else {}

    def absent_of(self, layer: int | None) -> set[int]:
        """Ids of a layer's experts that need no matrices: constants, and those answered for."""
        table = self.served.get(str(layer))
        known = isinstance(table, list) and all(type(e) is int for e in table)
        ids: list[int] = table if isinstance(table, list) and known else []
        return {*self.novices_of(layer), *(set(range(len(ids))) - set(ids))}

    def layer_of(self, key: str) -> int:
        """The decoder layer that a tensor of the model belongs to, by its name."""
        layer = layer_in_name(key)
        return -1 if layer is None else layer

    # --- experts by name

    @cached_property
    def groups(self) -> list[Group]:
        """Experts that are stored one by one, by block."""
        found: dict[str, Group] = {}
        for key in self.tensors:
            match = _EXPERT.fullmatch(key)
            if match is None:
                continue
            group = found.setdefault(
                match["head"], Group(match["head"], layer_in_name(match["head"]))
            )
            expert, tail = int(match["expert"]), match["tail"]
            if expert in self._identities:
                continue
            if tail == _NOVICE:
                group.novices[expert] = key
            elif tail == _OFFSET:
                group.offsets[expert] = key
            elif tail in group.matrices.setdefault(expert, {}):
                group.twice.append(key)
            else:
                group.matrices[expert][tail] = key
        return list(found.values())

    @property
    def _identities(self) -> range:
        """Ids of experts that return their input; transformers stores some of their matrices."""
        count = number(self.text, "zero_expert_num") if isinstance(self._config, dict) else None
        return range(self.experts(), self.experts() + count) if count else range(0)

    def attached(self, key: str) -> bool:
        """Whether a tensor belongs to a prediction head behind the decoder layers."""
        layer, count = layer_in_name(key), self.layer_count
        behind = layer is not None and count is not None and layer >= count
        return behind or re.search(r"(^|\.)(mtp|nextn)\w*\.", key) is not None

    @property
    def decoder_groups(self) -> Iterator[Group]:
        """``groups`` without those of attached heads."""
        return (group for group in self.groups if not self.attached(group.prefix))

    # --- the model

    @cached_property
    def _model(self) -> LayeredModel | Exception:
        try:
            return LayeredModel(AsFound(self.path))
        except Exception as error:  # whatever a broken configuration does to transformers
            return error

    @property
    def model(self) -> LayeredModel:
        """The model on the meta device; its weights are never read."""
        _ = self.config, self.tensors
        if self.quantised not in (None, *DECODED):
            raise Skip(f"weights are quantised as {self.quantised}: shapes say too little")
        if isinstance(self._model, Exception):
            raise Skip(f"the model cannot be built: {first_line(self._model)}")
        return self._model

    @property
    def model_error(self) -> Exception | None:
        """Why the model cannot be built."""
        return self._model if isinstance(self._model, Exception) else None

    def pads(self, layer: int | None) -> set[int]:
        """Ids of a layer's experts that its router never chooses: their bias rules them out."""
        try:
            model = self.model
        except Skip:
            return set()
        site = None if layer is None else model.sites.get(layer)
        biases = {t.name for t in site.router_tensors} if site is not None else set()
        found = set()
        for key, info in self.tensors.items():
            is_vector = max(info.shape, default=0) == info.numel
            if self.target(key) in biases and info.dtype in FLOAT_DTYPES and is_vector:
                values = AsFound(self.path).read(key).flatten().double()
                found |= set(torch.nonzero(values < _RULED_OUT).flatten().tolist())
        return found

    @property
    def quantised(self) -> str | None:
        """How the configuration says that weights are quantised."""
        entry = self.config.get("quantization_config")
        return str(entry.get("quant_method")) if isinstance(entry, dict) else None

    def target(self, key: str) -> str | None:
        """The parameter that a tensor becomes (part of); of a scale, that of its weight."""
        names = [key, *(key.removesuffix(e) for e in COMPANIONS if key.endswith(e))]
        for name in names:
            try:
                return self.model.target(name)[0]
            except KeyError:  # a quantised model goes by the names of whole weights
                continue
        return None

    # --- values

    @cached_property
    def scans(self) -> dict[str, Scan]:
        """What the values of every floating-point tensor are like, all read once."""
        if not self.values:
            raise Skip("values were not to be read")
        wanted = {k: t for k, t in self.tensors.items() if t.dtype in FLOAT_DTYPES}
        total, done = sum(info.nbytes for info in wanted.values()), 0
        found = {}

        def tell(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.progress("reading values", done, total)

        for key, info in wanted.items():
            rows = info.shape[0] if self.is_fused(key) and info.nbytes else 1
            found[key] = scan(info, rows, tell)
        return found

    def is_fused(self, key: str) -> bool:
        """Whether a tensor holds one matrix of all experts of a layer."""
        return key in self._fused_experts

    @cached_property
    def _fused_experts(self) -> set[str]:
        try:
            model = self.model
        except Skip:
            return set()
        names = {site.experts_name + "." for site in model.sites.values()}
        return {
            key
            for key, info in self.tensors.items()
            if len(info.shape) == 3
            and not _EXPERT.fullmatch(key)
            and any(str(self.target(key)).startswith(name) for name in names)
        }


def layer_in_name(key: str) -> int | None:
    """The first number in a name: the layer's index."""
    match = re.search(r"(?:^|\.)(\d+)\.", key)
    return int(match[1]) if match else None


def first_line(error: Exception) -> str:
    """The beginning of an error's text."""
    text = error.problem if isinstance(error, UnsupportedModelError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]
