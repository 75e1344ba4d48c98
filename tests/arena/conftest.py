"""A short comparison that several tests look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moeprune import Budget, Compute, Grid, Text, compare
from running import page

ONE = Compute(dtype="float32", workers=1)
METHODS = "mone,moeits,mone:scope=global,moe-pruner:propagate=dense"
BUDGETS = (Budget(ratio=0.5), Budget(ratio=0.95), Budget(pattern=(2, 4)))


@pytest.fixture(scope="session")
def english_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page(tmp_path_factory.mktemp("arena-text"), "english", 9_000)


@pytest.fixture(scope="session")
def french_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page(tmp_path_factory.mktemp("arena-text"), "french", 9_000)


@pytest.fixture(scope="session")
def texts(english_text: Path) -> dict[str, Any]:
    """What keeps a comparison short."""
    source = (f"english={english_text}",)
    return {"text": Text(source, 4, 64), "heldout": Text(source, 2, 32), "compute": ONE}


@pytest.fixture(scope="session")
def compared(
    tmp_path_factory: pytest.TempPathFactory, texts: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Four methods with three budgets, some of which cannot be."""
    out = tmp_path_factory.mktemp("arena") / "run"
    result = compare("demo", out, Grid(METHODS, BUDGETS), **texts)
    assert json.loads((out / "compare.json").read_bytes()) == result
    return out, result
