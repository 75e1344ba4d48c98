"""Hostile plans, vectors and statistics: a refusal, or a checkpoint; nothing in between."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fuzz.values import JSON, TEXTS, damaged, mutations, spelled
from moeprune.core.budget import Budget
from moeprune.core.plan import LayerPlan, MaskEdit
from moeprune.core.statistics import LayerStatistics
from moeprune.errors import DataError, MoepruneError, PlanError
from moeprune.files import sha256_file
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.models.store import (
    MANIFEST,
    StatisticsStore,
    merge_statistics,
    read_plan,
    write_plan,
    writing_statistics,
)
from moeprune.pipeline.inputs import describe_model
from moeprune.pipeline.stages import apply, plan
from support import plan_for

Answered = Callable[[Callable[[], Any]], Any]
COLLECTED = ("routing", "inputs", "hidden", "outputs")


@pytest.fixture(scope="session")
def model(tiny: Callable[[str], Path]) -> Path:
    return tiny("mixtral")


@pytest.fixture(scope="session")
def good_plan(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan with novices in one layer and a mask in another."""
    checkpoint = Checkpoint.open(model)
    layers = [
        LayerPlan(0, 8, (0, 2, 3, 4, 5, 6, 7), (1,), {"use": (1.0,) * 8}, torch.ones(1, 32)),
        LayerPlan(1, 8, tuple(range(8)), mask=MaskEdit(0.5, None, scale_in_EH=torch.ones(8, 32))),
    ]
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_plan(plan_for(checkpoint, layers), path)
    return path


@pytest.fixture(scope="session")
def good_statistics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of a model that has seen nothing."""
    layered = LayeredModel(Checkpoint.open(model))
    header = {
        "model": describe_model(layered, "mixtral"),
        "data": {"hash": "x", "tokens": 0, "sequences": 0, "domains": {"english": 0}},
        "dtype": "float32",
        "collect": list(COLLECTED),
    }
    path = tmp_path_factory.mktemp("statistics") / "good"
    with writing_statistics(path, header) as save_layer:
        for site in layered.sites.values():
            save_layer(LayerStatistics.empty(site.shape, COLLECTED))
    return path


@pytest.fixture
def plan_copy(good_plan: Path, tmp_path: Path) -> Path:
    for file in good_plan.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / good_plan.name


@pytest.fixture
def statistics_copy(good_statistics: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_statistics, tmp_path / "statistics"))


def read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# ---- plans ---------------------------------------------------------------------------------------


def is_applied(model: Path, path: Path) -> None:
    """A plan that can be read and carried out; what is written can be opened."""
    out = path.parent / "out"
    try:
        apply(model, read_plan(path), out, force=True)
        assert len(LayeredModel(Checkpoint.open(out)).sites) == 4
    finally:
        assert {file.name for file in path.parent.iterdir()} <= {
            path.name,
            path.with_suffix(".safetensors").name,
            "out",
        }


@given(data=st.data())
@settings(max_examples=100)
def test_plans(
    data: st.DataObject, model: Path, good_plan: Path, plan_copy: Path, answered: Answered
) -> None:
    plan_copy.write_bytes(spelled(data.draw(mutations(read_json(good_plan)))))
    answered(lambda: is_applied(model, plan_copy))


@given(data=st.data())
@settings(max_examples=60)
def test_bytes_of_plans(
    data: st.DataObject, good_plan: Path, plan_copy: Path, answered: Answered
) -> None:
    plan_copy.write_bytes(data.draw(damaged(good_plan.read_bytes())))
    answered(lambda: read_plan(plan_copy))


@given(name=TEXTS)
@settings(max_examples=50)
def test_vectors_elsewhere(name: str, good_plan: Path, plan_copy: Path, answered: Answered) -> None:
    """A plan never makes us read a file that is not beside it."""
    entry = {**read_json(good_plan)["vectors"], "file": name}
    plan_copy.write_bytes(spelled({**read_json(good_plan), "vectors": entry}))
    assert answered(lambda: read_plan(plan_copy)) is None


def test_vectors_in_a_parent_directory(plan_copy: Path) -> None:
    inner = plan_copy.parent / "inner"
    inner.mkdir()
    data = read_json(plan_copy)
    for name in ("../plan.safetensors", str(plan_copy.with_suffix(".safetensors"))):
        data["vectors"]["file"] = name
        (inner / "plan.json").write_text(json.dumps(data))
        with pytest.raises(PlanError, match="beside it"):
            read_plan(inner / "plan.json")


def with_vectors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The plan at ``path`` with other vectors, and their hash."""
    file = path.with_suffix(".safetensors")
    save_file(tensors, file)
    data = read_json(path)
    data["vectors"]["sha256"] = sha256_file(file)
    path.write_text(json.dumps(data))


VECTORS = {
    "not a number": lambda t: t.fill_(float("nan")),
    "infinite": lambda t: t.fill_(float("inf")),
    "integers": lambda t: t.to(torch.int64),
    "complex": lambda t: t.to(torch.complex64),
    "8 bits": lambda t: t.to(torch.float8_e4m3fn),
    "one axis": lambda t: t.reshape(-1),
    "more rows": lambda t: t.repeat(9, 1),
    "no rows": lambda t: t[:0],
}


