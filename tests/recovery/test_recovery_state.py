"""What a recovery keeps, when the kill or the disk hits it at its worst."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeprune.errors import MoepruneError
from moeprune.models.checkpoint import Checkpoint
from moeprune.pipeline import recovery_opening, teacher_samples
from moeprune.pipeline.inputs import Compute, Text, silent
from moeprune.pipeline.recovery import recover, training
from moeprune.recovery.state import StateFolder

NUMBERS = {"data": "abc", "progress": {"step": 3, "lam": 0.25, "held": [1.5, 1.25]}}


def saved(tmp_path: Path) -> tuple[StateFolder, dict[str, Any]]:
    folder, weights = StateFolder(tmp_path / "out"), {"w": nn.Parameter(torch.ones(2))}
    folder.save(NUMBERS, weights, torch.optim.AdamW(weights.values()))
    found = folder.numbers()
    assert found is not None and found["progress"] == NUMBERS["progress"]
    return folder, found


def test_no_flipped_bit_changes_a_number_in_silence(tmp_path: Path) -> None:
    folder, before = saved(tmp_path)
    file = folder.path / "state" / "manifest.json"
    whole, told = file.read_bytes(), 0
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = folder.numbers() or {}
        except MoepruneError as error:
            assert "damaged" in error.problem
            told += 1
        else:
            assert {key: found.get(key) for key in before} == before
    assert told > 0.8 * len(whole) / 3


def test_a_state_that_was_moved_aside_is_not_lost(tmp_path: Path) -> None:
    """Killed between the two renames that put a new one in its place."""
    folder, before = saved(tmp_path)
    aside = folder.path / ".state.abcd1234.old"
    aside.mkdir()
    (folder.path / "state").rename(aside / "content")
    assert folder.numbers() is None
    with folder.held():
        assert folder.numbers() == before and not aside.exists()


def test_samples_of_the_teacher_that_were_damaged_are_written_again(
    students: dict[str, Path],
    teacher: Path,
    text: Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``--force`` forgets what was trained, and not these."""
    times: list[Any] = []

    def written(*given: Any) -> list[str]:
        times.append(given)
        return ["one", "two"]

    monkeypatch.setattr(teacher_samples, "_write_samples", written)
    asked = Text((*text.sources, "own=teacher-samples"), 12, 24)
    student, master = Checkpoint.open(students["dropped"]), Checkpoint.open(teacher)

    def sample() -> Path:
        given = (asked, student, master, StateFolder(tmp_path / "out"), Compute(), True, silent)
        source = teacher_samples.with_samples(*given).sources[-1]
        return Path(str(source).partition("=")[2])

    file = sample()
    assert sample() == file and len(times) == 1
    file.write_bytes(file.read_bytes().replace(b"two", b"twp"))
    assert sample() == file and len(times) == 2 and b"two" in file.read_bytes()


def test_killed_beside_the_first_line_of_the_log(
    students: dict[str, Path], text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = training(
        "full", None, {"steps": 2, "batch": 2, "holdout": 0.1, "evaluate_every": 2, "save_every": 1}
    )

    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    recover(students["dropped"], None, tmp_path / "whole", quick, text)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StateFolder, "note", killed)
        recover(students["dropped"], None, tmp_path / "cut", quick, text)
    recover(students["dropped"], None, tmp_path / "cut", quick, text, resume=True)
    steps = [
        [json.loads(line)["step"] for line in file.read_text().splitlines()]
        for file in sorted(tmp_path.glob("*/moeprune_recovery.jsonl"))
    ]
    assert steps == [[0, 1, 2]] * 2


def test_a_run_of_other_versions_is_refused(
    students: dict[str, Path], text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    quick = training("full", None, {"steps": 2, "batch": 2, "holdout": 0.1})
    with pytest.raises(KeyboardInterrupt):
        recover(students["dropped"], None, tmp_path / "out", quick, text, listen=killed)
    now = {**recovery_opening.versions(), "torch": "1.0"}
    monkeypatch.setattr(recovery_opening, "versions", lambda: now)
    with pytest.raises(MoepruneError, match=r"had another version of torch"):
        recover(students["dropped"], None, tmp_path / "out", quick, text, resume=True)
