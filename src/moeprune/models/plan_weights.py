"""Matrices that a plan brings along: a safetensors file per layer, in a folder beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moeprune.core.plan import Plan
from moeprune.errors import PlanError
from moeprune.files import is_plain_name, new_directory, refuse_existing, sha256_file

SUFFIX = ".weights"


@dataclass(frozen=True)
class WeightsFile:
    """One layer's matrices (``core.edits.StoredWeights``).

    Attributes:
        path: the safetensors file; its tensors are named ``<expert>.<role>``.
        sha256: of the file.
        roles: the matrices that it holds of every kept expert.
        owner: what keeps a temporary folder alive, if the file is in one.
    """

    path: Path
    sha256: str
    roles: tuple[str, ...]
    owner: Any = None

    @property
    def reference(self) -> Mapping[str, Any]:
        """What plan.json says about the file."""
        return {"file": self.path.name, "sha256": self.sha256, "roles": list(self.roles)}

    def matrix(self, expert: int, role: str) -> Tensor:
        """One matrix as float32."""
        with self._open() as handle:
            return torch.as_tensor(handle.get_tensor(f"{expert}.{role}")).float()

    def shape(self, expert: int, role: str) -> tuple[int, ...]:
        """The size of one matrix."""
        with self._open() as handle:
            return tuple(handle.get_slice(f"{expert}.{role}").get_shape())

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "pt") as handle:
                yield handle
        except SafetensorError as error:
            raise PlanError(f"{self.path} is damaged: {error}") from error


class WeightsFolder:
    """A temporary folder for the matrices of a plan that is being made.

    It is deleted with the last plan that refers to it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def store(self, layer: int, matrices: Mapping[tuple[int, str], Tensor]) -> WeightsFile:
        """Write one layer's matrices, by expert and role, in the model's own dtype."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="moeprune-weights-")
        path = Path(self._folder.name) / f"layer-{layer:05d}.safetensors"
        save_file(
            {f"{e}.{role}": w.to(self._dtype).contiguous() for (e, role), w in matrices.items()},
            path,
        )
        roles = tuple(sorted({role for _, role in matrices}))
        return WeightsFile(path, sha256_file(path), roles, self._folder)


def folder_of(plan_path: Path) -> Path:
    """Where the matrices of the plan at ``plan_path`` stand."""
    return plan_path.with_suffix(SUFFIX)


def save_weights(plan: Plan, plan_path: Path, force: bool = False) -> Plan:
    """Copy the matrices of ``plan`` to the folder beside ``plan_path``; the plan that names them.

    Raises:
        OutputError: the folder exists.
    """
    files = {i: layer.stored for i, layer in plan.layers.items() if layer.stored is not None}
    if not files:
        return plan
    folder = folder_of(plan_path)
    refuse_existing(folder, force)
    layers = dict(plan.layers)
    with new_directory(folder, force) as work:
        for index, stored in files.items():
            assert isinstance(stored, WeightsFile)
            shutil.copyfile(stored.path, work / stored.path.name)
            moved = replace(stored, path=folder / stored.path.name, owner=None)
            layers[index] = replace(plan.layers[index], stored=moved)
    return replace(plan, layers=layers)


def find_weights(data: Any, plan_path: Path) -> dict[int, WeightsFile]:
    """The matrices that a plan.json names, by layer.

    Raises:
        PlanError: a file is missing, or is not the one that the plan was written with.
    """
    found = {}
    layers = data.get("layers") if isinstance(data, dict) else None
    for key, entry in (layers if isinstance(layers, dict) else {}).items():
        named = entry.get("stored") if isinstance(entry, dict) else None
        if not isinstance(named, dict) or not str(key).isdecimal():
            continue
        name, roles = str(named.get("file")), named.get("roles")
        path = folder_of(plan_path) / name
        if not is_plain_name(name) or not path.is_file():
            raise PlanError(
                f"{plan_path} needs its matrices, {name[:80]!r}, in {folder_of(plan_path).name}",
                "copy the folder beside the plan",
            )
        if sha256_file(path) != named.get("sha256"):
            raise PlanError(f"{path} is not the file that {plan_path.name} was written with")
        if not isinstance(roles, list):
            raise PlanError(f"{plan_path}: layers.{key}.stored names no roles")
        found[int(key)] = WeightsFile(path, str(named["sha256"]), tuple(map(str, roles)))
    return found
