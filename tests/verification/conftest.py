"""Clean checkpoints that are written once and copied to be spoiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bases import (
    Base,
    applied,
    deleted,
    masked,
    masked_2_of_4,
    replaced,
    save_fp8,
    save_mxfp4,
    save_with_head,
    save_without_head,
    uneven,
    uneven_masked,
)

from families import save_tiny
from moeprune.models.checkpoint import demo_path

SPECIAL: dict[str, Callable[[Path], Path]] = {
    "fp8": save_fp8,
    "mxfp4": save_mxfp4,
    "with-head": save_with_head,
    "deepseek_v3": save_without_head,
}
EDITS = {
    "deleted": deleted, "replaced": replaced, "masked": masked, "masked-2-of-4": masked_2_of_4,
    "uneven": uneven, "padded": uneven, "padded-masked": uneven_masked,
}  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A clean checkpoint: ``demo``, a family, or ``<family>/<edit>``; do not write into it."""
    saved: dict[str, Path] = {"demo": demo_path()}

    def get(name: str) -> Path:
        if name not in saved:
            directory = tmp_path_factory.mktemp("base") / "checkpoint"
            source, _, edit = name.partition("/")
            if edit:
                saved[name] = applied(
                    get(source), directory, EDITS[edit], edit.startswith("padded")
                )
            elif source in SPECIAL:
                saved[name] = SPECIAL[source](directory)
            else:
                saved[name] = save_tiny(source, directory)
        return saved[name]

    return get


@pytest.fixture
def copy(base: Base, tmp_path: Path) -> Base:
    """A copy of a clean checkpoint, to be spoiled."""

    def get(name: str) -> Path:
        return Path(shutil.copytree(base(name), tmp_path / "copy"))

    return get


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Rounding of a matrix product may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
