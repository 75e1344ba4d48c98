"""Stages that were interrupted and go on: the bytes of a run that was not."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from families import moe_model_types, save_tiny
from methods.conftest import batch_of
from moeprune.core.accumulators import LIGHT
from moeprune.errors import OutputError
from moeprune.models import quirks, walk_state
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.kept_statistics import KeptStatistics
from moeprune.models.loading import LayeredModel
from moeprune.pipeline import stages
from support import tree

COMPUTE = stages.Compute(dtype="float32", workers=1)
BATCHES = 2
Tiny = Callable[[str], Path]

SEVERAL = ["mixtral", "deepseek_v3", "glm_moe_dsa", "nemotron_h", "zaya"]
"""All layers alike, dense ones too, layers that hand on tuples, layers of several kinds."""

REST = {*moe_model_types()} - {*SEVERAL, "doge", "jetmoe", "inkling2_text"}
"""The first two have no statistics, the third is below."""


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two batches, and a state behind every layer, however long writing takes."""
    monkeypatch.setattr(walk_state, "_SHARE", 1e9)
    with batch_of(monkeypatch, 12 * 32):
        yield


def stopping(after: int) -> Callable[[str, int, int], None]:
    """Progress that interrupts a run as soon as it has walked so many steps itself."""
    begun: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if what in ("walking", "evaluating"):
            begun.append(done)
        if len(begun) > after:
            raise KeyboardInterrupt

    return progress


def behind_a_layer() -> Callable[[str, int, int], None]:
    """Progress that interrupts a run in the layer behind the first one that it walks."""
    return stopping(BATCHES)


def in_pieces(run: Callable[..., Any], interrupting: Callable[[], Any]) -> list[str]:
    """Start ``run(progress, note)`` again and again, interrupted by that progress each time.

    Returns:
        what was noted.
    """
    notes: list[str] = []
    for _ in range(50):
        try:
            run(interrupting(), notes.append)
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
    notes = in_pieces(calibrating(source, folder / "pieces", text, *more), behind_a_layer)
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
    assert [note.split(" was interrupted")[0] for note in gone_on] == wanted


def test_any_step_may_be_the_last(tiny: Tiny, text: stages.Text, tmp_path: Path) -> None:
    """Also between two batches, and where no layer was done yet."""
    source = tiny("olmoe")
    calibrating(source, tmp_path / "whole", text)()
    for steps in (2 * BATCHES + 1, 4 * BATCHES - 1):
        out = tmp_path / str(steps)
        with pytest.raises(KeyboardInterrupt):
            calibrating(source, out, text)(stopping(steps))
        assert not out.exists()
        calibrating(source, out, text)()
        assert tree(out) == tree(tmp_path / "whole")


def test_nothing_is_walked_again_once_all_layers_are_done(
    tiny: Tiny, text: stages.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("olmoe")
    calibrating(source, tmp_path / "whole", text, "residual")()
    run = calibrating(source, tmp_path / "out", text, "residual")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KeptStatistics, "publish", interrupt)
        run()
    run(stopping(0))  # which interrupts at the first step, if there is one
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_run_that_was_cut_after_its_output_had_appeared(
    tiny: Tiny, text: stages.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = calibrating(tiny("olmoe"), tmp_path / "out", text)
    publish = KeptStatistics.publish

    def cut(*arguments: Any) -> None:
        publish(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(KeptStatistics, "publish", cut)
        run()
    before = tree(tmp_path / "out")
    run(stopping(0))
    assert tree(tmp_path) == {"out": "directory", **{f"out/{k}": v for k, v in before.items()}}


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("damage", "name"),
    [("cut", "walk/layer-00001"), ("flip", "output/layer-00001"), ("cut", "run")],
)
def test_damage_is_told_and_made_again(
    damage: str, name: str, tiny: Tiny, text: stages.Text, tmp_path: Path
) -> None:
    source, out = tiny("olmoe"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrating(source, out, text)(stopping(2 * BATCHES))
    [file] = (tmp_path / "out.calibration").glob(f"{name}.*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    notes: list[str] = []
    calibrating(source, out, text)(note=notes.append)
    assert "is damaged" in notes[0]
    # the state before the damaged one; or layer 0 is done, and there is the state behind it
    assert name == "run" or notes[1].startswith("going on after 1 of 4 layers")
    calibrating(source, tmp_path / "whole", text)()
    assert tree(out) == tree(tmp_path / "whole")


def test_other_inputs_are_refused(tiny: Tiny, text: stages.Text, tmp_path: Path) -> None:
    source, out = tiny("olmoe"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrating(source, out, text)(stopping(2 * BATCHES))
    for other, what in (
        (calibrating(tiny("mixtral"), out, text), "model was"),
        (calibrating(source, out, replace(text, sequences=20)), "text was"),
        (calibrating(source, out, replace(text, seed=7)), "seed was 1, now 7"),
        (calibrating(source, out, text, "residual"), "collect was"),
    ):
        with pytest.raises(OutputError, match=what) as caught:
            other()
        assert "--force" in caught.value.hint and not out.exists()
    calibrating(source, out, text)()


def test_a_full_disk_ends_the_keeping_and_not_the_walk(
    tiny: Tiny, text: stages.Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(walk_state, "write_file", full)
    notes: list[str] = []
    calibrating(tiny("olmoe"), tmp_path / "out", text)(note=notes.append)
    assert len(notes) == 1 and notes[0].startswith("the state of the walk can no longer be kept")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_states_go_where_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.1, 22.9, 23.1])
    monkeypatch.setattr(walk_state.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(walk_state, "_SHARE", 0.1)
    pace = walk_state.Pace()
    assert pace.due()  # nobody knows yet what writing takes
    pace.written(1.0)  # two seconds
    assert [pace.due() for _ in range(3)] == [False, False, True]


def test_families_that_hand_on_more_than_outputs_start_again(
    tiny: Tiny, text: stages.Text, tmp_path: Path
) -> None:
    source, out = tiny("inkling2_text"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        calibrating(source, out, text)(stopping(2 * BATCHES))
    assert not [*(tmp_path / "out.calibration").glob("walk/*")]
    notes: list[str] = []
    calibrating(source, out, text)(note=notes.append)
    reason = quirks.STATE_ASIDE["inkling2_text"][1]
    assert notes == [f"calibration walks all layers again: {reason}"]
    calibrating(source, tmp_path / "whole", text)()
    assert tree(out) == tree(tmp_path / "whole")


def test_families_that_only_some_configurations_of_hand_on_more(tmp_path: Path) -> None:
    shared = {"num_kv_shared_layers": 2}
    for more, whole in (({}, True), (shared, False)):
        folder = tmp_path / str(whole)
        model = LayeredModel(Checkpoint.open(save_tiny("gemma4_text", folder, **more)))
        assert (walk_state.refusal(model) is None) == whole


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(REST))
def test_every_architecture(model_type: str, tiny: Tiny, text: stages.Text, tmp_path: Path) -> None:
    notes = check_calibration(tiny(model_type), text, tmp_path)
    assert any(note.startswith("going on after 2 of") for note in notes)
