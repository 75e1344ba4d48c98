"""Outputs appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moeprune.errors import MoepruneError, OutputError
from moeprune.files import (
    json_bytes,
    new_directory,
    refuse_existing,
    sha256_bytes,
    sha256_file,
    write_together,
)
from support import tree

OURS = "moeprune.json"


def fill(folder: Path, text: str = "new") -> None:
    (folder / OURS).write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_bytes(text.encode() * 1000)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output of an earlier run."""
    path = tmp_path / "out"
    path.mkdir()
    fill(path, "old")
    return path


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- directories


def test_directory_appears_when_the_block_succeeds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out) as work:
        assert work.parent == tmp_path and work != out
        fill(work)
        assert not out.exists()
    assert tree(tmp_path).keys() == {"out", f"out/{OURS}", "out/sub", "out/sub/data"}
    assert (out / OURS).read_text() == "new"


def test_parents_are_made(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b" / "out") as work:
        fill(work)
    assert (tmp_path / "a" / "b" / "out" / OURS).is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_directory(tmp_path / "a" / "b" / "out") as work:
        fill(work)
        raise error("in the middle")
    assert tree(tmp_path) == {}


def test_a_failure_keeps_parents_that_others_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="middle"), new_directory(tmp_path / "a" / "out"):
        (tmp_path / "a" / "theirs").write_text("of somebody else")
        raise ValueError("in the middle")
    assert tree(tmp_path).keys() == {"a", "a/theirs"}


def test_existing_directory_is_refused(tmp_path: Path, old: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="output exists"), new_directory(old):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == before


def test_existing_directory_is_replaced_as_a_whole(tmp_path: Path, old: Path) -> None:
    (old / "left over").write_text("x")
    with new_directory(old, force=True) as work:
        fill(work)
        assert (old / OURS).read_text() == "old"
    assert tree(tmp_path).keys() == {"out", f"out/{OURS}", "out/sub", "out/sub/data"}
    assert (old / OURS).read_text() == "new"


def test_failure_keeps_the_existing_directory(tmp_path: Path, old: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="middle"), new_directory(old, force=True) as work:
        fill(work)
        raise ValueError("in the middle")
    assert tree(tmp_path) == before


def test_directory_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="output exists"), new_directory(out) as work:
        fill(work)
        out.mkdir()
        fill(out, "of another run")
    assert (out / OURS).read_text() == "of another run"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["thesis.tex", "config.json", "plan.json"])
def test_force_spares_what_is_not_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="would delete"), new_directory(tmp_path / "out", True):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == before


def test_force_takes_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_directory(tmp_path / "out", force=True) as work:
        fill(work)
    assert (tmp_path / "out" / OURS).is_file()


def test_force_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path, old: Path) -> None:
    before = tree(old)
    (tmp_path / "link").symlink_to(old)
    with new_directory(tmp_path / "link", force=True) as work:
        fill(work)
    assert tree(old) == before
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link" / OURS).read_text() == "new"


def test_rename_that_fails_brings_the_old_directory_back(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(tmp_path)
    real = os.rename

    def fails(source: Path, target: Path) -> None:
        if target == old and ".partial" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OutputError, match="Input/output"), new_directory(old, True) as work:
        fill(work)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left (os error 28)"),
    ],
    ids=["full", "quota", "from Rust"],
)
def test_full_disk_is_said_clearly(tmp_path: Path, old: Path, error: Exception) -> None:
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught, new_directory(old, force=True) as work:
        fill(work)
        raise error
    assert caught.value.problem == f"disk full while writing {old}; nothing was kept"
    assert "free some space" in caught.value.hint
    assert tree(tmp_path) == before


def test_errors_for_the_user_pass_unchanged(tmp_path: Path) -> None:
    error = MoepruneError("the plan does not fit", "plan again")
    with pytest.raises(MoepruneError) as caught, new_directory(tmp_path / "out"):
        raise error
    assert caught.value is error


