"""Decisions about the embedded model do not change unnoticed, nor from run to run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from golden.make import FILE, as_json, decisions, demo_plans
from moeprune.core.budget import Budget
from moeprune.core.plan import Plan
from moeprune.models.data import demo_text
from moeprune.pipeline import stages

RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "mone": ("mone", {}),
    "moeits": ("moeits", {}),
    "moe-pruner-dense": ("moe-pruner", {"propagate": "dense"}),
    "moe-pruner-pruned": ("moe-pruner", {"propagate": "pruned"}),
}


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return demo_plans()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["mone", "moeits", "moe-pruner"])
def test_plans_of_the_embedded_model(
    method: str, plans: dict[str, Plan], golden: dict[str, Any]
) -> None:
    found, expected = decisions(plans[method]), golden[method]
    assert list(found) == list(expected)
    for layer in expected:
        assert found[layer] == expected[layer], f"layer {layer}; see tests/golden/make.py"


def test_the_golden_file_is_as_its_program_writes_it(
    plans: dict[str, Plan], golden: dict[str, Any]
) -> None:
    written = json.loads(as_json(plans))
    assert list(written) == list(golden)
    for method, layers in golden.items():
        assert {i: list(row) for i, row in written[method].items()} == {
            i: list(row) for i, row in layers.items()
        }
        for row in layers.values():
            kept = 32 if method == "moe-pruner" else 16
            assert len(row["keep"]) == kept
            assert len(row["replaced"]) == (16 if method == "mone" else 0)


def plan_files(folder: Path, workers: int) -> dict[str, str]:
    """Hashes of statistics, plans and vectors of every run, from two batches of text."""
    text = stages.Text((str(demo_text("heldout")["german"]),), sequences=9, length=512, seed=3)
    compute = stages.Compute(dtype="float32", workers=workers)
    stages.calibrate("demo", folder / "statistics", text, compute=compute)
    found = {}
    for run, (method, options) in RUNS.items():
        made = stages.plan(
            "demo",
            method,
            Budget(ratio=0.5),
            None if run == "moe-pruner-pruned" else folder / "statistics",
            text,
            options,
            compute,
        )
        stages.save_plan(made, folder / f"{run}.json")
    for file in sorted(folder.iterdir()):
        if file.is_file():
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted((folder / "statistics").iterdir()):
        found[f"statistics/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return plan_files(tmp_path_factory.mktemp("first"), workers=1)


@pytest.mark.parametrize(("threads", "workers"), [(1, 2), (2, 1)])
def test_the_same_bytes_in_any_process_with_any_threads_and_workers(
    threads: int, workers: int, first: dict[str, str], tmp_path: Path
) -> None:
    """In a process of its own, because the number of threads is read when torch is imported."""
    assert {f"{run}.json" for run in RUNS} < set(first)
    assert len(set(first.values())) == len(first)  # all different files
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    code = (
        "import json, pathlib, sys, torch\n"
        "from golden.test_golden import plan_files\n"
        "assert torch.get_num_threads() == int(sys.argv[2])\n"
        "print(json.dumps(plan_files(pathlib.Path(sys.argv[1]), int(sys.argv[3]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(threads), str(workers)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == first
