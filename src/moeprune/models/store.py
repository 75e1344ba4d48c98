"""Statistics and plans on disk. The formats are described in docs/formats.md."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from moeprune.core.plan import Plan
from moeprune.core.residual import NAME, Residual
from moeprune.core.shapes import LayerShape
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import CheckpointError, DataError, MoepruneError, OutputError, PlanError
from moeprune.files import (
    is_plain_name,
    json_bytes,
    load_json,
    new_directory,
    refuse_existing,
    sha256_bytes,
    sha256_file,
    write_together,
)
from moeprune.models.checkpoint import read_header
from moeprune.models.plan_weights import find_weights, folder_of, save_weights

PathLike = str | os.PathLike[str]
STATISTICS_FORMAT = "moeprune.statistics/1"
MANIFEST = "manifest.json"
_MAX_PLAN = _MAX_MANIFEST = 1 << 26
_AGAIN = "make it again: moeprune calibrate MODEL --out DIR"
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_VECTORS = re.compile(
    r"layers\.\d+\.(novices|scale_in|scale_mid|neuron_index|neuron_factor|router|offsets)"
)
_INTEGERS = ("neuron_index",)


def versions() -> dict[str, str]:
    """Versions of what decides numbers."""
    found = {}
    for name in ("moeprune", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # running from a source tree that was never installed
            found[name] = "unknown"
    return found


@dataclass(frozen=True)
class _ModelEntry:
    name: str
    fingerprint: str
    moe_layers: list[int]


@dataclass(frozen=True)
class _DataEntry:
    hash: str
    tokens: int
    sequences: int
    domains: dict[str, int]


@dataclass(frozen=True)
class _LayerEntry:
    file: str
    sha256: str
    tokens: int
    shape: LayerShape


@dataclass(frozen=True)
class _FileEntry:
    file: str
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """What is read from a manifest; others may add entries."""

    model: _ModelEntry
    data: _DataEntry
    dtype: str
    collect: list[str]
    layers: dict[int, _LayerEntry]
    residual: _FileEntry | None = None


_MANIFEST = TypeAdapter(_Manifest)


@dataclass(frozen=True)
class StatisticsStore:
    """A directory with a manifest and one safetensors file per MoE layer."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> StatisticsStore:
        """Open statistics and check that every layer's file is whole.

        Raises:
            DataError: not statistics, or damaged.
        """
        store = cls(path)
        if not (path / MANIFEST).is_file():
            raise DataError(
                f"no statistics in {path}", "make them: moeprune calibrate MODEL --out DIR"
            )
        if store.manifest.get("format") != STATISTICS_FORMAT:
            raise DataError(f"{path / MANIFEST} is not of format {STATISTICS_FORMAT}", _AGAIN)
        checked = store._checked
        if sorted(checked.layers) != checked.model.moe_layers:
            raise DataError(f"{path / MANIFEST} is damaged: layers are missing", _AGAIN)
        named: dict[str, _LayerEntry | _FileEntry] = {
            f"of layer {index}": entry for index, entry in checked.layers.items()
        }
        if checked.residual is not None:
            named["of the residual stream"] = checked.residual
        for what, entry in named.items():
            if not is_plain_name(entry.file):
                raise DataError(f"{path / MANIFEST} points outside its folder", _AGAIN)
            file = path / entry.file
            if not file.is_file() or sha256_file(file) != entry.sha256:
                raise DataError(f"statistics {what} in {path} are damaged", _AGAIN)
        return store

    @cached_property
    def _checked(self) -> _Manifest:
        try:
            return _MANIFEST.validate_json(json_bytes(self.manifest), strict=True)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise DataError(f"{self.path / MANIFEST} is damaged: bad {where}", _AGAIN) from error

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What was collected, from which model and text."""
        try:
            data = load_json(self.path / MANIFEST, _MAX_MANIFEST)
        except ValueError as error:
            why = str(error)[:200]
            raise DataError(f"{self.path / MANIFEST} is not valid JSON: {why}", _AGAIN) from error
        if not isinstance(data, dict):
            raise DataError(f"{self.path / MANIFEST} is not a JSON object", _AGAIN)
        return data

    @property
    def layers(self) -> list[int]:
        """Indices of the MoE layers."""
        return sorted(self._checked.layers)

    @property
    def summary(self) -> dict[str, Any]:
        """What a plan says about the statistics that it was made from."""
        return {
            "sha256": sha256_bytes((self.path / MANIFEST).read_bytes()),
            "data": self.manifest["data"],
            "dtype": self.manifest["dtype"],
        }

    def layer(self, index: int) -> LayerStatistics:
        """One layer's statistics."""
        damaged = DataError(f"statistics of layer {index} in {self.path} are damaged", _AGAIN)
        entry = self._checked.layers.get(index)
        if entry is None:
            raise DataError(f"{self.path} has no statistics of layer {index}", _AGAIN)
        try:
            tensors = load_file(self.path / entry.file)
            return LayerStatistics.from_tensors(entry.shape, entry.tokens, tensors)
        except (
            SafetensorError,
            RuntimeError,
            TypeError,
        ) as error:  # torch: sizes that no tensor has
            raise damaged from error

    def residual(self) -> Residual:
        """The angles of the residual stream.

        Raises:
            DataError: they were not collected, or are damaged.
        """
        entry = self._checked.residual
        if entry is None:
            names = ",".join(sorted({*self._checked.collect, NAME}))
            raise DataError(
                f"the statistics in {self.path} do not hold {NAME!r}",
                f"calibrate again with --collect {names}",
            )
        try:
            tensors = load_file(self.path / entry.file)
            return Residual.from_tensors(tensors, int(self.manifest["model"]["layers"]))
        except (SafetensorError, MoepruneError, LookupError, TypeError, ValueError) as error:
            what = f"statistics of the residual stream in {self.path} are damaged"
            raise DataError(what, _AGAIN) from error