@pytest.mark.parametrize("name", ["layers.0.novices", "layers.1.scale_in"])
@pytest.mark.parametrize("change", VECTORS)
def test_vectors(change: str, name: str, model: Path, plan_copy: Path) -> None:
    tensors = load_file(plan_copy.with_suffix(".safetensors"))
    tensors[name] = VECTORS[change](tensors[name].clone()).contiguous()
    with_vectors(plan_copy, tensors)
    with pytest.raises(PlanError):
        is_applied(model, plan_copy)


@given(data=st.data())
@settings(max_examples=60)
def test_bytes_of_vectors(
    data: st.DataObject, good_plan: Path, plan_copy: Path, answered: Answered
) -> None:
    file = plan_copy.with_suffix(".safetensors")
    file.write_bytes(data.draw(damaged(good_plan.with_suffix(".safetensors").read_bytes())))
    entry = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    plan_copy.write_text(json.dumps({**read_json(good_plan), "vectors": entry}))
    answered(lambda: read_plan(plan_copy))


PLANS: dict[str, bytes] = {
    "byte order mark": b"\xef\xbb\xbf{}",
    "Latin-1": '{"é": 1}'.encode("latin-1"),
    "NaN": b'{"format": NaN}',
    "1e999": b'{"format": 1e999}',
    "twice": b'{"format": 1, "format": 2}',
    "half a character": b'{"format": "\\ud800"}',
    "deep": b"[" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("name", PLANS)
def test_spellings_of_plans(name: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(PLANS[name])
    with pytest.raises(PlanError, match="not valid JSON"):
        read_plan(tmp_path / "plan.json")


def test_a_plan_nested_nearly_too_deeply(good_plan: Path, plan_copy: Path, model: Path) -> None:
    """What can be read can be written: they give up at different depths."""
    refused = []
    for depth in (10, 100, *range(200, 1200, 50)):
        text = json.dumps({**read_json(good_plan), "options": {"x": "HERE"}})
        plan_copy.write_text(text.replace('"HERE"', "[" * depth + "]" * depth))
        try:
            read_plan(plan_copy)
        except PlanError:
            refused.append(depth)
        else:
            is_written(plan_copy)
    assert refused and min(refused) > 10


def is_written(path: Path) -> None:
    write_plan(read_plan(path), path.with_name("again.json"), force=True)


@pytest.mark.parametrize("name", ["plan.json", MANIFEST])
def test_endless_plans_and_manifests(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as handle:
        handle.truncate(1 << 42)
    with pytest.raises((PlanError, DataError), match="larger than 64 MiB"):
        read_plan(tmp_path) if name == "plan.json" else StatisticsStore.open(tmp_path)


# ---- statistics ----------------------------------------------------------------------------------


def is_read(model: Path, path: Path) -> None:
    """Statistics that can be read, planned from and added up."""
    store = StatisticsStore.open(path)
    for index in store.layers:
        store.layer(index)
    plan(model, "mone", Budget(ratio=0.5), path)
    merge_statistics([path, path], path.parent / "sum", force=True)


@given(data=st.data())
@settings(max_examples=100)
def test_manifests(
    data: st.DataObject,
    model: Path,
    good_statistics: Path,
    statistics_copy: Path,
    answered: Answered,
) -> None:
    manifest = data.draw(mutations(read_json(good_statistics / MANIFEST)) | JSON)
    (statistics_copy / MANIFEST).write_bytes(spelled(manifest))
    answered(lambda: is_read(model, statistics_copy))


@given(name=TEXTS)
@settings(max_examples=50)
def test_layers_elsewhere(
    name: str, good_statistics: Path, statistics_copy: Path, answered: Answered
) -> None:
    manifest = read_json(good_statistics / MANIFEST)
    manifest["layers"]["0"]["file"] = name
    (statistics_copy / MANIFEST).write_bytes(spelled(manifest))
    assert answered(lambda: StatisticsStore.open(statistics_copy)) is None


def test_layers_in_a_parent_directory(statistics_copy: Path) -> None:
    manifest = read_json(statistics_copy / MANIFEST)
    shutil.copy(statistics_copy / manifest["layers"]["0"]["file"], statistics_copy.parent / "x")
    manifest["layers"]["0"]["file"] = "../x"
    (statistics_copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="points outside its folder"):
        StatisticsStore.open(statistics_copy)


@pytest.mark.parametrize("key", ["experts", "hidden", "intermediate"])
@pytest.mark.parametrize("size", [10**9, 10**15, 2**63, 10**30, -1, 0])
def test_sizes_of_layers(key: str, size: int, statistics_copy: Path) -> None:
    """Nothing is allocated for what a manifest says."""
    manifest = read_json(statistics_copy / MANIFEST)
    manifest["layers"]["0"]["shape"][key] = size
    (statistics_copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(MoepruneError, match=r"layer 0|bad layers\.0"):
        StatisticsStore.open(statistics_copy).layer(0)


@given(data=st.data())
@settings(max_examples=60)
def test_bytes_of_layers(
    data: st.DataObject, good_statistics: Path, statistics_copy: Path, answered: Answered
) -> None:
    manifest = read_json(good_statistics / MANIFEST)
    file = statistics_copy / manifest["layers"]["0"]["file"]
    file.write_bytes(data.draw(damaged((good_statistics / file.name).read_bytes()[:3000])))
    manifest["layers"]["0"]["sha256"] = sha256_file(file)
    (statistics_copy / MANIFEST).write_text(json.dumps(manifest))
    answered(lambda: StatisticsStore.open(statistics_copy).layer(0))
