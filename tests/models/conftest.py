"""Tiny checkpoints that are written once and read by many tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantise
from families import save_tiny
from quantised_cases import Twins, fused_too


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


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """A quantised tiny checkpoint; tests must not write into it."""
    made: dict[tuple[str, tuple[int, int]], Path] = {}

    def get(model_type: str, block: tuple[int, int] = (8, 8)) -> Path:
        key = model_type, block
        if key not in made:
            base = tmp_path_factory.mktemp(model_type)
            if model_type == "gpt_oss":
                wide = {"hidden_size": 64, "intermediate_size": 96}
                made[key] = quantise.mxfp4(save_tiny("gpt_oss", base / "plain", **wide), base / "q")
            else:
                save_tiny(model_type, base / "plain")
                made[key] = quantise.fp8(base / "plain", base / "q", block, fused_too)
        return made[key]

    return get
