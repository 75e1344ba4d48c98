"""Recipes that were cut and go on: the bytes of a run that was not."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeprune.errors import MoepruneError, OutputError
from moeprune.files import locked
from moeprune.models import walk_state
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.kept_steps import KeptSteps
from moeprune.pipeline.recipes.run import run
from moeprune.recovery import state
from recovery.test_recipe_recovery import SHORT, step, write
from support import tree

STEPS = (
    "  - {method: frequency, budget: {keep: 6}}\n"
    "  - {method: moe-pruner, options: {propagate: dense}, budget: {ratio: 0.5},\n"
    "     statistics: project}\n"
    + step("router-kd", **{**SHORT, "steps": 4}, save_every=1, sequences=12, length=16)
)
BRIEF = "  - {method: random, budget: {keep: 6}}\n  - {method: magnitude, budget: {ratio: 0.5}}\n"
MOMENTS = [("walking", 1), ("training", 2), ("evaluating", 1)]
CLOCKED = ("moeprune.json", "README.md", "moeprune_recovery.jsonl")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state behind every layer, however long writing takes."""
    monkeypatch.setattr(walk_state, "_SHARE", 1e9)


def recipe(
    folder: Path, model: Path, text: Text, steps: str = STEPS, more: str = "out: out\n"
) -> Path:
    folder.mkdir(exist_ok=True)
    return write(folder, model, text, steps, more)


def measured(text: Text) -> str:
    return f"out: out\nevaluation: {{data: [{text.sources[0]}], sequences: 2, length: 16}}\n"


def made(out: Path) -> dict[str, str]:
    """Hashes of all files, without what a clock says."""
    found = tree(out)
    for name in CLOCKED:
        if (out / name).is_file():
            content = "".join(
                line
                for line in (out / name).read_text(encoding="utf-8").splitlines(keepends=True)
                if "second" not in line or name.endswith("jsonl")
            )
            if name.endswith("jsonl"):
                lines = [json.loads(line) for line in content.splitlines()]
                content = str([{k: v for k, v in x.items() if k != "seconds"} for x in lines])
            found[name] = hashlib.sha256(content.encode()).hexdigest()
    return found


class Told:
    """Progress that notes what is done, and does something at one moment of it."""

    def __init__(self, *moment: Any, do: Callable[[], None] | None = None) -> None:
        self.moment, self.do, self.seen = moment, do, list[str]()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.seen[-1:] != [what]:
            self.seen.append(what)
        if self.do is not None and (what, done) == self.moment[:2]:
            do, self.do = self.do, None
            do()


def interrupt() -> None:
    raise KeyboardInterrupt


