"""The constants of this machine, and stages that the simulator is held against."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import limited
import numpy as np
import scale_model as sim
import torch
from apply_speed import prepare
from calibration import random_batches, walk_seconds

from moeprune.core.accumulators import LIGHT
from moeprune.core.ops.nmi import pairwise_nmi
from moeprune.models.checkpoint import Checkpoint
from moeprune.models.data import demo_text
from moeprune.models.loading import LayeredModel
from moeprune.models.quantised import decode_fp8

FILE_BYTES = 1 << 30
ROWS, WIDTH, INNER = 1024, 2048, 1024
"""Of the products that are timed: an expert of OLMoE's size on the tokens of eight sequences."""


def _best(call: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest run: what else the machine does only adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def disk(folder: Path) -> dict[str, float]:
    """Bytes per second of writing one file to stable storage and of reading it back."""
    file, block = folder / "block", os.urandom(1 << 24)

    def write() -> None:
        with file.open("wb", buffering=0) as handle:
            for _ in range(FILE_BYTES // len(block)):
                handle.write(block)
            os.fsync(handle.fileno())

    def read() -> None:
        buffer = bytearray(1 << 24)
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass

    writing = _best(write, 3)
    reading = []
    for _ in range(3):
        limited.forget_files(folder)
        reading.append(_best(read, 1))
    file.unlink()
    return {"write": FILE_BYTES / writing, "read": FILE_BYTES / min(reading)}


def arithmetic(cores: int) -> dict[str, float]:
    """FLOP/s of bf16 products, and bytes per second of SHA-256."""
    rows, matrix = torch.randn(ROWS, WIDTH).bfloat16(), torch.randn(INNER, WIDTH).bfloat16()
    flops = 2.0 * ROWS * WIDTH * INNER * 8

    def products() -> None:
        for _ in range(8):
            torch.nn.functional.linear(rows, matrix)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    products()
    one = flops / _best(products)
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def on_all() -> None:
            list(pool.map(lambda _: products(), range(cores)))

        on_all()
        every = cores * flops / _best(on_all)
    data = bytes(1 << 26)
    digest = len(data) / _best(lambda: hashlib.sha256(data).digest())
    torch.set_num_threads(threads)
    return {"flops_one_core": one, "flops": every, "sha256": digest}


def kernels(cores: int) -> dict[str, float]:
    """Entries per second that NMI compares on one core and on all, and that fp8 is decoded."""
    draw = np.random.default_rng(0)
    matrices = [draw.standard_normal(WIDTH * INNER, dtype=np.float32) for _ in range(12)]
    pairs = len(matrices) * (len(matrices) - 1) / 2
    pairwise_nmi(matrices[:2])  # compiles
    found = {}
    for name, threads in (("nmi_one_core", 1), ("nmi", cores)):
        seconds = _best(lambda n=threads: pairwise_nmi(matrices, threads=n), 3)
        found[name] = pairs * WIDTH * INNER / seconds
    stored = torch.randn(INNER, WIDTH).to(torch.float8_e4m3fn)
    scale = torch.ones(INNER // 128, WIDTH // 128)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = _best(lambda: decode_fp8(stored, scale, (128, 128)).to(torch.bfloat16))
    torch.set_num_threads(threads)
    return found | {"decode": INNER * WIDTH / seconds}


def loading(path: Path) -> float:
    """Bytes per second of a layer through ``load_layer``, its file in the cache."""
    model = LayeredModel(Checkpoint.open(path))
    index = max(model.sites)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def load() -> None:
        model.load_layer(index)

    load()
    nbytes = sum(p.nbytes for p in model.layers[index].parameters())
    seconds = _best(load, 3)
    torch.set_num_threads(threads)
    return nbytes / seconds


def start_seconds() -> float:
    """A command that finds nothing to do."""
    command = [sys.executable, "-m", "moeprune", "inspect", "demo", "--json"]
    return _best(lambda: subprocess.run(command, check=True, capture_output=True), 2)


def constants(path: Path, folder: Path) -> dict[str, Any]:
    """Everything, on the model at ``path`` (one of ``real_size.py``) and the disk of ``folder``."""
    cores, busy = os.cpu_count() or 1, os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        found: dict[str, Any] = disk(Path(work))
    found |= arithmetic(cores) | kernels(cores)
    found |= {"load": loading(path), "start": start_seconds(), "cores": cores, "busy": busy}
    found["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["attained"] = attained(path, found["flops"])
    return found


def attained(path: Path, peak: float, tokens: int = 4096) -> float:
    """The part of the products' speed that an observed walk has when arithmetic bounds it."""
    checkpoint = Checkpoint.open(path)
    model, batches = LayeredModel(checkpoint), random_batches(tokens // 512)
    shapes = sim.shapes_from("it", dict(checkpoint.config))
    walk_seconds(model, batches[:1], LIGHT)
    prepare(path, cold=False)
    seconds = statistics.median(walk_seconds(model, batches, LIGHT) for _ in range(3))
    return sim.walk_flops(shapes, tokens, 512) / seconds / peak


def here(found: dict[str, Any]) -> sim.Machine:
    """The machine that was measured."""
    return sim.Machine(
        name="the machine that was measured", nodes=1, read=found["read"], shared=None,
        write=found["write"], devices=1, device_memory=None,
        flops=found["flops"] * found["attained"], link=None, load=found["load"],
        decode=found["decode"], digest=found["sha256"], cores=found["cores"],
        nmi=found["nmi_one_core"], memory=found["memory"], start=found["start"],
    )  # fmt: skip


WINDOWS = 2
WORK = sim.Work(calibrate=16 * 512, evaluate=WINDOWS * len(demo_text("heldout")) * 512, length=512)
_TEXT = ("--sequences", "16", "--length", "512")


def validate(path: Path | str, found: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Measured and predicted seconds of the stages on a checkpoint, with a cold cache."""
    source = Checkpoint.open(path).path
    config = json.loads((source / "config.json").read_text())
    shapes = sim.shapes_from(source.name, config)
    machine, rows = here(found), []
    with tempfile.TemporaryDirectory(dir=folder) as place_of_work:
        work = Path(place_of_work)
        stats, plan, out = (str(work / part) for part in ("stats", "plan.json", "smaller"))
        windows = ("--sequences", str(WINDOWS), "--length", "512")
        runs: dict[str, tuple[Any, list[str]]] = {
            "calibrate": (sim.calibrate, [str(path), "--out", stats, *_TEXT]),
            "plan": (
                sim.plan_scores,
                [str(path), "--method", "reap", "--ratio", "0.25", "--statistics", stats,
                 "--out", plan],
            ),
            "apply": (sim.apply, [str(path), "--plan", plan, "--out", out]),
            "evaluate": (sim.evaluate, [out, "--teacher", str(path), *windows]),
        }  # fmt: skip
        for stage, (predict, words) in runs.items():
            for place in (source, work):
                limited.forget_files(place)
            start = time.perf_counter()
            command = [sys.executable, "-m", "moeprune", stage, *words]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            if done.returncode:
                print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
                break
            cost = predict(shapes, machine, WORK)
            name = str(path).rpartition("/")[2]
            rows.append(
                {"model": name, "layers": shapes.layers, "stage": stage, "measured": seconds,
                 "predicted": cost.seconds, "parts": cost.parts}
            )  # fmt: skip
    return rows
