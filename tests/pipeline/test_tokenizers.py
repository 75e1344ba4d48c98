"""Teacher and student must read the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeprune.errors import DataError
from moeprune.models.checkpoint import Checkpoint, demo_path
from moeprune.pipeline.tokenizers import refuse_other_tokenizer

NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def other(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Checkpoint]:
    """The demo with a tokenizer that was changed."""

    def make(change: Callable[[dict[str, Any]], None]) -> Checkpoint:
        folder = tmp_path / "other"
        shutil.copytree(demo_path(), folder)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        change(content)
        file.write_text(json.dumps(content), encoding="utf-8")
        return Checkpoint.open(folder)

    return make


def swap(content: dict[str, Any]) -> None:
    """Two tokens change places."""
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]


def unmerge(content: dict[str, Any]) -> None:
    """The same tokens, but most are never made."""
    content["model"]["merges"] = content["model"]["merges"][:50]


def test_a_copy_is_the_same(other: Any) -> None:
    refuse_other_tokenizer(other(lambda content: None), Checkpoint.open("demo"))


@pytest.mark.parametrize(
    ("change", "says"),
    [(swap, r"token 30[01] is '.*' to the teacher and"), (unmerge, r"becomes \d+ tokens for")],
)
def test_a_changed_one_is_refused(other: Any, change: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"different tokenizers: .*{says}") as caught:
        refuse_other_tokenizer(other(change), Checkpoint.open("demo"))
    assert "--teacher" in caught.value.hint
