"""A recovered checkpoint's card says that it was trained, on what, and what that won."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCard

from moeprune.models.surgery import PROVENANCE
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.recovery import recover, training


def test_card_of_a_recovered_model(
    teacher: Path, students: dict[str, Path], text: Text, tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    chosen = training("router-kd", options={"steps": 2, "batch": 4, "learning_rate": 1e-4})
    recover(students["dropped"], teacher, out, chosen, text)
    found = ModelCard.load(out / "README.md")
    assert {"recovered", "pruned"} <= set(found.data.tags)
    (told,) = json.loads((out / PROVENANCE).read_text())["recovered"]
    before, after = told["held"]
    assert f"held-out kl {before:.4f} → {after:.4f}" in found.text
    assert "then trained again" in found.text and "not trained after pruning" not in found.text
    assert told["data"]["hash"] in found.text
    assert "moeprune recover STUDENT --how router-kd --teacher teacher" in found.text
    assert "--data english=FILE --sequences" in found.text and "--steps 2" in found.text
    student = ModelCard.load(students["dropped"] / "README.md")
    assert "recovered" not in student.data.tags
