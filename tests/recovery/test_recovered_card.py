"""A recovered checkpoint's card says that it was trained, on what, and what that won."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from moeprune import Budget
from moeprune.cli.app import app
from moeprune.models.surgery import PROVENANCE, recoveries_of, steps_of
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.recovery import recover, training
from moeprune.pipeline.seen import seen_domains
from moeprune.pipeline.stages import prune
from support import tensor_digests


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

    # and what is made from it: the training is not forgotten, what was measured does not go along
    (out / "evaluation.json").write_text("{}")
    prune(out, "moeits", Budget(ratio=0.25), tmp_path / "again")
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert "recovered" in again.data.tags and told["data"]["hash"] in again.text
    assert ", trained again, then `moeits`" in again.text
    assert "not trained after pruning" in again.text and "then trained again." not in again.text
    assert recoveries_of(tmp_path / "again") == [told] and len(steps_of(tmp_path / "again")) == 2
    assert seen_domains(tmp_path / "again") == seen_domains(out) == {"english"}
    assert not {"evaluation.json", "moeprune_recovery.jsonl"} & {
        file.name for file in (tmp_path / "again").iterdir()
    }


@pytest.mark.parametrize("options", [{}, {"layerwise": True, "objective": "router"}])
def test_the_command_in_the_card_makes_the_same_bytes(
    teacher: Path, students: dict[str, Path], text: Text, tmp_path: Path, options: dict[str, Any]
) -> None:
    out, again = tmp_path / "healed", tmp_path / "again"
    chosen = training("router-kd", None, {"steps": 2, "batch": 4, "seed": 3, **options})
    mixed = Text(text.sources, 20, 32, 3, (("english", 2.0),))
    recover(students["merged"], teacher, out, chosen, mixed)
    (told,) = re.findall(r"Recovery again: `moeprune (.*)`", (out / "README.md").read_text())
    places = {"STUDENT": students["merged"], "teacher": teacher, "OUT": again}
    places["english=FILE"] = Path(text.sources[0])
    words = [str(places.get(word, word)) for word in shlex.split(told)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert tensor_digests(again) == tensor_digests(out) != tensor_digests(students["merged"])
