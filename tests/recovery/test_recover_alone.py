"""Two runs for one output exclude each other, and a run that was cut at its very end is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeprune.errors import MoepruneError, OutputError
from moeprune.pipeline import recovery
from moeprune.pipeline.inputs import Text
from moeprune.pipeline.recovery import recover, training
from moeprune.recovery.state import StateFolder
from support import tree

OPTIONS = {"steps": 2, "batch": 2, "holdout": 0.1, "evaluate_every": 2, "save_every": 1}
QUICK = training("full", None, OPTIONS)


def test_two_runs_exclude_each_other_until_one_is_over(
    students: dict[str, Path], text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, refused = tmp_path / "out", []

    def again(status: Any) -> None:
        for more in {}, {"resume": True}, {"force": True}:
            with pytest.raises(OutputError, match="another process works in") as caught:
                recover(students["dropped"], None, out, QUICK, text, **more)
            refused.append(caught.value)

    def killed(folder: StateFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recovery.StateFolder, "delete", killed)
        recover(students["dropped"], None, out, QUICK, text, listen=again)
    assert len(refused) == 6
    whole = tree(out)
    assert (tmp_path / "out.recovery").is_dir()
    with pytest.raises(OutputError, match="output exists"):
        recover(students["dropped"], None, out, QUICK, text, resume=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and tree(out) == whole


@pytest.mark.parametrize(("student", "steps"), [("dropped", 2), ("masked", 3)])
def test_the_state_of_another_run_is_spared(
    student: str, steps: int, students: dict[str, Path], text: Text, tmp_path: Path
) -> None:
    def cut(status: Any) -> None:
        raise KeyboardInterrupt

    other = training("full", None, {**OPTIONS, "steps": steps})
    recover(students[student], None, tmp_path / "other", other, text)
    longer = training("full", None, {**OPTIONS, "steps": 3})
    with pytest.raises(KeyboardInterrupt):
        recover(students["dropped"], None, tmp_path / "out", longer, text, listen=cut)
    (tmp_path / "other").rename(tmp_path / "out")
    with pytest.raises(OutputError, match="output exists"):
        recover(students["dropped"], None, tmp_path / "out", longer, text, resume=True)
    file = tmp_path / "out.recovery" / "state" / "values.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MoepruneError, match="is damaged, or of another run"):
        recover(students["dropped"], None, tmp_path / "out", longer, text, resume=True, force=True)