def statistics_file(
    statistics: LayerStatistics | Residual,
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """A file's name, its tensors, and what the manifest says of them beside the checksum."""
    if isinstance(statistics, Residual):
        return f"{NAME}.safetensors", dict(statistics.tensors()), {}
    shape = statistics.shape
    told = {"tokens": statistics.tokens, "shape": asdict(shape)}
    return f"layer-{shape.layer:05d}.safetensors", statistics.to_tensors(), told


def manifest_bytes(header: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> bytes:
    """The manifest of statistics with these files, each with its name and checksum."""
    layers = {int(entry["shape"]["layer"]): entry for entry in entries if "shape" in entry}
    whole = [(NAME, entry) for entry in entries if "shape" not in entry]
    by_layer = {str(index): dict(entry) for index, entry in sorted(layers.items())}
    told = {"format": STATISTICS_FORMAT, **header, "versions": versions()}
    return json_bytes({**told, **dict(whole), "layers": by_layer})


@contextmanager
def writing_statistics(
    out: Path, header: Mapping[str, Any], force: bool = False
) -> Iterator[Callable[[LayerStatistics | Residual], None]]:
    """Yield a function that saves what it gets; the directory appears when the block succeeds.

    Args:
        out: the directory.
        header: manifest entries ``model``, ``data``, ``dtype``, ``collect``.
        force: replace an existing one.
    """
    entries: list[dict[str, Any]] = []
    with new_directory(out, force) as work:

        def save(statistics: LayerStatistics | Residual) -> None:
            name, tensors, told = statistics_file(statistics)
            save_file(tensors, work / name)
            entries.append({"file": name, "sha256": sha256_file(work / name), **told})

        yield save
        (work / MANIFEST).write_bytes(manifest_bytes(header, entries))


def merge_statistics(
    sources: Sequence[PathLike], out: PathLike, force: bool = False
) -> StatisticsStore:
    """Add up statistics of the same model over different text, exactly.

    Raises:
        DataError: different models, dtypes or accumulators.
    """
    stores = [StatisticsStore.open(Path(path)) for path in sources]
    first = stores[0].manifest
    for store in stores[1:]:
        for key in ("model", "dtype", "collect"):
            if store.manifest[key] != first[key]:
                raise DataError(
                    f"{store.path} and {stores[0].path} differ in {key}",
                    "merge statistics of one model, collected alike",
                )
    data = [store.manifest["data"] for store in stores]
    domains: dict[str, int] = {}
    for entry in data:
        for name, count in entry["domains"].items():
            domains[name] = domains.get(name, 0) + count
    header = {
        "model": first["model"],
        "data": {
            "hash": sha256_bytes(json_bytes([entry["hash"] for entry in data])),
            "tokens": sum(entry["tokens"] for entry in data),
            "sequences": sum(entry["sequences"] for entry in data),
            "domains": domains,
            "merged": data,
        },
        "dtype": first["dtype"],
        "collect": first["collect"],
    }
    with writing_statistics(Path(out), header, force) as save:
        if NAME in first["collect"]:
            angles = stores[0].residual()
            for store in stores[1:]:
                angles.merge(store.residual())
            save(angles)
        for index in stores[0].layers:
            total = stores[0].layer(index)
            for store in stores[1:]:
                total.merge(store.layer(index))
            save(total)
    return StatisticsStore.open(Path(out))


def refuse_existing_plan(path: PathLike, force: bool = False) -> None:
    """Raise ``OutputError`` if a plan cannot be written to ``path`` and its vectors beside it.

    ``force`` replaces a file of vectors that belonged to a plan, and no other.
    """
    path = Path(path)
    refuse_existing(path, force, directory=False)
    refuse_existing(folder_of(path), force)
    vectors_path = path.with_suffix(".safetensors")
    if path == vectors_path:
        raise OutputError(
            f"a plan is JSON, and its vectors are the .safetensors beside it (got {path})",
            f"use --out {path.with_suffix('.json')}",
        )
    refuse_existing(vectors_path, force, directory=False)
    if vectors_path.is_file() and not _are_vectors(vectors_path):
        raise OutputError(
            f"--force would replace {vectors_path}, which does not hold the vectors of a plan",
            "choose another --out",
        )


def _are_vectors(file: Path) -> bool:
    try:
        tensors, _ = read_header(file)
    except CheckpointError:
        return False
    return all(_VECTORS.fullmatch(name) for name in tensors)


def write_plan(plan: Plan, path: PathLike, force: bool = False) -> None:
    """Write ``path`` (JSON) and, if the plan has vectors, a safetensors file beside it."""
    path = Path(path)
    refuse_existing_plan(path, force)
    plan = save_weights(plan, path, force)
    contents: dict[Path, bytes] = {}
    entry = None
    tensors = plan.vectors()
    if tensors:
        vectors_path = path.with_suffix(".safetensors")
        contents[vectors_path] = save(tensors)
        entry = {"file": vectors_path.name, "sha256": sha256_bytes(contents[vectors_path])}
    contents[path] = json_bytes(plan.to_json(entry))
    write_together(contents, force)


def read_plan(path: PathLike) -> Plan:
    """Read a plan and its vectors.

    Raises:
        PlanError: not a plan, or its vectors are missing or not its own.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "plan.json"
    try:
        data = load_json(path, _MAX_PLAN)
    except FileNotFoundError:
        raise PlanError(
            f"no plan at {path}", "make one: moeprune plan MODEL --out plan.json"
        ) from None
    except ValueError as error:
        raise PlanError(f"{path} is not valid JSON: {str(error)[:200]}") from error
    tensors = {}
    entry = data.get("vectors") if isinstance(data, dict) else None
    if entry is not None:
        name = str(entry.get("file")) if isinstance(entry, dict) else ""
        file = path.parent / name
        if not is_plain_name(name) or not file.is_file():
            raise PlanError(
                f"{path} needs its vectors, {name[:80]!r}, beside it", "copy both files"
            )
        if sha256_file(file) != entry.get("sha256"):
            raise PlanError(f"{file} is not the file that {path.name} was written with")
        try:
            with safe_open(file, "pt") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise PlanError(f"{file} is damaged: {error}") from error
        for key, tensor in tensors.items():
            whole = key.endswith(_INTEGERS) and tensor.dtype == torch.int32
            if not whole and not (tensor.dtype in _FLOATING and bool(tensor.isfinite().all())):
                raise PlanError(f"{file}: {key!r} does not hold finite numbers")
    return Plan.from_json(data, tensors, find_weights(data, path))


def same_model(store: StatisticsStore, fingerprint: str, name: str) -> None:
    """Raise unless ``store`` was collected on the model with that fingerprint."""
    found = store.manifest["model"]["fingerprint"]
    if found != fingerprint:
        raise MoepruneError(
            f"the statistics in {store.path} are of another model "
            f"({store.manifest['model']['name']}, not {name})",
            "calibrate this model, or plan for the one that they were collected on",
        )
