"""Experts of one layer in memory some at a time, converted as transformers converts all of them."""

from __future__ import annotations

import mmap
import re
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
)

from moeprune.models.generated import ANSWER_KEYS
from moeprune.models.native import text_config
from moeprune.models.observe import is_special
from moeprune.models.sites import MoESite

if TYPE_CHECKING:
    from moeprune.models.loading import LayeredModel

_ONE_BY_ONE = (Chunk, Concatenate, Interleave, MergeModulelist, Transpose)
"""Conversions that do the same to every expert, and take any number of them."""

_INDEX = re.compile(r".*experts\.(\d+)\..*")


def whole_only(model: LayeredModel) -> str | None:
    """Why a layer's experts cannot be loaded some at a time; None if they can."""
    config = text_config(model.config)
    if model.changes:
        return "its layers are changed as they are loaded"
    if any(getattr(config, key, None) for key in ("approximate_experts", *ANSWER_KEYS)):
        return "some of its experts are constants"
    if not type(model.model).__module__.startswith("transformers.models."):
        return "its classes are not transformers' own"
    for index, site in model.sites.items():
        if is_special(site.experts):
            return f"{type(site.experts).__name__} is called in a way of its own"
        names = set(parameters(site))
        for _, name, pattern in model.stored(index):
            if name in names and pattern is not None:
                for operation in model.converter(pattern).operations:
                    if not isinstance(operation, _ONE_BY_ONE):
                        return f"{type(operation).__name__} converts all experts together"
    return None


def parameters(site: MoESite) -> list[str]:
    """Names of the parameters that have a row per expert."""
    return [
        f"{site.experts_name}.{name}"
        for name, parameter in site.experts.named_parameters(recurse=False)
        if parameter.shape[:1] == (site.shape.experts,)
    ]


class ExpertRanges:
    """The experts of one layer, whose other tensors are in memory.

    Row 0 of the module's matrices is the first expert that was loaded last.
    """

    def __init__(self, model: LayeredModel, site: MoESite) -> None:
        self._model, self._site = model, site
        names = set(parameters(site))
        self._stored = [
            (key, pattern) for key, name, pattern in model.stored(site.layer) if name in names
        ]
        self._names = [name.rpartition(".")[2] for name in sorted(names)]

    def load(self, chosen: range) -> int:
        """Load these experts in place of those loaded before; bytes read."""
        self.free()
        keys, rows = [], {}
        for key, pattern in self._stored:
            match = _INDEX.fullmatch(key) if self._is_merged(pattern) else None
            if match is None:
                rows[key] = chosen
                keys.append(key)
            elif int(match[1]) in chosen:
                keys.append(key)
        with self._model.changing:
            self._resize(len(chosen))
            self._model.fill(keys, rows)
        for name in self._names:
            data = self._site.experts.get_parameter(name).data
            if data.device.type == "cpu" and data.is_contiguous():
                data.reshape(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()
        return sum(self._site.experts.get_parameter(name).nbytes for name in self._names)

    def free(self) -> None:
        """Back to meta, with all rows."""
        with self._model.changing:
            self._resize(self._site.shape.experts)

    def _is_merged(self, pattern: str | None) -> bool:
        if pattern is None:
            return False
        operations = self._model.converter(pattern).operations
        return any(isinstance(operation, MergeModulelist) for operation in operations)

    def _resize(self, rows: int) -> None:
        experts = self._site.experts
        for name in self._names:
            parameter = experts.get_parameter(name)
            shape = (rows, *parameter.shape[1:])
            blank = torch.empty(shape, dtype=parameter.dtype, device="meta")
            experts._parameters[name] = nn.Parameter(blank, requires_grad=False)
