"""Evaluations that were interrupted and go on: the numbers of one that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moeprune.core.budget import Budget
from moeprune.errors import OutputError
from moeprune.evaluation import perplexity
from moeprune.models import walk_state
from moeprune.pipeline import stages
from support import tree

COMPUTE = stages.Compute(dtype="float32", workers=1)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches of two windows, and everything is kept, however long writing takes."""
    monkeypatch.setattr(walk_state, "_SHARE", 1e9)
    monkeypatch.setattr(perplexity, "_TOKENS_PER_BATCH", 128)
    yield


def evaluating(out: Path | None, smaller: Path, english: Path, **more: Any) -> Callable[..., Any]:
    def run(progress: Any = lambda *step: None, note: Any = print) -> dict[str, Any]:
        text = stages.Text((str(english),), **{"sequences": 4, "length": 64, **more})
        found = stages.evaluate(smaller, "demo", text, COMPUTE, progress, resume=out, note=note)
        del found["seconds"]
        return found

    return run


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "smaller"
    stages.prune("demo", "random", Budget(ratio=0.5), out, compute=COMPUTE)
    return out


def stopping(at: int) -> Callable[[str, int, int], None]:
    """Progress that interrupts a run at so many steps of all."""

    def progress(what: str, done: int, total: int) -> None:
        if what == "evaluating" and done == at:
            raise KeyboardInterrupt

    return progress


def test_an_evaluation_goes_on_in_walks_and_in_windows(
    smaller: Path, english: Path, tmp_path: Path
) -> None:
    whole = evaluating(None, smaller, english)()
    assert not tree(tmp_path)
    out = tmp_path / "kept"
    layers, batches = 6, 2
    notes: list[str] = []
    walks = 2 * layers * batches
    for step in (3, layers * batches + 5, walks + 1, walks + batches):
        with pytest.raises(KeyboardInterrupt):
            evaluating(out, smaller, english)(stopping(step), notes.append)
        assert (tmp_path / "kept.evaluation").is_dir()
    assert evaluating(out, smaller, english)(stopping(1), notes.append) == whole
    told = [note.split(" layers")[0] for note in notes if note.startswith("going on")]
    assert told == [f"going on after {n} of 6" for n in (1, 6, 2, 6, 6)], notes
    assert not tree(tmp_path)


def test_another_text_is_not_mixed_in(smaller: Path, english: Path, tmp_path: Path) -> None:
    out = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        evaluating(out, smaller, english)(stopping(3))
    with pytest.raises(OutputError, match="text was") as caught:
        evaluating(out, smaller, english, sequences=3)()
    assert "--resume" in caught.value.hint