KILLED = """
import os, signal, sys
from pathlib import Path
from moeprune import files
real = os.fsync
def fsync(handle):
    real(handle)
    if os.environ["WHEN"] == "syncing":
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
out = Path(sys.argv[1])
if out.suffix:
    files.write_together({out: b"new" * 100_000}, force=True)
else:
    with files.new_directory(out, force=True) as work:
        (work / "moeprune.json").write_text("new")
        if os.environ["WHEN"] == "writing":
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("name", "when"), [("out", "writing"), ("out", "syncing"), ("file.json", "syncing")]
)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "replacing"])
def test_killed_in_the_middle(tmp_path: Path, name: str, when: str, existing: bool) -> None:
    out = tmp_path / name
    if existing and out.suffix:
        out.write_text("old")
    elif existing:
        out.mkdir()
        fill(out, "old")
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out)], env={**os.environ, "WHEN": when}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    after = tree(tmp_path)
    assert {path: h for path, h in after.items() if ".partial" not in path} == before
    assert len(after) > len(before), "it was killed before it wrote anything"


# --- files


def test_file_is_written(tmp_path: Path) -> None:
    write_together({tmp_path / "new" / "plan.json": b"content"})
    assert (tmp_path / "new" / "plan.json").read_bytes() == b"content"
    assert tree(tmp_path).keys() == {"new", "new/plan.json"}


def test_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_together({path: b"old"})
    with pytest.raises(OutputError, match="output exists"):
        write_together({path: b"new"})
    assert path.read_bytes() == b"old"
    write_together({path: b"new"}, force=True)
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("call", [1, 2])
def test_files_together_replace_all_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_together({one: b"old", two: b"old"})
    before = tree(tmp_path)
    calls: list[int] = []

    def fails(handle: int) -> None:
        calls.append(handle)
        if len(calls) == call:
            full()

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match=f"disk full while writing {one.parent}"):
        write_together({one: b"new", two: b"new"}, force=True)
    assert tree(tmp_path) == before
    calls.clear()
    monkeypatch.setattr(os, "fsync", calls.append)
    write_together({one: b"new", two: b"new"}, force=True)
    assert one.read_bytes() == two.read_bytes() == b"new"
    assert len(calls) >= 2, "both must be on the disk before they are renamed"


def test_files_together_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "two").write_bytes(b"old")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"output exists: .*two"):
        write_together({tmp_path / "one": b"new", tmp_path / "two": b"new"})
    assert tree(tmp_path) == before


def test_full_disk_leaves_no_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk full"):
        write_together({tmp_path / "a" / "b" / "plan.json": b"x"})
    assert tree(tmp_path) == {}


# --- before the work


@pytest.mark.parametrize("directory", [True, False], ids=["directory", "file"])
def test_output_that_cannot_be_made_is_refused_at_once(tmp_path: Path, directory: bool) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file is a file"):
        refuse_existing(tmp_path / "file" / "deep" / "out", True, directory)
    refuse_existing(tmp_path / "deep" / "out", False, directory)
    assert tree(tmp_path).keys() == {"file"}


def test_file_and_directory_do_not_replace_each_other(tmp_path: Path, old: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file is a file"):
        refuse_existing(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="out is a directory"):
        refuse_existing(old, force=True, directory=False)
    refuse_existing(tmp_path / "file", force=True, directory=False)
    refuse_existing(old, force=True)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_parent(tmp_path: Path) -> None:
    parent = tmp_path / "locked"
    parent.mkdir()
    parent.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="no permission"):
            refuse_existing(parent / "out", force=False)
    finally:
        parent.chmod(0o755)


# --- bytes


def test_json_is_strict_and_stable() -> None:
    assert json_bytes({"b": "ü", "a": 0.1}) == b'{\n "b": "\xc3\xbc",\n "a": 0.1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        json_bytes({"loss": float("nan")})


def test_hashes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 20_000  # more than one block
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == sha256_bytes(content)
    assert sha256_bytes(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
