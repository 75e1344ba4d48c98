"""Tiny teachers with the embedded tokenizer, students of every kind, a page of text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from families import save_tiny
from moeprune.pipeline.inputs import Text
from recovering import KINDS, prune, with_tokenizer
from running import page


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared inputs of this process stand; tests must not write into it."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture(scope="session")
def teacher(shelf: Path) -> Path:
    """A random qwen3_moe: 8 experts, stored one by one."""
    return with_tokenizer(
        save_tiny("qwen3_moe", shelf / "teacher", vocab_size=6144, num_hidden_layers=2)
    )


@pytest.fixture(scope="session")
def text(shelf: Path) -> Text:
    """Some 40 sequences of 32 tokens."""
    return Text((str(page(shelf, "english", 6_000)),), 40, 32)


@pytest.fixture(scope="session")
def students(shelf: Path, teacher: Path) -> dict[str, Path]:
    """The teacher after each kind of pruning."""
    return {kind: prune(teacher, kind, shelf / kind) for kind in KINDS}
