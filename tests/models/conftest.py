"""Tiny checkpoints that are written once and read by many tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from families import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint; tests must not write into it."""
    saved: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in saved:
            saved[model_type] = save_tiny(model_type, tmp_path_factory.mktemp(model_type))
        return saved[model_type]

    return get


@pytest.fixture(autouse=True)
def one_thread() -> object:
    """Rounding of a matrix product may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
