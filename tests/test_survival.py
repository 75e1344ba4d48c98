"""A few points of the kill test and a few cycles of the soak; `make survive` runs all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("kill_test.py", "--points", "8", "--seed", "1"),
        ("soak.py", "--cycles", "25", "--seed", "1"),
    ],
    ids=["kill", "soak"],
)
def test_what_a_process_leaves(command: tuple[str, ...]) -> None:
    name, *options = command
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
