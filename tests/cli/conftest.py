"""Runs commands in this process, on the embedded model and a page of text."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from families import save_tiny
from moeprune import Budget, Compute, Text, apply, calibrate, plan, write_plan
from moeprune.cli.app import main
from running import Done, Run, page

COMPUTE = Compute(dtype="float32", workers=1)


@pytest.fixture(autouse=True)
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The working directory and all temporary files are below ``tmp_path``; one thread."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``moeprune`` with these arguments."""

    def call(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["moeprune", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return Done(stopped.value.code, out, err)

    return call


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared inputs of this process stand; tests must not write into it."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="session")
def english(shelf: Path) -> Path:
    """About 6 000 tokens of the embedded English text."""
    return page(shelf, "english")


@pytest.fixture(scope="session")
def french(shelf: Path) -> Path:
    """About as much of the French."""
    return page(shelf, "french")


@pytest.fixture(scope="session")
def small(english: Path) -> tuple[str, ...]:
    """Options that keep a run short."""
    sizes = ("--sequences", "6", "--length", "64")
    return ("--data", str(english), *sizes, "--dtype", "float32", "--workers", "1")


@pytest.fixture(scope="session")
def stats(shelf: Path, english: Path) -> Path:
    """Statistics of the embedded model."""
    path = shelf / "stats"
    calibrate("demo", path, Text((str(english),), 6, 64), compute=COMPUTE)
    return path


@pytest.fixture(scope="session")
def novices(shelf: Path, stats: Path) -> Path:
    """A plan, two files, that replaces half of the experts."""
    path = shelf / "novices.json"
    write_plan(plan("demo", "mone", Budget(ratio=0.5), stats, compute=COMPUTE), path)
    return path


@pytest.fixture(scope="session")
def smaller(shelf: Path) -> Path:
    """The embedded model with 24 of 32 experts in every layer."""
    path = shelf / "smaller"
    apply("demo", plan("demo", "moeits", Budget(keep=24), compute=COMPUTE), path)
    return path


@pytest.fixture(scope="session")
def tiny(shelf: Path) -> Path:
    """Another model, in several shards and without a tokenizer."""
    return save_tiny("qwen2_moe", shelf / "tiny")