Whole = tuple[Path, dict[str, Any], dict[str, Path]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, text: Text) -> Whole:
    """A run that was not cut: its folder, its result, and what a kill at some moments leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    left: dict[str, Path] = {}

    def snapshot(name: str) -> None:
        left[name] = folder.parent / name / "run"
        shutil.copytree(folder, left[name])

    def progress(what: str, done: int, total: int) -> None:
        if (what, done) in MOMENTS and what not in left:
            snapshot(what)

    save = KeptSteps.save

    def noted(self: KeptSteps, number: int, told: Any) -> None:
        if number == 0:
            snapshot("unrecorded")  # the checkpoint is there, and nothing says so
        save(self, number, told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk_state, "_SHARE", 1e9)
        patch.setattr(KeptSteps, "save", noted)
        result = run(recipe(folder, teacher, text, more=measured(text)), progress=progress)
    shutil.copytree(left["training"], folder.parent / "spare")
    assert {path.name for path in folder.iterdir()} == {"out", "recipe.yaml"}
    return folder, result, left


DONE = {
    "walking": set[str](),
    "unrecorded": {"walking"},
    "training": {"walking", "planning"},
    "evaluating": {"walking", "planning", "training", "writing"},
}
"""By the moment of the kill: what is not done again."""


def facts(found: dict[str, Any]) -> Any:
    """What a run tells, without what a clock says."""
    steps = [{**one, "seconds": 0, "result": 0} for one in found["steps"]]
    return steps, {**found["evaluation"], "seconds": 0}


@pytest.mark.parametrize("moment", DONE)
def test_killed(whole: Whole, moment: str) -> None:
    folder, result, left = whole
    told = Told()
    again = run(left[moment] / "recipe.yaml", progress=told)
    assert made(left[moment] / "out") == made(folder / "out")
    assert {path.name for path in left[moment].iterdir()} == {"out", "recipe.yaml"}
    assert not DONE[moment] & {*told.seen}
    assert facts(again) == facts(result)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.fixture
def cut(whole: Whole, tmp_path: Path) -> Path:
    """A copy of what is left of a run that was killed in its recovery."""
    return Path(shutil.copytree(whole[0].parent / "spare", tmp_path / "cut"))


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "full")


def test_cut_by_an_error(
    whole: Whole,
    cut: Path,
    teacher: Path,
    text: Text,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, work = cut / "recipe.yaml", cut / "out.recipe"
    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OutputError, match=r"disk full.*the state of step") as caught:
        run(path)
    monkeypatch.undo()
    kept_there = f"make room; what is done is kept in {work}: run the same command again"
    assert caught.value.hint == kept_there and caught.value.problem.startswith("step 3 (recover")
    kept = {entry.name for entry in work.iterdir()}
    assert {"step-1.json", "step-2.json", "step-2", "output.recovery", "statistics-0"} <= kept
    assert not {"step-1", "step-3", "output"} & kept and not (cut / "out").exists()
    assert not [name for name in tree(cut) if name.endswith(".partial")]

    before = tree(work)
    other = STEPS.replace("ratio: 0.5", "ratio: 0.25")
    recipe(cut, teacher, text, other, measured(text))
    with pytest.raises(OutputError, match=r'step 2 budget was {"ratio": 0.5}, now') as caught:
        run(path)
    assert "--force" in caught.value.hint
    recipe(cut, teacher, text, more=measured(text))
    with locked(work), pytest.raises(OutputError, match="another process works in"):
        run(path)
    assert tree(work) == before

    for file in ("step-2/model.safetensors", "output.recovery/state/values.safetensors"):
        flip(work / file)
    told = Told()
    run(path, progress=told)
    assert "step-2 is damaged, and is made again" in caplog.text
    assert "values.safetensors is damaged" in caplog.text and "begins again" in caplog.text
    assert "walking" not in told.seen
    assert made(cut / "out") == made(whole[0] / "out")
    with pytest.raises(OutputError, match="output exists"):
        run(path)


def test_force_begins_anew_and_kept_steps_appear_together(
    teacher: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, keep = recipe(tmp_path, teacher, text, BRIEF), tmp_path / "between"
    with pytest.raises(KeyboardInterrupt):
        run(path, progress=Told("planning", 2, do=interrupt))
    with pytest.raises(OutputError, match="--keep-steps was false, now true"):
        run(path, keep=keep)
    real = KeptSteps.keep

    def cut(self: KeptSteps, place: Path) -> None:
        real(self, place)
        raise KeyboardInterrupt

    monkeypatch.setattr(KeptSteps, "keep", cut)
    with pytest.raises(KeyboardInterrupt):
        run(path, keep=keep, force=True)
    monkeypatch.undo()
    assert keep.is_dir() and not (tmp_path / "out").exists()
    told = Told()
    run(path, keep=keep, progress=told)
    assert not told.seen
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"recipe.yaml", "out", "between"}
    assert {entry.name for entry in keep.iterdir()} == {"step-1"}


def test_killed_while_its_folder_is_removed(
    teacher: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rmtree = recipe(tmp_path, teacher, text, BRIEF), shutil.rmtree

    def killed(place: Any, **named: Any) -> None:
        if Path(place).name in ("sums", "out.recipe") and (tmp_path / "out").exists():
            raise KeyboardInterrupt
        rmtree(place, **named)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    monkeypatch.undo()
    assert (tmp_path / "out.recipe").is_dir()
    before = tree(tmp_path / "out")
    with pytest.raises(OutputError, match="output exists"):
        run(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml", "out"}
    assert tree(tmp_path / "out") == before


def test_what_would_fail_again_is_not_kept(teacher: Path, text: Text, tmp_path: Path) -> None:
    steps = "  - {method: random, budget: {keep: 6}}\n  - {method: moeits, budget: {keep: 7}}\n"
    path = recipe(tmp_path, teacher, text, steps)
    with pytest.raises(MoepruneError, match=r"step 2 \(moeits\)"):
        run(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml"}
