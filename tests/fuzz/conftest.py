"""Small checkpoints to damage, and the only answer to damage that is allowed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from families import save_tiny
from moeprune.errors import MoepruneError

T = TypeVar("T")

# The same examples in every run; a longer search: --hypothesis-profile=search -m slow
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint in one file; tests must not write into it."""
    saved: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in saved:
            folder = tmp_path_factory.mktemp("tiny") / model_type
            saved[model_type] = save_tiny(model_type, folder)
        return saved[model_type]

    return get


@pytest.fixture
def copied(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's tiny checkpoint that may be damaged."""
    return lambda model_type: Path(shutil.copytree(tiny(model_type), tmp_path / model_type))


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of two tensors in one file, to be overwritten by every example."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, folder / "model.safetensors")
    before = sorted(os.listdir(tmp_path))
    yield folder
    assert sorted(os.listdir(tmp_path)) == before


@contextmanager
def refusal_or_nothing() -> Iterator[list[MoepruneError]]:
    """The block may refuse, in one or two short lines; any other exception is a defect."""
    refused: list[MoepruneError] = []
    try:
        yield refused
    except MoepruneError as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 2, lines
        assert all(len(line) < 1200 for line in lines), lines
        str(error).encode()  # halves of characters cannot be printed
        refused.append(error)


@pytest.fixture
def answered() -> Callable[[Callable[[], T]], T | None]:
    """What a function gives, or None if it refuses; any other exception is a defect."""

    def call(function: Callable[[], T]) -> T | None:
        with refusal_or_nothing():
            return function()
        return None

    return call
