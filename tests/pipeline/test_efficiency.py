"""Sizes against sums of tensors, energy against a counter, the run as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeprune import Compute, Text
from moeprune.errors import DataError
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.pipeline.efficiency import UNKNOWN_ENERGY, Turns, efficiency
from moeprune.pipeline.meters import POWERCAP, Rapl
from recovering import prune

FLOAT32 = Compute(dtype="float32", workers=1)
SHORT = Turns(rounds=2, warm_up=1, prompt_tokens=8, new_tokens=3)


@pytest.mark.parametrize(("kind", "kept"), [("dropped", 5), ("novices", 4)])
def test_sizes_and_speed(kind: str, kept: int, shelf: Path, english: Path) -> None:
    student = prune(demo_path(), kind, shelf / f"measured-{kind}")
    found = efficiency(student, "demo", Text((str(english),)), SHORT, FLOAT32)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    mine, teacher = found["models"]["model"], found["models"]["teacher"]
    stored = Checkpoint.open(student)
    assert mine["disk_bytes"] == stored.nbytes and mine["parameters"] == stored.numel
    assert (mine["experts"], teacher["experts"]) == (6 * kept, 6 * 32)
    assert 0 <= mine["memory_bytes"] - 4 * stored.numel < 1000, "float32 and a few buffers"
    expert = 3 * 192 * 96
    assert teacher["active_parameters"] == Checkpoint.open("demo").numel - 6 * 28 * expert
    assert mine["active_parameters"] == stored.numel - 6 * (kept - 4) * expert
    assert mine["nonzero_parameters"] <= mine["parameters"]
    for row in (mine, teacher):
        assert row["prefill_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["memory_bytes"]
    ratio = found["ratio"]
    assert ratio["disk_bytes"] == mine["disk_bytes"] / teacher["disk_bytes"]
    assert ratio["decode"]["items"] == 2 and len(found["findings"]) == 2
    assert found["machine"]["device"] == "cpu" and found["machine"]["threads"] == 1
    if not Rapl().known:
        assert found["energy"] == UNKNOWN_ENERGY and mine["joules_per_token"] is None


def test_a_model_alone(english: Path) -> None:
    found = efficiency("demo", None, Text((str(english),)), SHORT, FLOAT32)
    assert list(found["models"]) == ["model"] and "ratio" not in found


def zone(root: Path, name: str, kind: str, energy: int) -> Path:
    folder = root / name
    folder.mkdir()
    for file, value in (("name", kind), ("energy_uj", energy), ("max_energy_range_uj", 999_999)):
        (folder / file).write_text(f"{value}\n")
    return folder


def test_energy_of_the_packages(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 900_000)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    rapl = Rapl(tmp_path)
    assert rapl.known
    before = rapl.read()
    (first / "energy_uj").write_text("500100\n")
    (second / "energy_uj").write_text("400000\n")  # it went round
    (part / "energy_uj").write_text("400000\n")
    assert rapl.joules(before) == pytest.approx(0.5 + 0.5)
    (first / "energy_uj").unlink()
    assert rapl.joules(before) is None
    assert not Rapl(tmp_path / "nowhere").known and Rapl(tmp_path / "nowhere").joules({}) is None


def test_bad_turns() -> None:
    assert POWERCAP.is_absolute()
    with pytest.raises(DataError, match="rounds must be at least 2"):
        Turns(rounds=1)
