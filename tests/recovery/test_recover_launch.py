"""Two processes under accelerate launch, on the CPU: the losses of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeprune.pipeline.inputs import Text


def launch(processes: int, out: Path, *arguments: object) -> list[dict[str, float]]:
    # one process runs as a plain command
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += ["--main_process_port", "0", "-m"]
    command += ["moeprune", "recover", *map(str, arguments), "--out", str(out), "--json"]
    done = subprocess.run(
        command, env=dict(os.environ), check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (out / "moeprune_recovery.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["expert-kd", "logit-kd"])
def test_two_processes_have_the_losses_of_one(
    students: dict[str, Path], teacher: Path, text: Text, tmp_path: Path, how: str
) -> None:
    [page] = text.sources
    common = (students["masked"], "--teacher", teacher, "--how", how, "--data", page)
    sizes = ("--sequences", 40, "--length", 32, "--steps", 5, "--batch", 4, "--holdout", 0.1)
    one, two = (
        launch(n, tmp_path / f"out{n}", *common, *sizes, "--learning-rate", 1e-3) for n in (1, 2)
    )
    assert len(one) == len(two) == 5
    for name in ("loss", "ce", "held", "gradient"):
        values = [[entry[name] for entry in log if name in entry] for log in (one, two)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
