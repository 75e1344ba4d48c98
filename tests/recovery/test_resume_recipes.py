"""Recipes that were cut and go on: the bytes of a run that was not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeprune import MoepruneError, OutputError
from moeprune.files import locked
from moeprune.models import walk_state
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.kept_steps import KeptSteps
from moeprune.pipeline.recipes.run import run
from recovery.test_recipe_recovery import SHORT, step, write
from support import tree

STEPS = (
    "  - {method: frequency, budget: {keep: 6}}\n"
    "  - {method: moe-pruner, options: {propagate: dense}, budget: {ratio: 0.5},\n"
    "     statistics: project}\n"
    + step("router-kd", **{**SHORT, "steps": 4}, save_every=1, sequences=20, length=32)
    + "  - {method: magnitude, budget: {ratio: 0.25}}\n"
)
MEASURED = "evaluation: {{data: [{}], sequences: 2, length: 32}}\n"
CLOCKED = ("moeprune.json", "README.md", "moeprune_recovery.jsonl")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state behind every layer, however long writing takes."""
    monkeypatch.setattr(walk_state, "_SHARE", 1e9)


def recipe(folder: Path, model: Path, text: Text, steps: str = STEPS) -> Path:
    folder.mkdir(exist_ok=True)
    return write(folder, model, text, steps, "out: out\n" + MEASURED.format(*text.sources))


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


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, text: Text
) -> tuple[Path, dict[str, Any], list[Path]]:
    """A run that was not cut: its folder, its result, and what a kill at some moments leaves."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    left: list[Path] = []

    def snapshot() -> None:
        left.append(folder.parent / f"killed-{len(left)}" / "run")
        shutil.copytree(folder, left[-1])

    moments = [("walking", 1), ("writing", None), ("training", 2), ("evaluating", 1)]

    def progress(what: str, done: int, total: int) -> None:
        if moments and what == moments[0][0] and moments[0][1] in (None, done):
            moments.pop(0)
            snapshot()

    save = KeptSteps.save

    def around(self: KeptSteps, number: int, told: Any) -> None:
        if number == 0:
            snapshot()  # the checkpoint is there, and nothing says so
        save(self, number, told)
        if number == 3:
            snapshot()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk_state, "_SHARE", 1e9)
        patch.setattr(KeptSteps, "save", around)
        result = run(recipe(folder, teacher, text), progress=progress)
    assert not moments and {path.name for path in folder.iterdir()} == {"out", "recipe.yaml"}
    return folder, result, left


# by the moment of the kill: what is not done again
DONE = [
    set[str](),
    {"walking"},
    {"walking"},
    {"walking"},
    {"walking", "planning", "training", "writing"},
    {"walking", "planning", "training", "writing"},
]


@pytest.mark.parametrize("moment", range(len(DONE)))
def test_killed(whole: tuple[Path, dict[str, Any], list[Path]], moment: int) -> None:
    folder, result, left = whole
    place = left[moment]
    told = Told()
    again = run(place / "recipe.yaml", progress=told)
    assert made(place / "out") == made(folder / "out")
    assert {path.name for path in place.iterdir()} == {"out", "recipe.yaml"}
    assert not DONE[moment] & {*told.seen}

    def facts(found: dict[str, Any]) -> Any:
        steps = [{**one, "seconds": 0, "result": 0} for one in found["steps"]]
        return steps, {**found["evaluation"], "seconds": 0}

    assert facts(again) == facts(result)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def test_interrupted(
    whole: tuple[Path, dict[str, Any], list[Path]],
    teacher: Path,
    text: Text,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, work = recipe(tmp_path, teacher, text), tmp_path / "out.recipe"
    with pytest.raises(KeyboardInterrupt):
        run(path, progress=Told("training", 3, do=interrupt))
    kept = {entry.name for entry in work.iterdir()}
    assert {"step-1.json", "step-2.json", "step-2", "step-3.recovery", "statistics-0"} <= kept
    assert not {"step-1", "step-3", "out"} & kept and not (tmp_path / "out").exists()
    assert not [name for name in tree(tmp_path) if name.endswith(".partial")]

    before = tree(tmp_path)
    recipe(tmp_path, teacher, text, STEPS.replace("ratio: 0.25", "ratio: 0.5"))
    with pytest.raises(OutputError, match=r'step 4 budget was {"ratio": 0.25}, now') as caught:
        run(path)
    assert "--force" in caught.value.hint
    recipe(tmp_path, teacher, text)
    with locked(work), pytest.raises(OutputError, match="another process works in"):
        run(path)
    assert tree(tmp_path) == before

    for file in ("step-2/model.safetensors", "step-3.recovery/state/values.safetensors"):
        flip(work / file)
    told = Told()
    run(path, progress=told)
    assert "step-2 is damaged, and is made again" in caplog.text
    assert "values.safetensors is damaged" in caplog.text and "begins again" in caplog.text
    assert "walking" not in told.seen
    assert made(tmp_path / "out") == made(whole[0] / "out")
    with pytest.raises(OutputError, match="output exists"):
        run(path)


def test_force_begins_anew_and_kept_steps_appear_together(
    teacher: Path, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = STEPS[: STEPS.index("  - recover")]
    path, keep = recipe(tmp_path, teacher, text, steps), tmp_path / "between"
    with pytest.raises(KeyboardInterrupt):
        run(path, progress=Told("walking", 1, do=interrupt))
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
    assert {*told.seen} <= {"evaluating"}
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {"recipe.yaml", "out", "between"}
    assert {entry.name for entry in keep.iterdir()} == {"step-1"}


def test_what_would_fail_again_is_not_kept(teacher: Path, text: Text, tmp_path: Path) -> None:
    steps = STEPS[: STEPS.index("  - recover")] + "  - {method: moeits, budget: {keep: 7}}\n"
    path = recipe(tmp_path, teacher, text, steps)
    with pytest.raises(MoepruneError, match=r"step 3 \(moeits\)"):
        run(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"recipe.yaml"}
