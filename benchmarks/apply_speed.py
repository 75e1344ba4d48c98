"""How fast ``apply`` writes, against ``cp`` of the same bytes in the same run.

    python benchmarks/apply_speed.py MODEL [--ratio 0.25] [--repeats 3] [--work DIR] [--json]

A plan drops a quarter of the experts, drawn at random. Then, alternating: ``moeprune.apply`` in
this process, and ``cp`` of what it wrote, with a sync of the copy; each with a cold cache (pages of
the files that are read are dropped) and with a warm one (they are read beforehand). Goal:
``apply`` has 70 % of the throughput of ``cp``. Its seconds are of the whole: opening, planning the
bytes, checksums and the card.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import arguments
import limited

import moeprune


def cp_seconds(source: Path, out: Path) -> float:
    """``cp`` of the weights, to stable storage."""
    out.mkdir()
    start = time.perf_counter()
    shards = sorted(source.glob("*.safetensors"))
    subprocess.run(["cp", "--reflink=never", *shards, out], check=True)
    for file in out.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - start


def apply_seconds(model: Path, plan: moeprune.Plan, out: Path) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    moeprune.apply(model, plan, out)
    return time.perf_counter() - start, time.process_time() - cpu


def prepare(model: Path, cold: bool) -> None:
    """Nothing of the model's files in the cache, or all that has room."""
    limited.forget_files(model)
    if not cold:
        for shard in sorted(model.glob("*.safetensors")):
            with shard.open("rb") as handle:
                while handle.read(1 << 24):
                    pass


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(model: Path, ratio: float, repeats: int, work: Path) -> dict[str, dict[str, float]]:
    plan = moeprune.plan(model, "random", moeprune.Budget(ratio=ratio))
    found, out = {}, work / "out"
    moeprune.apply(model, plan, work / "first")  # warms code
    shutil.rmtree(work / "first")
    for kind in ("cold", "warm"):
        rows = []
        for _ in range(repeats):
            prepare(model, kind == "cold")
            applied, cpu = apply_seconds(model, plan, out)
            prepare(out, kind == "cold")
            copied = cp_seconds(out, work / "cp")
            nbytes = size_of(out)
            rows.append((copied, applied, cpu))
            for folder in (out, work / "cp"):
                shutil.rmtree(folder)
        found[kind] = {
            "bytes": nbytes,
            "cp_seconds": statistics.median(copied for copied, _, _ in rows),
            "apply_seconds": statistics.median(applied for _, applied, _ in rows),
            "apply_cpu_seconds": statistics.median(cpu for _, _, cpu in rows),
            "throughput_of_cp": statistics.median(copied / applied for copied, applied, _ in rows),
        }
    return found


def main() -> None:
    parser = arguments.of_model(__doc__)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--work", type=Path, help="on the disk that is to be measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work or args.model.parent) as work:
        found = measure(args.model, args.ratio, args.repeats, Path(work))
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(
        "| cache | bytes | cp | apply | apply, CPU | throughput of apply / cp |\n|---|" + "---|" * 5
    )
    for kind, row in found.items():
        print(
            f"| {kind} | {row['bytes'] / 1e9:.2f} GB | {row['cp_seconds']:.1f} s | "
            f"{row['apply_seconds']:.1f} s | {row['apply_cpu_seconds']:.1f} s | "
            f"{row['throughput_of_cp']:.2f} |"
        )


if __name__ == "__main__":
    main()
