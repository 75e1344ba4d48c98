"""Every recipe of the papers is one that `moeprune run` would begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeprune.core.method import methods
from moeprune.pipeline.recipes.schema import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = {
    "moe-pruner", "moeits", "mone", "naee", "m-smoe", "hc-smoe", "reap", "stun", "moe-i2", "dern",
    "sparsegpt", "wanda", "flap", "angular",
}  # fmt: skip


def test_all_papers_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_published_recipe(name: str) -> None:
    loaded = load_recipe(FOLDER / f"{name}.yaml")
    used = [step.method for step in loaded.recipe.steps]
    assert name in used
    assert loaded.text().length >= 512 and loaded.heldout() is not None
    missing = sorted({*used} - {*methods()})
    if missing:
        pytest.skip(f"no method {missing[0]} yet")
    assert [step.method.name for step in loaded.steps()] == used
