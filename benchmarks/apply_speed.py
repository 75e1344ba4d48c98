"""Throughput of apply against that of cp, in turns: drops a part of all experts of a checkpoint.

python benchmarks/apply_speed.py MODEL WORK --ratio 0.25 --rounds 3

Every round applies the plan and then copies what it wrote with cp; both read from the disk (the
pages of what they read are dropped before) and both end when all is on the disk. The ratio of the
medians says what naming, slicing and the checksums cost.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path

from moeprune.core.budget import Budget
from moeprune.core.plan import LayerPlan, Plan
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.loading import LayeredModel
from moeprune.pipeline import stages


def plan_of(checkpoint: Checkpoint, ratio: float) -> Plan:
    """Every so many experts of every layer, spread evenly."""
    layers = {}
    for index, site in LayeredModel(checkpoint).sites.items():
        count = site.shape.experts
        number = round(count * (1 - ratio))
        keep = tuple(sorted({e * count // number for e in range(number)}))
        layers[index] = LayerPlan(index, count, keep)
    budget = Budget(ratio=ratio).to_json()
    model = {"name": checkpoint.path.name, "fingerprint": checkpoint.fingerprint}
    return Plan(layers, "by-hand", {}, budget, model, {}, 0)


def drop_pages(folder: Path) -> None:
    """Have the next reader of these files go to the disk."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def applied(source: Path, plan: Plan, out: Path) -> float:
    """Seconds of ``apply``."""
    shutil.rmtree(out, ignore_errors=True)
    drop_pages(source)
    start = time.perf_counter()
    stages.apply(source, plan, out)
    return time.perf_counter() - start


def copied(source: Path, out: Path) -> float:
    """Seconds of ``cp`` and of getting everything on the disk."""
    shutil.rmtree(out, ignore_errors=True)
    drop_pages(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for file in out.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    plan = plan_of(Checkpoint.open(given.model), given.ratio)
    out, copy = given.work / "applied", given.work / "copied"
    given.work.mkdir(exist_ok=True)
    seconds: list[tuple[float, float]] = []
    for _ in range(given.rounds):
        one = applied(given.model, plan, out)
        seconds.append((one, copied(out, copy)))
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e9
        print(f"{size:.2f} GB: apply {one:.1f} s, cp {seconds[-1][1]:.1f} s", flush=True)
    apply, cp = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"median: apply {size / apply:.2f} GB/s, cp {size / cp:.2f} GB/s, {cp / apply:.0%}")
    for folder in (out, copy):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
