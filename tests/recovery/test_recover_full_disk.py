"""A disk that is full: an error of two lines, the last good state, and nothing lost."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeprune import recover, training
from moeprune.errors import OutputError
from moeprune.pipeline.inputs import Text
from moeprune.recovery import state, writing
from support import tensor_digests

QUICK = training(
    "full",
    None,
    {"steps": 3, "batch": 2, "learning_rate": 1e-3, "save_every": 1, "evaluate_every": 3,
     "holdout": 0.1},
)  # fmt: skip


def failing(real: Callable[..., Any], good: int) -> Callable[..., Any]:
    """``real`` for the first calls, then a disk that filled up in the middle of a file."""
    left = [good]

    def write(values: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            return real(values, file, *args, **kwargs)
        target = file if isinstance(file, Path) else values
        (target / "part" if target.is_dir() else target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    return write


@pytest.mark.parametrize(
    ("module", "name", "good", "step"),
    [
        (state, "save_file", 3, 1),  # the best at step 0, states 0 and 1; not state 2
        (writing, "write_shards", 0, 3),
    ],
)
def test_nothing_is_lost(
    students: dict[str, Path], text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    module: Any, name: str, good: int, step: int,
) -> None:  # fmt: skip
    student, whole, out = students["dropped"], tmp_path / "whole", tmp_path / "cut"
    recover(student, None, whole, QUICK, text)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), good))
        with pytest.raises(OutputError, match="disk full") as caught:
            recover(student, None, out, QUICK, text)
    assert f"the state of step {step} is kept" in caught.value.problem
    assert "nothing was kept" not in str(caught.value)
    assert "--resume" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "cut.recovery"}
    saved = json.loads((tmp_path / "cut.recovery" / "state" / "manifest.json").read_text())
    assert saved["progress"]["step"] == step
    recover(student, None, out, QUICK, text, resume=True)
    assert tensor_digests(out) == tensor_digests(whole)


def test_no_room_for_a_line_of_the_log(
    students: dict[str, Path], text: Text, tmp_path: Path
) -> None:
    (tmp_path / "out.recovery" / "log.jsonl").mkdir(parents=True)  # as unwritable as a full disk

    def forget(status: Any) -> None:
        pytest.fail("no step is done without its line")

    with pytest.raises(OutputError, match="cannot write"):
        recover(
            students["dropped"], None, tmp_path / "out", QUICK, text, resume=True, listen=forget
        )
