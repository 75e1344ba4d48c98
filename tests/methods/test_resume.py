"""Stages that were interrupted and go on: the bytes of a run that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from families import moe_model_types
from methods.conftest import batch_of
from moeprune.core.accumulators import LIGHT
from moeprune.errors import OutputError
from moeprune.models import quirks, walk_state
from moeprune.pipeline import stages
from support import tree

COMPUTE = stages.Compute(dtype="float32", workers=1)
BATCHES = 2
Tiny = Callable[[str], Path]

SEVERAL = ["mixtral", "deepseek_v3", "glm_moe_dsa", "nemotron_h", "zaya"]
"""All layers alike, dense ones too, layers that hand on tuples, layers of several kinds."""

WITHOUT_SITES = ("doge", "jetmoe")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two batches, and a state behind every layer, however long writing takes."""
    monkeypatch.setattr(walk_state, "_SHARE", 1e9)
    with batch_of(monkeypatch, 12 * 32):
        yield


def stopping(after: int) -> Callable[[str, int, int], None]:
    """Progress that interrupts a run as soon as it has done so many steps itself."""
    begun: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        begun.append(done)
        if len(begun) > after:
            raise KeyboardInterrupt

    return progress


def in_pieces(run: Callable[..., Any], steps: int) -> list[str]:
    """Start ``run(progress, note)`` again and again, interrupted after so many steps each time.

    Returns:
        what was noted.
    """
    notes: list[str] = []
    for _ in range(50):
        try:
            run(stopping(steps), notes.append)
        except KeyboardInterrupt:
            continue
        return notes
    raise AssertionError("no progress")


def calibrating(source: Path, out: Path, text: stages.Text, *more: str) -> Callable[..., Any]:
    def run(progress: Any = lambda *step: None, note: Any = print) -> None:
        stages.calibrate(source, out, text, (*LIGHT, *more), COMPUTE, progress=progress, note=note)

    return run


def check_calibration(source: Path, text: stages.Text, folder: Path, *more: str) -> list[str]:
    """Interrupted behind every layer or uninterrupted, the same; returns the notes."""
    calibrating(source, folder / "whole", text, *more)()
    notes = in_pieces(calibrating(source, folder / "pieces", text, *more), BATCHES)
    assert tree(folder / "pieces") == tree(folder / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["pieces", "whole"]
    return notes


@pytest.mark.parametrize("model_type", SEVERAL)
def test_calibration_goes_on_behind_every_layer(
    model_type: str, tiny: Tiny, text: stages.Text, tmp_path: Path
) -> None:
    more = ["residual"] if model_type == "mixtral" else []
    notes = check_calibration(tiny(model_type), text, tmp_path, *more)
    layers = 6 if model_type == "nemotron_h" else 4
    gone_on = [note for note in notes if note.startswith("going on after")]
    wanted = [f"going on after {n} of {layers} layers (calibration" for n in range(1, layers)]
    assert [note.split(" interrupted")[0] for note in gone_on] == wanted
