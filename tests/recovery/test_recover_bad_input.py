"""What recover() refuses: one or two lines, and nothing is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedType

from families import save_tiny
from moeprune import recover, training
from moeprune.errors import MoepruneError
from moeprune.pipeline.inputs import Compute, Text
from moeprune.recovery import trainer
from recovering import prune, with_tokenizer
from support import tree


def other(kind: str, **sizes: Any) -> Callable[[Path], Path]:
    return lambda folder: with_tokenizer(save_tiny(kind, folder / "other", **sizes))


SMALL = {"vocab_size": 6144, "num_hidden_layers": 2}
TEACHERS = {
    "architecture": other("olmoe", **SMALL),
    "vocabulary": other("qwen3_moe", **{**SMALL, "vocab_size": 6200}),
    "number of layers": other("qwen3_moe", **{**SMALL, "num_hidden_layers": 3}),
    "another model": other("qwen3_moe", seed=1, **SMALL),
}


@pytest.mark.parametrize("problem", TEACHERS)
def test_a_teacher_of_another_kind(
    students: dict[str, Path], text: Text, tmp_path: Path, problem: str
) -> None:
    wrong = TEACHERS[problem](tmp_path)
    before = tree(tmp_path)
    with pytest.raises(MoepruneError, match=problem):
        recover(students["dropped"], wrong, tmp_path / "out", "expert-kd", text)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("how", ["expert-kd", "router-kd", "logit-kd"])
def test_no_teacher(students: dict[str, Path], text: Text, tmp_path: Path, how: str) -> None:
    with pytest.raises(MoepruneError, match="learns from a teacher"):
        recover(students["dropped"], None, tmp_path / "out", how, text)


@pytest.mark.parametrize("name", ["moeprune.json", "moeprune_plan.json"])
def test_a_student_without_its_plan(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, name: str
) -> None:
    student = tmp_path / "student"
    shutil.copytree(students["dropped"], student)
    (student / name).unlink()
    with pytest.raises(MoepruneError, match=name):
        recover(student, teacher, tmp_path / "out", "full", text)
    (student / name).write_text("{}")
    with pytest.raises(MoepruneError, match=r"moeprune_plan\.json"):
        recover(student, teacher, tmp_path / "out", "full", text)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.mark.parametrize("layerwise", [False, True])
def test_no_device(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, layerwise: bool
) -> None:
    chosen = training("expert-kd", None, {"layerwise": layerwise})
    with pytest.raises(MoepruneError, match="device 'abacus' cannot be used"):
        recover(students["dropped"], teacher, tmp_path / "x", chosen, text, Compute("abacus"))
    assert not list(tmp_path.iterdir())


def test_a_model_that_stands_where_the_run_would_be_kept(
    teacher: Path, text: Text, tmp_path: Path
) -> None:
    student = prune(teacher, "dropped", tmp_path / "out.recovery")
    before = tree(tmp_path)
    with pytest.raises(MoepruneError, match="is the model itself"):
        recover(student, teacher, tmp_path / "out", "full", text, force=True)
    assert tree(tmp_path) == before


def test_no_text(students: dict[str, Path], teacher: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(MoepruneError, match="is empty"):
        recover(students["dropped"], teacher, tmp_path / "out", "full", Text((str(empty),), 4, 32))
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_groups_that_are_not_there(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    with pytest.raises(MoepruneError, match="no novices"):
        chosen = training("full", None, {"train": ("novices",)})
        recover(students["dropped"], teacher, tmp_path / "out", chosen, text)


@pytest.mark.parametrize(
    ("kind", "fsdp", "named"),
    [("FSDP", "true", "FSDP"), ("DEEPSPEED", "", "DEEPSPEED"), ("MULTI_CPU", "true", "FSDP")],
)
def test_weights_that_would_be_split_over_processes(
    monkeypatch: pytest.MonkeyPatch, kind: str, fsdp: str, named: str
) -> None:
    split = SimpleNamespace(distributed_type=DistributedType(kind), num_processes=2)
    monkeypatch.setattr(trainer, "Accelerator", lambda **options: split)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
    with pytest.raises(MoepruneError, match=f"cannot train with {named}"):
        trainer.open_accelerator(True, training("full"))


def test_an_output_that_is_there(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path
) -> None:
    with pytest.raises(MoepruneError, match="exists"):
        recover(students["dropped"], teacher, tmp_path, "full", text)
    student = prune(teacher, "dropped", tmp_path / "student")
    with pytest.raises(MoepruneError, match="student itself"):
        recover(student, teacher, student, "full", text, force=True)
