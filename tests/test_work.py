"""What a long stage keeps: never mixed with other inputs, never used when it is damaged."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeprune import work
from moeprune.errors import MoepruneError, OutputError
from moeprune.files import locked, mend, new_directory, refuse_existing, write_together
from moeprune.work import WorkFolder, refuse_finished, work_folder
from support import tree

IDENTITY = {"model": "abc", "options": {"tokens": 64}, "seed": 0}


def begin(out: Path, *names: str) -> Path:
    """A run that was interrupted after it kept these files; returns its folder."""
    with pytest.raises(KeyboardInterrupt), work_folder(out, "writing", IDENTITY) as folder:
        for name in names:
            folder.write(name, name.encode() * 100)
        (folder.temporary("cut")).write_bytes(b"half")
        raise KeyboardInterrupt
    return out.parent / f"{out.name}.writing"


def test_goes_on_from_what_is_kept_and_goes_when_the_block_succeeds(tmp_path: Path) -> None:
    path = begin(tmp_path / "out", "a", "sub/b")
    assert not [name for name in tree(tmp_path) if name.endswith(".partial")]
    with work_folder(tmp_path / "out", "writing", dict(reversed(IDENTITY.items()))) as folder:
        assert folder.names() == ["a", "sub/b"]
        assert folder.read("sub/b") == b"sub/b" * 100
        assert folder.find("cut") is None
        folder.write("a", b"new")
        assert folder.read("a") == b"new"
    assert not path.exists()


def test_nothing_is_left_of_a_run_that_kept_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "deep" / "out")
    assert not tree(tmp_path)


def test_a_directory_that_was_being_made_does_not_stand_in_the_way(tmp_path: Path) -> None:
    part = begin(tmp_path / "out", "a") / ".plan.x.partial" / "inner"
    part.mkdir(parents=True)
    with work_folder(tmp_path / "out", "writing", IDENTITY) as folder:
        assert folder.names() == ["a"] and not part.parent.exists()


def test_nothing_is_promised_of_a_directory_that_goes(tmp_path: Path) -> None:
    notes: list[str] = []
    with (
        pytest.raises(KeyboardInterrupt),
        new_directory(tmp_path / "whole") as outer,
        work_folder(outer / "out", "writing", IDENTITY, note=notes.append) as folder,
    ):
        folder.write("a", b"a")
        raise KeyboardInterrupt
    assert not notes and not tree(tmp_path)


def test_a_removal_that_was_cut_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
        work_folder(out, "writing", IDENTITY) as folder,
    ):
        folder.write("a", b"a")
        (folder.clean_output() / "moeprune.json").write_bytes(b"{}")
        folder.publish()
        patch.setattr(work.shutil, "rmtree", killed)
    assert {"run.json", "publishing", "sums"} <= {file.name for file in folder.path.iterdir()}
    with work_folder(out, "writing", IDENTITY) as folder:
        assert folder.published
    assert not folder.path.exists() and out.is_dir()


def test_other_inputs_are_refused_by_name_until_forced(tmp_path: Path) -> None:
    out, other = tmp_path / "out", {**IDENTITY, "options": {"tokens": 128}}
    begin(out, "a")
    with (
        pytest.raises(OutputError, match=r'options was {"tokens": 64}, now {"tokens": 128}'),
        work_folder(out, "writing", other),
    ):
        pass
    with work_folder(out, "writing", IDENTITY, force=True) as folder:
        assert folder.names() == ["a"]
    begin(out, "a")
    with work_folder(out, "writing", other, force=True) as folder:
        assert folder.names() == [] and folder.find("a") is None


def test_a_clearing_that_was_cut_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--force`` over what other inputs left, killed in between: still ours, and not finished."""
    out, other = tmp_path / "out", {**IDENTITY, "seed": 1}
    path = begin(out, "a", "output/b", "walk/c")
    (path / "publishing").touch()
    out.mkdir()  # of nobody knows what, and not of that run
    rmtree = work.shutil.rmtree

    def killed(place: Path, **named: Any) -> None:
        rmtree(place, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(work.shutil, "rmtree", killed)
        with work_folder(out, "writing", other, force=True):
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (path / "output").exists() and (path / "sums").exists()
    with work_folder(out, "writing", IDENTITY) as folder:
        assert not folder.published and folder.find("output/b") is None
    begin(out, "a")
    with work_folder(out, "writing", other, force=True) as folder:
        assert folder.names() == []


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 5)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["a", "sums/a.json", "run.json"])
def test_damage_is_found_and_told(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = begin(tmp_path / "out", "a")
    notes: list[str] = []
    damage(path / name)
    if name == "run.json" and damage is Path.unlink:  # then nothing says that it is ours
        with pytest.raises(OutputError, match="does not look like ours"), _again(tmp_path, notes):
            pass
        return
    with _again(tmp_path, notes) as folder:
        assert folder.find("a") is None and folder.names() == []
    assert any("damaged" in note for note in notes) is not (
        name == "sums/a.json" and damage is Path.unlink
    )


def _again(tmp_path: Path, notes: list[str]):  # type: ignore[no-untyped-def]
    return work_folder(tmp_path / "out", "writing", IDENTITY, note=notes.append)


def test_errors_say_what_is_kept(tmp_path: Path) -> None:
    out, notes = tmp_path / "out", []
    with (
        pytest.raises(OutputError, match=r"disk full.*\n.*what is done is kept in .*out.writing"),
        work_folder(out, "writing", IDENTITY) as folder,
    ):
        folder.write("a", b"1")
        raise OSError(errno.ENOSPC, "full")
    with (
        pytest.raises(MoepruneError, match=r"^bad input$"),
        work_folder(out, "writing", IDENTITY, note=notes.append) as folder,
    ):
        raise MoepruneError("bad input")
    assert "the same command goes on" in notes[0]


def test_two_runs_exclude_each_other(tmp_path: Path) -> None:
    with (
        work_folder(tmp_path / "out", "writing", IDENTITY) as folder,
        pytest.raises(OutputError, match="another process works in"),
        work_folder(tmp_path / "out", "writing", IDENTITY, force=True),
    ):
        pass
    assert isinstance(folder, WorkFolder) and not tree(tmp_path)


def test_foreign_directory_is_spared(tmp_path: Path) -> None:
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "out.writing" / "mine").touch()
    with (
        pytest.raises(OutputError, match="does not look like ours"),
        work_folder(tmp_path / "out", "writing", IDENTITY, force=True),
    ):
        pass
    assert (tmp_path / "out.writing" / "mine").exists()


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\nfrom moeprune.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -9
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path), pytest.raises(OutputError), locked(tmp_path):
        pass
    assert not tree(tmp_path)


