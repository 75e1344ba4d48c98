"""Every recipe of the papers is one that `moeprune run` would begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeprune.core.method import methods
from moeprune.pipeline.recipes.recovering import RecoverPart
from moeprune.pipeline.recipes.schema import load_recipe
from moeprune.pipeline.recovery_steps import Recovery
from moeprune.recovery.training import PRESETS

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = {
    "moe-pruner", "moeits", "mone", "naee", "m-smoe", "hc-smoe", "reap", "stun", "moe-i2", "dern",
    "sparsegpt", "wanda", "flap", "angular",
}  # fmt: skip

RECOVERED = {"moe-pruner-distilled": "moe-pruner", "moeits-lora": "moeits"}


def test_all_papers_are_there() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == NAMES | RECOVERED.keys()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_published_recipe(name: str) -> None:
    loaded = load_recipe(FOLDER / f"{name}.yaml")
    used = [step.method for step in loaded.recipe.steps if not isinstance(step, RecoverPart)]
    assert name in used
    assert loaded.text().length >= 512 and loaded.heldout() is not None
    missing = sorted({*used} - {*methods()})
    if missing:
        pytest.skip(f"no method {missing[0]} yet")
    assert [step.name for step in loaded.steps()] == used


@pytest.mark.parametrize("name", RECOVERED)
def test_published_recovery(name: str) -> None:
    """The recipe without it, and then the settings of the paper."""
    loaded, alone = (load_recipe(FOLDER / f"{file}.yaml") for file in (name, RECOVERED[name]))
    assert loaded.model() == alone.model() and loaded.heldout() == alone.heldout()
    pruning, recovery = loaded.steps()
    assert [pruning.name] == [step.name for step in alone.steps()] == [RECOVERED[name]]
    assert loaded.recipe.steps[0] == alone.recipe.steps[0]
    assert isinstance(recovery, Recovery) and recovery.teacher is None
    assert recovery.taught == (recovery.training.how == "expert-kd")
    made = recovery.training.to_json()
    published = {k: v for k, v in PRESETS[RECOVERED[name]].items() if k != "batch"}
    assert {key: made[key] for key in published} == published
    # all sequences are read as often as the paper reads them
    epochs = made["steps"] * made["batch"] / recovery.text.sequences
    assert round(epochs) == {"moe-pruner-distilled": 3, "moeits-lora": 1}[name]
