"""A page of text and one thread: rounding may depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
def english(shelf: Path) -> Path:
    """A little of the embedded English text."""
    return page(shelf, "english", 4_000)


@pytest.fixture(scope="session")
def german(shelf: Path) -> Path:
    """A little of the German."""
    return page(shelf, "german", 2_000)