def test_what_killed_processes_left_is_swept_and_what_lives_is_spared(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    (tmp_path / ".out.x.partial").mkdir()
    (tmp_path / ".file.x.partial").touch()
    (tmp_path / ".out.y.old").mkdir()
    (tmp_path / ".out.y.old" / "content").mkdir()
    (tmp_path / ".out.y.old" / "content" / "moeprune.json").write_text("old")
    with new_directory(out, force=True) as first:
        assert (out / "moeprune.json").read_text() == "old"  # it had been moved aside
        with new_directory(out, force=True) as second:
            assert first.exists()
            (second / "moeprune.json").write_text("second")
        (first / "moeprune.json").write_text("first")
    write_together({file: b"x"})
    assert tree(tmp_path).keys() == {"out", "out/moeprune.json", "file"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_cut_around_the_appearance_of_the_output(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.rename
    refuse_finished(out, "writing")

    def rename(old: Path, new: Path) -> None:
        if when == "after":
            real(old, new)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), work_folder(out, "writing", IDENTITY) as folder:
        folder.write("output/moeprune.json", b"x")
        monkeypatch.setattr(os, "rename", rename)
        folder.publish()
    monkeypatch.undo()
    refuse_finished(out, "writing")
    with work_folder(out, "writing", IDENTITY) as folder:
        assert folder.published is (when == "after")
        if not folder.published:
            refuse_existing(out, force=False)
            assert folder.find("output/moeprune.json")
            folder.publish()
    assert tree(tmp_path).keys() == {"out", "out/moeprune.json"}
    with pytest.raises(OutputError, match="output exists"):
        refuse_finished(out, "writing")


def test_an_output_that_was_replaced_goes_although_its_run_was_cut(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), work_folder(out, "writing", IDENTITY) as folder:
        folder.write("output/moeprune.json", b"new")
        folder.publish()
        aside = tmp_path / ".out.abcd1234.old" / "content"  # what a kill leaves behind the rename
        aside.mkdir(parents=True)
        (aside / "moeprune.json").write_bytes(b"old")
        raise KeyboardInterrupt
    with work_folder(out, "writing", IDENTITY, force=True) as folder:
        assert folder.published
    assert tree(tmp_path).keys() == {"out", "out/moeprune.json"}
    assert (out / "moeprune.json").read_bytes() == b"new"


def test_an_output_that_was_moved_aside_comes_back_to_its_own_name(tmp_path: Path) -> None:
    """And is neither given to, nor swept away for, one whose name begins the same."""
    aside = tmp_path / ".out.v2.abcd1234.old" / "content"
    aside.mkdir(parents=True)
    (aside / "moeprune.json").write_text("old")
    for _ in range(2):
        with new_directory(tmp_path / "out", force=True) as folder:
            (folder / "moeprune.json").write_text("new")
    assert (aside / "moeprune.json").read_text() == "old"
    mend(tmp_path / "out.v2")
    assert (tmp_path / "out.v2" / "moeprune.json").read_text() == "old"
    assert not aside.parent.exists()
